"""The small default model, trained from nothing on two CPU cores in an afternoon.

    python launch/prepare_data.py people --out data/people                                20 min
    python launch/train.py --config=configs/small_cpu.py:speech --workdir runs/speech      6 min
    python launch/train.py --config=configs/small_cpu.py:vae --workdir runs/vae           25 min
    python launch/train.py --config=configs/small_cpu.py:dit --workdir runs/dit           35 min
    python launch/evaluate.py --checkpoint jax_avatar/assets/small --data data/people

96x96 pixels at 16 frames per second, 12 frames per block. How the weights that ship were made, with
its detours, and what they score is in `docs/small_model.md`.
"""

from ml_collections import ConfigDict


def get_config(stage: str = "dit") -> ConfigDict:
    """Settings of one stage: "speech", "vae" or "dit"."""
    stages = {"speech": _speech, "vae": _vae, "dit": _dit}
    if stage not in stages:
        raise ValueError(f"stage {stage!r} is unknown; write small_cpu.py:speech, :vae or :dit")
    config = ConfigDict({"stage": stage, "seed": 0, **stages[stage]()})
    return config


def _speech() -> dict:
    return {
        "model": {},
        "task": {"cache": "data/speech_corpus", "num_sentences": 900, "batch": 16},
        "loop": {
            "num_steps": 2400,
            "learning_rate": 2e-3,
            "warmup_steps": 100,
            "ema_decay": 0.998,
            "log_every": 50,
            "evaluate_every": 400,
            "checkpoint_every": 400,
        },
    }


def _vae() -> dict:
    return {
        "data": "data/people",
        "model": {"z_dim": 32},
        "task": {"batch_size": 1, "frames": 9, "latent_noise": 0.1},
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


def _dit() -> dict:
    return {
        "data": "data/people",
        "latents": "data/latents",
        "weights": {"speech": "runs/speech", "vae": "runs/vae"},
        "model": {
            "width": 192,
            "ffn_width": 768,
            "num_heads": 4,
            "num_layers": 6,
            "text_width": 32,
            "text_len": 8,
            "latent_channels": 32,
            "pose_channels": 32,
            "audio_width": 96,
            "audio_layers": 5,
            "audio_inject_layers": [0, 2, 4],
            "audio_history": 1,
            "ring_blocks": 3,
            "framepack": False,
            "zero_init": False,
            "unroll": 6,
        },
        "task": {"batch_size": 4, "latents": 9, "still_share": 1.0, "mouth_probe_weight": 0.1},
        "loop": {
            "num_steps": 2800,
            "learning_rate": 1e-3,
            "warmup_steps": 100,
            "ema_decay": 0.998,
            "log_every": 20,
            "evaluate_every": 400,
            "checkpoint_every": 200,
        },
    }
