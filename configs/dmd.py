"""Distils the transformer into a causal one of four steps, on its own past (stage 2).

    python launch/train.py --config=configs/dmd.py:tiny --workdir runs/dmd_tiny
    python launch/stream.py --checkpoint runs/dmd_tiny --image face.png --audio voice.wav

`tiny` runs from nothing on a laptop CPU: a random teacher, portraits and voices of noise, so its
result talks to nobody. `small` distils the model that ships, on clips that `configs/small_cpu.py`
was trained on. `wan_s2v_14b` has the paper's values, for a converted model folder.
"""

from ml_collections import ConfigDict


def get_config(size: str = "small") -> ConfigDict:
    """Settings of one size: "tiny", "small" or "wan_s2v_14b"."""
    sizes = {"tiny": _tiny, "small": _small, "wan_s2v_14b": _wan_s2v_14b}
    if size not in sizes:
        raise ValueError(f"size {size!r} is unknown; write dmd.py:tiny, :small or :wan_s2v_14b")
    return ConfigDict({"stage": "dmd", "seed": 0, **sizes[size]()})


def _tiny() -> dict:
    return {
        "data": "",
        "latents": "",
        "weights": {"model": "jax_avatar/assets/small", "teacher": "", "student": ""},
        "model": {
            "width": 48,
            "ffn_width": 96,
            "num_heads": 4,
            "num_layers": 2,
            "text_width": 32,
            "text_len": 8,
            "latent_channels": 32,
            "pose_channels": 32,
            "audio_width": 96,
            "audio_layers": 5,
            "audio_inject_layers": [0],
            "audio_history": 1,
            "ring_blocks": 3,
            "framepack": False,
            "zero_init": False,
        },
        "rollout": {"sigmas": [1.0, 0.97, 0.9, 0.8, 0.0], "shift_max": 100},
        "task": {"batch_size": 2, "latents": 9, "ema_start": 10, "critic_learning_rate": 1e-4},
        "loop": {
            **_loop(num_steps=20, learning_rate=1e-4, warmup_steps=2),
            "log_every": 5,
            "checkpoint_every": 10,
        },
    }


def _small() -> dict:
    model = "jax_avatar/assets/small"
    return {
        "data": "data/people",
        "latents": "data/latents",
        "weights": {"model": model, "teacher": model, "student": ""},
        "model": {"unroll": 1},
        "rollout": {"sigmas": [1.0, 0.97, 0.9, 0.8, 0.0], "sink_distance": [8, 30]},
        # Predicting the clean latent is trained from level 0.4 up, so scores are asked there.
        "task": {
            "batch_size": 8,
            "latents": 9,
            "critic_learning_rate": 8e-6,
            "sigma_bounds": [0.4, 0.98],
        },
        "loop": {
            **_loop(num_steps=2500, learning_rate=4e-5, warmup_steps=20),
            "log_every": 20,
            "evaluate_every": 250,
            "checkpoint_every": 250,
        },
    }


def _wan_s2v_14b() -> dict:
    model = "models/wan_s2v_14b"
    return {
        "data": "data/speakers",
        "latents": "data/speakers_latents",
        "weights": {"model": model, "teacher": model, "student": "runs/stage1"},
        # Four blocks of the past and the current one; no motion tokens.
        "model": {"ring_blocks": 5, "framepack": False, "rematerialise": True},
        # 1000, 937.5, 833.333 and 625: evenly spaced levels, shifted by 5.
        "rollout": {"sigmas": [1.0, 0.9375, 5 / 6, 0.625, 0.0]},
        "task": {"batch_size": 128, "latents": 21, "adapter_rank": 128, "adapter_alpha": 64.0},
        "loop": {
            **_loop(num_steps=2500, learning_rate=1e-5, warmup_steps=20),
            "log_every": 1,
            "checkpoint_every": 50,
        },
    }


def _loop(num_steps: int, learning_rate: float, warmup_steps: int) -> dict:
    return {
        "num_steps": num_steps,
        "learning_rate": learning_rate,
        "final_learning_rate": 1.0,
        "warmup_steps": warmup_steps,
        "betas": (0.0, 0.999),
        "weight_decay": 0.01,
        "max_grad_norm": 10.0,
        "ema_decay": 0.99,
    }
