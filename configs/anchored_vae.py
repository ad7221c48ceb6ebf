"""Trains the VAE that is anchored in the portrait, on people that are rendered as it goes.

    python launch/train.py --config=configs/anchored_vae.py --workdir runs/anchored_vae
    python launch/train.py --config=configs/anchored_vae.py:tiny --workdir runs/tiny/anchored_vae

Rendering needs the extra `people` and flite. `small` takes half a second of one CPU core a step.
"""

from ml_collections import ConfigDict

from configs.sizes import choose
from jax_avatar.data.talking_people.head_motion import CURVES, SCALE


def get_config(size: str = "small") -> ConfigDict:
    """Settings of one size: "tiny" or "small"."""
    return choose("anchored_vae", size, {"tiny": _tiny, "small": _small})


def _motion() -> dict:
    return {"curves": CURVES, "scale": tuple(round(float(x), 6) for x in SCALE)}


def _tiny() -> dict:
    return {
        "people": {"count": 4, "texture_size": 64},
        "model": {
            **_motion(),
            "feature_widths": (8, 8, 8, 8),
            "code_width": 8,
            "flow_width": 8,
            "frame_width": 8,
            "face_width": 8,
            "encoder_widths": (8, 8, 8),
        },
        "task": {
            "cache": "runs/tiny/moved_portraits",
            "people": 4,
            "first_people": 2,
            "held_out_people": 1,
            "batch_size": 1,
        },
        "loop": {"num_steps": 10, "warmup_steps": 2, "log_every": 5, "checkpoint_every": 5},
    }


def _small() -> dict:
    return {
        "people": {},
        "model": _motion(),
        "task": {"cache": "data/moved_portraits"},
        "loop": {
            "num_steps": 20_000,
            "learning_rate": 1e-3,
            "schedule": "constant",
            "warmup_steps": 60,
            "weight_decay": 0.0,
            "ema_decay": 0.99,
            "log_every": 25,
            "evaluate_every": 500,
            "checkpoint_every": 100,
            "keep_every": 0,
        },
    }
