"""Trains a teacher: a transformer that sees whole clips in both directions (stage 0).

    python launch/train.py --config=configs/teacher.py --workdir runs/teacher
    python launch/evaluate.py --checkpoint runs/teacher --sampler teacher --steps 40 --guidance 4

Only where no teacher of the size exists; the 14B model is distilled from Wan2.2-S2V. `small` is
the recipe of the small model (docs/small_model.md) and takes one CPU core 43 minutes;
`--config.weights.start= --config.loop.num_steps=4000` begins with random weights instead.
"""

from ml_collections import ConfigDict

from configs.sizes import (
    ANCHORED_MODEL,
    PAPER_MODEL,
    SMALL_MODEL,
    adam,
    anchored_dit,
    choose,
    paper_dit,
    small_dit,
    tiny_dit,
    weights,
)


def get_config(size: str = "small") -> ConfigDict:
    """Settings of one size: "tiny", "small", "anchored" or "wan_s2v_14b"."""
    sizes = {"tiny": _tiny, "small": _small, "anchored": _anchored, "wan_s2v_14b": _wan_s2v_14b}
    return choose("teacher", size, sizes)


def _tiny() -> dict:
    return {
        **_small(),
        "fps": 16,
        "data": "",
        "latents": "",
        "weights": weights(SMALL_MODEL),
        "model": tiny_dit(),
        "task": {
            **_clips(),
            "batch_size": 2,
            "latents": 9,
            "smallest_sigma": 0.1,
            "weight": "clean",
        },
        "sampler": {"num_steps": 4, "guidance": 4.0},
        "loop": {
            **adam(20, 1e-3, 5, betas=[0.9, 0.95], log_every=5),
            "evaluate_every": 20,
            "checkpoint_every": 10,
        },
    }


def _small() -> dict:
    return {
        "fps": 16,
        "data": "data/people",
        "latents": "data/latents",
        "weights": weights(SMALL_MODEL, start=SMALL_MODEL),
        "model": small_dit(),
        "task": {
            **_clips(),
            "batch_size": 4,
            "latents": 9,
            # The network predicts the clean latent, whose error does not shrink with the noise.
            "weight": "clean",
            "smallest_sigma": 0.1,
            # Without the portrait it would have to invent a face, which it is never asked for.
            "reference_dropout": 0.0,
            "reference_noise": 0.05,
            "mouth_weight": 5.0,
            "mouth_probe_weight": 0.1,
        },
        "sampler": {"num_steps": 40, "guidance": 4.0},
        "loop": {
            **adam(1500, 7e-4, 100, betas=[0.9, 0.95], ema_decay=0.999),
            "schedule": "cosine",
            "log_every": 20,
            "evaluate_every": 500,
            "checkpoint_every": 200,
        },
    }


def _anchored() -> dict:
    return {
        "fps": 25,
        "data": "",
        "latents": "data/motion",
        "weights": weights(ANCHORED_MODEL),
        "model": anchored_dit(),
        "task": {
            **_clips(),
            "batch_size": 16,
            "latents": 36,
            "text_dropout": 0.0,
            "reference_dropout": 0.0,
            "shift_max": 900,
        },
        "sampler": {"num_steps": 40, "guidance": 2.0},
        "loop": {
            **adam(4000, 1e-3, 100, betas=[0.9, 0.95], ema_decay=0.998),
            "schedule": "cosine",
            "log_every": 20,
            "evaluate_every": 500,
            "checkpoint_every": 200,
        },
    }


def _wan_s2v_14b() -> dict:
    return {
        "fps": 16,
        "data": "data/speakers",
        "latents": "data/speakers_latents",
        "weights": weights(PAPER_MODEL),
        "model": paper_dit(),
        "task": {**_clips(), "batch_size": 128, "latents": 21},
        "sampler": {"num_steps": 40, "guidance": 4.5},
        "loop": {
            **adam(25_000, 1e-4, 1000, betas=[0.9, 0.95], ema_decay=0.999),
            "log_every": 10,
            "evaluate_every": 2500,
            "evaluate_clips": 16,
            "validation_clips": 512,
            "workers": 4,
            "checkpoint_every": 500,
        },
    }


def _clips() -> dict:
    """One noise level per clip, and what guidance needs dropped."""
    return {
        "form": "bidirectional",
        "shift": 3.0,
        "shared_share": 1.0,
        "audio_dropout": 0.15,
        "text_dropout": 0.1,
        "reference_dropout": 0.05,
    }
