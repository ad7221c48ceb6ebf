"""The smallest networks that still have every part, for tests and benchmarks."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_avatar.models.conditions import Conditions
from jax_avatar.models.config import DiTConfig
from jax_avatar.models.dit import DiT
from jax_avatar.models.network import Network, flatten, unflatten
from jax_avatar.models.speech.mel import SpeechConfig
from jax_avatar.models.speech.wav2vec2 import Wav2Vec2Config
from jax_avatar.models.vae.anchored import AnchoredVAE, AnchoredVAEConfig
from jax_avatar.models.vae.light import LightVAEConfig
from jax_avatar.shapes import PyTree
from jax_avatar.weights.checkpoint_writer import ResumableCheckpointWriter
from jax_avatar.weights.files import save_json, save_weights
from jax_avatar.weights.kinds import KINDS

__all__ = [
    "ANCHORED",
    "GRID",
    "NANO",
    "make_anchored_vae",
    "make_audio",
    "make_conditions",
    "make_latents",
    "make_network",
    "save_model",
    "save_networks",
    "save_orbax",
]

NANO = DiTConfig(
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
    zero_init=False,
)
"""Size of the transformer."""

ANCHORED = AnchoredVAEConfig(
    curves=(
        *("jawOpen", "eyeBlinkLeft", "yaw", "pitch", "roll", "right", "down", "growth"),
        *("gaze_right", "gaze_down"),
    ),
    scale=(0.1, 0.1, 0.06, 0.04, 0.03, 0.013, 0.008, 0.004, 0.15, 0.08),
    leading=("jawOpen", "eyeBlinkLeft"),
    latent_shape=(2, 2, 4),
    feature_widths=(4, 4, 4, 4),
    code_width=4,
    flow_width=4,
    frame_width=4,
    face_width=4,
    encoder_widths=(4, 4, 4),
)
"""Size of the VAE that is anchored in the portrait."""

GRID = (8, 8)
"""Latent rows and columns: every pool of the motion packer has a token."""


def make_network(config: DiTConfig = NANO, seed: int = 0, kind: type[DiT] = DiT) -> Network:
    """A transformer of random weights, the head's included (it starts at zero)."""
    network = Network.of(kind(config, rngs=nnx.Rngs(seed)))
    kernel = network.params["head"]["kernel"]
    network.params["head"]["kernel"] = 0.1 * jax.random.normal(jax.random.key(seed), kernel.shape)
    return network


def make_anchored_vae(config: AnchoredVAEConfig = ANCHORED, seed: int = 0) -> Network:
    """Random networks, and a basis that turns heads and opens mouths; drawn without compiling."""
    rng, network = np.random.default_rng(seed), Network.abstract(AnchoredVAE, config)
    window = (4 * len(config.curves), config.latent_size)
    analysis = np.linalg.qr(rng.standard_normal(window))[0].astype(np.float32)
    given = {
        "basis/analysis": analysis,
        "basis/synthesis": analysis.T,
        "basis/head_weight": np.ones((64, 64), np.float32),
        "basis/camera": np.array([0.0, -0.4, 0.4, 5.0], np.float32),
    }
    spreads = {"basis/flow": 0.002, "portrait/surface/kernel": 0.05, "frame/out/kernel": 0.05}
    still = ("portrait/own/", "frame/coarse/", "frame/face_out/", "basis/")

    def draw(path, leaf):
        if path in given:
            return given[path]
        is_kernel = path.endswith("kernel") and not path.startswith(still)
        usual = np.sqrt(2 / np.prod(leaf.shape[:-1])) if is_kernel else 0.0
        return np.float32(spreads.get(path, usual)) * rng.standard_normal(leaf.shape, np.float32)

    drawn = {path: draw(path, leaf) for path, leaf in flatten(network.params).items()}
    return network.with_params(jax.device_put(unflatten(drawn)))


def make_conditions(config: DiTConfig = NANO, batch: int = 1, seed: int = 1) -> Conditions:
    """Random portrait, prompt and pose; motion where the network packs it."""
    keys = jax.random.split(jax.random.key(seed), 4)
    latent = (batch, 1, *GRID, config.latent_channels)
    motion = (batch, 19, *GRID, config.latent_channels)
    pose = (batch, config.frames_per_block, *GRID, config.pose_channels)
    return Conditions(
        text=jax.random.normal(keys[0], (batch, 2, config.text_width)),
        reference=jax.random.normal(keys[1], latent),
        motion=jax.random.normal(keys[2], motion) if config.framepack else None,
        pose=jax.random.normal(keys[3], pose),
    )


def make_audio(blocks: int, config: DiTConfig = NANO, speakers: int = 1, seed: int = 2):
    """Random speech features, one array per block."""
    frames = 4 * config.frames_per_block
    shape = (blocks, 1, speakers, frames, config.audio_layers, config.audio_width)
    return np.asarray(jax.random.normal(jax.random.key(seed), shape))


def make_latents(frames: int, config: DiTConfig = NANO, batch: int = 1, seed: int = 3):
    """Random latents of a clip."""
    shape = (batch, frames, *GRID, config.latent_channels)
    return jnp.asarray(jax.random.normal(jax.random.key(seed), shape))


def save_model(
    folder: str | Path,
    *,
    name: str = "nano",
    speech: str = "mel",
    vae: str = "light",
    framepack: bool = False,
    **stream: Any,
) -> Path:
    """Writes a model folder of random nano networks.

    Args:
        folder: where to.
        name: of the model.
        speech: kind of its front end; "wav2vec2" makes 25 frames per second, "mel" 16.
        vae: its kind: "light", with pixels as `GRID` says, or "anchored", with 128 a side.
        framepack: the transformer has the motion packer.
        **stream: settings other than these.
    """
    if speech == "wav2vec2":
        front_end = Wav2Vec2Config(
            width=6, num_layers=1, num_heads=2, ffn_width=8, conv_widths=(4,) * 7,
            position_kernel=16, position_groups=2, look_back_s=0.96,
        )  # fmt: skip
    else:
        front_end = SpeechConfig(bands=8, width=6, dilations=(1,))
    light = LightVAEConfig(
        z_dim=4, latent_width=8, frame_width=8, stem_width=8, latent_blocks=1, frame_blocks=1
    )
    settings = {
        "fps": front_end.fps,
        "size": [8 * GRID[0], 8 * GRID[1]],
        "sigmas": [1.0, 0.75, 0.5, 0.25, 0.0],
        "aas_after_blocks": 4,
        "sink_distance": [16, 16],
        "pose": "reference",
        "warmup_latents": 2,
    }
    if vae == "anchored":
        settings |= {"size": [128, 128], "pose": "zeros", "warmup_latents": 1}
    dit = make_network(NANO.replace(framepack=framepack))
    config = ANCHORED if vae == "anchored" else light
    return save_networks(folder, name, dit, front_end, config, settings | stream)


def save_networks(
    folder: str | Path,
    name: str,
    dit: Network,
    speech: SpeechConfig | Wav2Vec2Config,
    vae: LightVAEConfig | AnchoredVAEConfig,
    stream: dict[str, Any],
    *,
    kind: str = "wan_s2v",
) -> Path:
    """Writes a model folder in float32; speech encoder and VAE get random weights.

    Args:
        folder: where to.
        name: of the model.
        dit: the transformer.
        speech: size of the speech encoder.
        vae: size of the VAE.
        stream: settings of streaming.
        kind: of the transformer.
    """

    def save(part, config, params):
        fields = dataclasses.asdict(config)
        fields |= {key: "float32" for key in ("dtype", "param_dtype") if key in fields}
        save_weights(folder, part, params, fields)

    def draw(network, config, seed):
        if network is AnchoredVAE:
            return make_anchored_vae(config)
        return Network.of(jax.jit(lambda: network(config, rngs=nnx.Rngs(seed)))())

    kinds = {"dit": kind}
    save("dit", dit.config, dit.params)
    for part, config, seed in (("vae", vae, 5), ("speech", speech, 6)):
        known = {k.config: (name, k.network) for name, k in KINDS[part].items()}
        kinds[part], network = known[type(config)]
        save(part, config, draw(network, config, seed).params)
    folder = Path(folder)
    save_json(folder / "config.json", {"name": name, **kinds, "stream": stream})
    return folder


def save_orbax(
    folder: str | Path,
    params: PyTree,
    config: dict[str, Any],
    metadata: dict[str, Any] | None = None,
) -> None:
    """Writes a network's weights to an Orbax folder, as a conversion does.

    Args:
        folder: where to.
        params: of the network.
        config: fields of its config.
        metadata: of the checkpoint.
    """
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    writer = ResumableCheckpointWriter(folder, leaves, config, metadata or {})
    writer.write("all", {(path, ()): leaf for path, leaf in leaves.items()})
    writer.finish()
