"""Distils the transformer into a causal one of four steps, on its own past (stage 2).

    python launch/train.py --config=configs/dmd.py --workdir runs/dmd
    python launch/train.py --config=configs/dmd.py:tiny --workdir runs/tiny/dmd
    python launch/stream.py --checkpoint runs/tiny/dmd

`tiny` runs from nothing: a random teacher, drawn faces. `small` is the recipe of the small
model (docs/small_model.md): it needs `runs/teacher` and `runs/diffusion_forcing`, and one CPU core
for ten minutes. `wan_s2v_14b` is for a model folder
converted without the distilled LoRA (`PAPER_MODEL` in configs/sizes.py) and stage 1's result.
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
)


def get_config(size: str = "small") -> ConfigDict:
    """Settings of one size: "tiny", "small", "anchored" or "wan_s2v_14b"."""
    sizes = {"tiny": _tiny, "small": _small, "anchored": _anchored, "wan_s2v_14b": _wan_s2v_14b}
    return choose("dmd", size, sizes)


def _tiny() -> dict:
    return {
        "fps": 16,
        "data": "",
        "latents": "",
        "weights": {"model": SMALL_MODEL, "teacher": "", "student": ""},
        "model": tiny_dit(),
        "rollout": {"sigmas": [1.0, 0.97, 0.9, 0.8, 0.0], "shift_max": 100},
        "task": {
            "batch_size": 2,
            "latents": 9,
            "sigma_bounds": [0.1, 0.98],
            "ema_start": 10,
            "critic_learning_rate": 1e-4,
        },
        "loop": {
            **_loop(num_steps=20, learning_rate=1e-4, warmup_steps=2),
            "log_every": 5,
            "evaluate_every": 20,
            "checkpoint_every": 10,
        },
    }


def _small() -> dict:
    return {
        "fps": 16,
        "data": "data/people",
        "latents": "data/latents",
        "weights": {
            "model": SMALL_MODEL,
            "teacher": "runs/teacher",
            "student": "runs/diffusion_forcing",
        },
        "model": {**small_dit(), "unroll": 1},
        "rollout": {"sigmas": [1.0, 0.97, 0.9, 0.8, 0.0], "sink_distance": [8, 30]},
        # Predicting the clean latent is trained from level 0.4 up, so scores are asked there.
        "task": {
            "batch_size": 4,
            "latents": 9,
            "guidance_scale": 1.5,
            "critic_learning_rate": 4e-5,
            "sigma_bounds": [0.4, 0.98],
            # The light VAE's channels are principal components, whose tails are long.
            "clean_limit": 60.0,
            "ema_start": 50,
        },
        "loop": {
            **_loop(num_steps=140, learning_rate=1.5e-5, warmup_steps=10),
            "ema_decay": 0.97,
            "log_every": 5,
            "evaluate_every": 140,
            "checkpoint_every": 70,
        },
    }


def _anchored() -> dict:
    return {
        "fps": 25,
        "data": "",
        "latents": "data/motion",
        "weights": {
            "model": ANCHORED_MODEL,
            "teacher": "runs/teacher",
            "student": "runs/diffusion_forcing",
        },
        "model": anchored_dit(),
        "rollout": {"sigmas": "shift3", "audio_context": "clip", "sink_distance": [4, 30]},
        "task": {
            "batch_size": 16,
            "latents": 21,
            "guidance_scale": 1.5,
            "critic_learning_rate": 1e-4,
            "ema_start": 50,
        },
        "loop": {
            **_loop(num_steps=300, learning_rate=5e-5, warmup_steps=10),
            "ema_decay": 0.98,
            "log_every": 5,
            "evaluate_every": 150,
            "checkpoint_every": 50,
        },
    }


def _wan_s2v_14b() -> dict:
    return {
        "fps": 16,
        "data": "data/speakers",
        "latents": "data/speakers_latents",
        "weights": {
            "model": PAPER_MODEL,
            "teacher": PAPER_MODEL,
            "student": "runs/diffusion_forcing",
        },
        "model": paper_dit(),
        # 1000, 937.5, 833.333 and 625: evenly spaced levels, shifted by 5.
        "rollout": {"sigmas": "self_forcing"},
        "task": {"batch_size": 128, "latents": 21, "adapter_rank": 128, "adapter_alpha": 64.0},
        "loop": {
            **_loop(num_steps=2500, learning_rate=1e-5, warmup_steps=20),
            "log_every": 1,
            "evaluate_every": 250,
            "evaluate_clips": 16,
            "workers": 4,
            "checkpoint_every": 50,
        },
    }


def _loop(num_steps: int, learning_rate: float, warmup_steps: int) -> dict:
    return adam(
        num_steps,
        learning_rate,
        warmup_steps,
        betas=[0.0, 0.999],
        max_grad_norm=10.0,
        ema_decay=0.99,
    )
