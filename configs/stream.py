"""Streaming: what the flags of `launch/stream.py` do not say.

    python launch/stream.py --mesh 5 --config.stream.aas_after_blocks=1

None keeps the value of the model folder. Noise levels, sampler, history (`cache`, `refresh`,
`refresh_sigma`) and `audio_context` are those of the model's training; others take
`--force_sampler`. Runs on a laptop CPU with the model that ships: 256x256 pixels at 25 frames
per second.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """Settings of a stream; see `jax_avatar.weights.settings.StreamSettings`."""
    return ConfigDict(
        {
            "stream": {
                "sigmas": placeholder(tuple),
                "sampler": placeholder(str),
                "cache": placeholder(str),
                "refresh": placeholder(str),
                "refresh_sigma": placeholder(float),
                "audio_context": placeholder(str),
                "aas_after_blocks": placeholder(int),
                "sink_distance": placeholder(tuple),
                "warmup_latents": placeholder(int),
                "decode_latents": placeholder(int),
            },
            "in_flight": 2,
        }
    )
