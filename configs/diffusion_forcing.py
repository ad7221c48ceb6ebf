"""Makes a teacher causal: every block has a noise level of its own and sees the past (stage 1).

    python launch/train.py --config=configs/diffusion_forcing.py --workdir runs/diffusion_forcing
    python launch/stream.py --checkpoint runs/diffusion_forcing

`small` is the recipe of the small model (docs/small_model.md): it starts from `runs/teacher`
and takes one CPU core 18 minutes. `--config.weights.start= --config.loop.num_steps=2800` begins
with random weights instead.
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
    return choose("diffusion_forcing", size, sizes)


def _tiny() -> dict:
    return {
        "fps": 16,
        "data": "",
        "latents": "",
        "weights": weights(SMALL_MODEL),
        "model": tiny_dit(),
        "task": {"batch_size": 2, "latents": 9, "smallest_sigma": 0.1, "weight": "clean"},
        "loop": {
            **adam(20, 1e-3, 5, betas=[0.9, 0.999], log_every=5),
            "evaluate_every": 20,
            "checkpoint_every": 10,
        },
    }


def _small() -> dict:
    return {
        "fps": 16,
        "data": "data/people",
        "latents": "data/latents",
        "weights": weights(SMALL_MODEL, start="runs/teacher"),
        "model": small_dit(),
        "task": {
            "batch_size": 4,
            "latents": 9,
            # A sampler of four steps never feeds smaller levels, and every step keeps a window of
            # blocks at its own level.
            "shift": 2.0,
            "smallest_sigma": 0.4,
            "shared_share": 0.5,
            "audio_dropout": 0.1,
            "reference_noise": 0.05,
            "reference_frames": [13, 39],
            "mouth_weight": 5.0,
            "mouth_probe_weight": 0.1,
        },
        "loop": {
            "num_steps": 700,
            "learning_rate": 6e-4,
            "warmup_steps": 50,
            "ema_decay": 0.998,
            "log_every": 20,
            "evaluate_every": 350,
            "checkpoint_every": 200,
        },
    }


def _anchored() -> dict:
    return {
        "fps": 25,
        "data": "",
        "latents": "data/motion",
        "weights": weights(ANCHORED_MODEL, start="runs/teacher"),
        "model": anchored_dit(),
        "task": {
            "batch_size": 16,
            "latents": 36,
            # A block of half a second hears too little alone.
            "audio_context": "clip",
            "shift": 3.0,
            # Every step keeps a window of blocks at its own level.
            "shared_share": 0.5,
            "audio_dropout": 0.1,
            "text_dropout": 0.0,
            "shift_max": 900,
            "reference_frames": [4, 30],
        },
        "loop": {
            **adam(2000, 6e-4, 100, betas=[0.9, 0.95], ema_decay=0.998),
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
        "weights": weights(PAPER_MODEL, start=PAPER_MODEL),
        "model": paper_dit(),
        "task": {"batch_size": 128, "latents": 21, "adapter_rank": 128, "adapter_alpha": 64.0},
        "loop": {
            **adam(25_000, 1e-5, 500, betas=[0.9, 0.999], max_grad_norm=1.0),
            "log_every": 10,
            "evaluate_every": 2500,
            "evaluate_clips": 16,
            "validation_clips": 512,
            "workers": 4,
            "checkpoint_every": 500,
        },
    }
