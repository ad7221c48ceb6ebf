"""Trains the light VAE of the small model.

    python launch/train.py --config=configs/vae.py --workdir runs/vae
    python launch/train.py --config=configs/vae.py:small_finish --workdir runs/vae_finish
    python launch/train.py --config=configs/vae.py:tiny --workdir runs/tiny/vae

`small`, then `small_finish`, is that model's recipe: 25 minutes on two CPU cores.
The first gives sharp pictures, the second opens the mouth as far as the truth does. The 14B model
has Wan's VAE, which is converted, not trained.
"""

from ml_collections import ConfigDict

from configs.sizes import choose


def get_config(size: str = "small") -> ConfigDict:
    """Settings of one size: "tiny", "small" or "small_finish"."""
    sizes = {"tiny": _tiny, "small": _small, "small_finish": _small_finish}
    return choose("vae", size, sizes)


def _tiny() -> dict:
    return {
        "data": "",
        "model": {"z_dim": 32, "latent_width": 24, "frame_width": 16, "stem_width": 16,
                  "latent_blocks": 1, "frame_blocks": 1},
        "task": {"batch_size": 1, "frames": 9},
        "loop": {"num_steps": 20, "warmup_steps": 5, "log_every": 5, "checkpoint_every": 10},
    }  # fmt: skip


def _small() -> dict:
    return {
        "data": "data/people",
        "model": {"z_dim": 32},
        "task": {
            "batch_size": 1,
            "frames": 9,
            "latent_noise": 0.1,
            "square_weight": 0.0,
            "gradient_weight": 1.0,
            "motion_weight": 0.5,
        },
        "loop": {
            "num_steps": 4000,
            "learning_rate": 1.5e-3,
            "warmup_steps": 100,
            "ema_decay": 0.998,
            "log_every": 50,
            "evaluate_every": 500,
            "checkpoint_every": 500,
        },
    }


def _small_finish() -> dict:
    config = _small()
    config["task"].update(
        start_from="runs/vae", square_weight=4.0, gradient_weight=0.5, motion_weight=2.0
    )
    config["loop"].update(num_steps=500, learning_rate=1e-3, ema_decay=0.99, evaluate_every=250)
    return config
