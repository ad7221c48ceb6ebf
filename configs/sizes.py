"""Sizes that the stages of training share, and how a config file chooses one.

`tiny` is for tests: it runs from nothing on a laptop CPU in a minute or two, on drawn faces, and
does not learn to talk. `small` is the recipe of the small model. `wan_s2v_14b` has the paper's
values.
"""

import difflib
from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from configs import wan_s2v_14b

SMALL_MODEL = "jax_avatar/assets/small"
"""Folder of the small model, for its VAE, speech encoder and stream settings."""

ANCHORED_MODEL = "jax_avatar/assets/anchored"
"""Folder of the VAE that is anchored in the portrait, and of the speech encoder beside it."""

PAPER_MODEL = "models/wan_s2v_14b"
"""Folder of the converted official weights, without the distilled LoRA merged into them:

    python -m conversion.convert all --src ckpt --out models/wan_s2v_14b

See docs/weights.md; stages refuse a folder that was converted with `--merge`."""


def choose(stage: str, size: str, sizes: Mapping[str, Callable[[], dict]]) -> ConfigDict:
    """The config of a stage in one size, or an error that names the sizes there are."""
    if size not in sizes:
        near = difflib.get_close_matches(size, sizes, n=1)
        hint = f"; did you mean :{near[0]}?" if near else ""
        known = ", ".join(f"{stage}.py:{name}" for name in sizes)
        raise ValueError(f"size {size!r} is unknown; write {known}{hint}")
    return ConfigDict({"stage": stage, "seed": 0, **sizes[size]()})


def weights(model: str, **folders: str) -> dict:
    """The weights section of stages 0 and 1."""
    return {"model": model, "vae": "", "speech": "", "start": "", **folders}


def tiny_dit() -> dict:
    """A transformer of 0.15 million weights."""
    return {
        **small_dit(),
        "width": 48,
        "ffn_width": 96,
        "num_layers": 2,
        "audio_inject_layers": [0],
        "unroll": 1,
    }


def small_dit() -> dict:
    """The transformer that ships: 4.8 million weights."""
    return {
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
        "zero_init": False,
        "unroll": 6,
    }


def anchored_dit() -> dict:
    """The transformer of motion: 4.4 million weights, one token per latent."""
    return {
        **small_dit(),
        "ffn_width": 576,
        "latent_channels": 12,
        "pose_channels": 12,
        "ring_blocks": 5,
        "unroll": 1,
    }


def paper_dit() -> dict:
    """Wan2.2-S2V-14B with four blocks of the past and the current one.

    It has motion tokens with `task.motion_frames=scaffold` only.
    """
    dit = wan_s2v_14b.get_config().dit.to_dict()
    del dit["framepack"]
    return {**dit, "ring_blocks": 5, "rematerialise": True}


def adam(num_steps: int, learning_rate: float, warmup_steps: int, **changes) -> dict:
    """A loop section with a constant learning rate after the warm-up."""
    return {
        "num_steps": num_steps,
        "learning_rate": learning_rate,
        "schedule": "constant",
        "warmup_steps": warmup_steps,
        "weight_decay": 0.01,
        **changes,
    }
