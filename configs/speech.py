"""Trains the speech encoder of the small model on synthesised speech; it needs `flite`.

    python launch/train.py --config=configs/speech.py --workdir runs/speech

Six minutes on two CPU cores. The 14B model hears with wav2vec 2.0, which is converted, not trained.
"""

from ml_collections import ConfigDict

from configs.sizes import choose


def get_config(size: str = "small") -> ConfigDict:
    """Settings of one size: "tiny" or "small"."""
    return choose("speech", size, {"tiny": _tiny, "small": _small})


def _tiny() -> dict:
    return {
        "model": {},
        "task": {"cache": "data/tiny_corpus", "num_sentences": 16, "num_check_sentences": 4},
        "loop": {"num_steps": 20, "warmup_steps": 5, "log_every": 5, "checkpoint_every": 10},
    }


def _small() -> dict:
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
