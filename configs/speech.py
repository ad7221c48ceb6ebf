"""Trains the speech encoder of a small model on synthesised speech.

    python launch/prepare_data.py utterances --out data/utterances
    python launch/train.py --config=configs/speech.py --workdir runs/speech

The speech needs the program `flite` and the extra `voices`; `--config.task.hibari=0
--config.task.kokoro=0` does without the extra. `--config.model.fps=25` is for models of 25 frames
per second. Twelve minutes of one CPU core. The 14B model hears with wav2vec 2.0, which is
converted, not trained.
"""

from ml_collections import ConfigDict

from configs.sizes import choose


def get_config(size: str = "small") -> ConfigDict:
    """Settings of one size: "tiny" or "small"."""
    return choose("speech", size, {"tiny": _tiny, "small": _small})


def _tiny() -> dict:
    return {
        "model": {},
        "task": {"cache": "data/tiny_utterances", "flite": 16, "hibari": 0, "kokoro": 0},
        "loop": {"num_steps": 20, "warmup_steps": 5, "log_every": 5, "checkpoint_every": 10},
    }


def _small() -> dict:
    return {
        "model": {},
        "task": {"cache": "data/utterances", "batch": 16},
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
