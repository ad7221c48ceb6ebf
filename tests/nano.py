"""The smallest networks that still have every part; shared by the tests."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_avatar.models.config import DiTConfig
from jax_avatar.models.dit import DiT
from jax_avatar.models.params import split
from jax_avatar.streaming.plan import Conditions

CONFIG = DiTConfig(
    width=24,
    ffn_width=32,
    num_heads=2,
    num_layers=2,
    freq_width=8,
    text_width=4,
    text_len=3,
    latent_channels=4,
    pose_channels=4,
    audio_width=6,
    audio_layers=2,
    num_audio_tokens=2,
    audio_inject_layers=(0,),
    zero_init=False,
)
GRID = (8, 8)  # latent rows and columns: every pool of the motion packer has a token


def make_dit(config: DiTConfig = CONFIG, seed: int = 0):
    """Structure and random weights, the head's included (it starts at zero)."""
    graphdef, params = split(DiT(config, rngs=nnx.Rngs(seed)))
    kernel = params["head"]["kernel"]
    params["head"]["kernel"] = 0.1 * jax.random.normal(jax.random.key(seed), kernel.shape)
    return graphdef, params


def make_conditions(config: DiTConfig = CONFIG, batch: int = 1, seed: int = 1) -> Conditions:
    """Random portrait, prompt and pose; motion where the network packs it."""
    keys = jax.random.split(jax.random.key(seed), 4)
    latent = (batch, 1, *GRID, config.latent_channels)
    motion = (batch, 19, *GRID, config.latent_channels)
    pose = (batch, config.frames_per_block, *GRID, config.pose_channels)
    return Conditions(
        jax.random.normal(keys[0], (batch, 2, config.text_width)),
        jax.random.normal(keys[1], latent),
        jax.random.normal(keys[2], motion) if config.framepack else None,
        jax.random.normal(keys[3], pose),
    )


def make_audio(blocks: int, config: DiTConfig = CONFIG, speakers: int = 1, seed: int = 2):
    """Random speech features, one array per block."""
    frames = 4 * config.frames_per_block
    shape = (blocks, 1, speakers, frames, config.audio_layers, config.audio_width)
    return np.asarray(jax.random.normal(jax.random.key(seed), shape))


def make_latents(frames: int, config: DiTConfig = CONFIG, batch: int = 1, seed: int = 3):
    """Random latents of a clip."""
    shape = (batch, frames, *GRID, config.latent_channels)
    return jnp.asarray(jax.random.normal(jax.random.key(seed), shape))


def save_model(folder, *, name="nano", **stream):
    """Writes a model folder of random nano networks, 16x16... pixels as `GRID` says."""
    import dataclasses

    from jax_avatar.io.checkpoint import save_json, save_weights
    from jax_avatar.models.audio import SpeechConfig, SpeechEncoder
    from jax_avatar.models.light_vae import LightVAE, LightVAEConfig

    speech = SpeechConfig(bands=8, width=6, dilations=(1,))
    vae = LightVAEConfig(
        z_dim=4, latent_width=8, frame_width=8, stem_width=8, latent_blocks=1, frame_blocks=1
    )
    config = CONFIG.replace(framepack=False)
    fields = dataclasses.asdict(config) | {"dtype": "float32", "param_dtype": "float32"}
    _, params = make_dit(config)
    save_weights(folder, "dit", params, fields)
    _, params = split(LightVAE(vae, rngs=nnx.Rngs(5)))
    save_weights(folder, "vae", params, dataclasses.asdict(vae))
    _, params = split(SpeechEncoder(speech, rngs=nnx.Rngs(6)))
    save_weights(folder, "speech", params, dataclasses.asdict(speech))
    settings = {
        "fps": 16,
        "size": [8 * GRID[0], 8 * GRID[1]],
        "sigmas": [1.0, 0.75, 0.5, 0.25, 0.0],
        "aas_after_blocks": 4,
        "sink_distance": [16, 16],
        "pose": "reference",
        "warmup_latents": 2,
    }
    kinds = {"name": name, "dit": "wan_s2v", "vae": "light", "speech": "mel"}
    save_json(folder / "config.json", kinds | {"stream": settings | stream})
    return folder
