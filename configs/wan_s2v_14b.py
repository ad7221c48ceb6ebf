"""The official size: Wan2.2-S2V-14B with the Live Avatar LoRA merged into it.

    python launch/plan.py --model wan_s2v_14b --mesh 5 --hardware h200

Sizes, no weights. Five devices of 80 GB or more stream it at 25 frames per second in the
release (four denoise, one decodes); `docs/weights.md` says what fits where. The release's sizes,
720*400 and 704*384, both give 384x704 pixels (or 704x384), since sides snap to multiples of 64.
48 frames per clip of the release are 4 blocks of 3 latents, the length of the window.
"""

from ml_collections import ConfigDict

from jax_avatar.models.config import WanVAEConfig, umt5_xxl, wan_s2v_14b
from jax_avatar.models.speech.wav2vec2 import xlsr53_large
from jax_avatar.weights.fields import plain_fields
from jax_avatar.weights.settings import LIVE_AVATAR

# Fields that do not belong to the published size: plans and runs choose them.
_CHOSEN = {"weights", "adapter_rank", "adapter_scaling", "attention", "unroll", "rematerialise"}


def get_config() -> ConfigDict:
    """Sizes of the networks and how they are streamed, as plain values."""
    dit = plain_fields(wan_s2v_14b(half_rotary=True))
    vae = WanVAEConfig(dtype="bfloat16", param_dtype="bfloat16")
    return ConfigDict(
        {
            "name": "wan_s2v_14b",
            "kinds": {"dit": "wan_s2v", "vae": "wan", "speech": "wav2vec2", "text": "umt5"},
            "dit": {name: value for name, value in dit.items() if name not in _CHOSEN},
            "vae": plain_fields(vae),
            "speech": plain_fields(xlsr53_large()),
            "text": plain_fields(umt5_xxl()),
            "stream": plain_fields(LIVE_AVATAR),
        }
    )
