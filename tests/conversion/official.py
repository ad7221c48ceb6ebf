"""Tiny downloads with the official names, made of the golden files; shared by the tests."""

import json
from pathlib import Path

import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from conversion import wav2vec2
from conversion.readers import SafetensorsFile
from conversion.rules import export
from conversion.wan_dit import LORA_TABLE, config_from_official
from jax_avatar.models.dit import DiT
from jax_avatar.models.lora import adapter_leaves
from jax_avatar.models.network import Network, flatten, unflatten
from jax_avatar.models.speech.wav2vec2 import Wav2Vec2, Wav2Vec2Config

GOLDEN = Path(__file__).parents[1] / "golden"
INFO = json.loads((GOLDEN / "dit" / "cfgA.json").read_text())


def dit_weights() -> dict[str, np.ndarray]:
    file = SafetensorsFile(GOLDEN / "dit" / "cfgA.safetensors")
    return {name[3:]: np.array(file[name]) for name in file if name.startswith("sd.")}


def vae_weights() -> dict[str, np.ndarray]:
    file = SafetensorsFile(GOLDEN / "vae" / "vae_a_weights.safetensors")
    return {name[3:]: np.array(file[name]) for name in file if name.startswith("sd.")}


def text_weights() -> dict[str, np.ndarray]:
    file = SafetensorsFile(GOLDEN / "text" / "umt5_b_weights.safetensors")
    return {name[3:]: np.array(file[name]) for name in file if name.startswith("sd.")}


def speech_weights() -> dict[str, np.ndarray]:
    file = SafetensorsFile(GOLDEN / "audio" / "w2v_b_weights.safetensors")
    return {name[3:]: np.array(file[name]) for name in file if name.startswith("sd.")}


def write_speech(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(speech_weights(), folder / "model.safetensors")
    file = SafetensorsFile(GOLDEN / "audio" / "w2v_b_weights.safetensors")
    (folder / "config.json").write_text(file.metadata["config"])
    return folder


def dit_leaves():
    config = config_from_official(INFO["model_config"])
    return flatten(Network.abstract(DiT, config).params)


def lora_weights(rank: int = 2) -> dict[str, np.ndarray]:
    leaves = adapter_leaves(unflatten(dit_leaves()), rank)
    draw = np.random.default_rng(0).normal
    ours = {path: draw(size=leaf.shape).astype(np.float32) for path, leaf in leaves.items()}
    named = export(ours, LORA_TABLE)
    return {name.replace(".weight", ".default.weight"): array for name, array in named.items()}


def write_dit(folder: Path, weights=None, shards: int = 3) -> Path:
    """A sharded transformer with its index and config."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = dit_weights() if weights is None else weights
    names, places = sorted(weights), {}
    for i in range(shards):
        file = f"diffusion_pytorch_model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name] for name in names[i::shards]}
        save_file(part, folder / file)
        places |= dict.fromkeys(part, file)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps(INFO["model_config"]))
    return folder


def write_all(root: Path) -> Path:
    """Everything that two downloads hold, in sizes that fit together."""
    folder = write_dit(root / "Wan2.2-S2V-14B")
    save_file(vae_weights(), folder / "Wan2.1_VAE.safetensors")
    save_file(text_weights(), folder / "models_t5_umt5-xxl-enc-bf16.safetensors")
    speech = folder / "wav2vec2-large-xlsr-53-english"
    speech.mkdir()
    audio = INFO["model_config"]["audio_dim"]
    config = Wav2Vec2Config(
        width=audio, num_heads=2, ffn_width=32, conv_widths=(8,) * 7, position_groups=4
    )
    weights = export(flatten(Network.of(Wav2Vec2(config, rngs=nnx.Rngs(0))).params), wav2vec2.TABLE)
    save_file({n: np.array(array) for n, array in weights.items()}, speech / "model.safetensors")
    fields = {
        "hidden_size": audio, "num_hidden_layers": 24, "num_attention_heads": 2,
        "intermediate_size": 32, "conv_dim": [8] * 7, "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
        "conv_stride": [5, 2, 2, 2, 2, 2, 2], "num_conv_pos_embeddings": 128,
        "num_conv_pos_embedding_groups": 4,
    }  # fmt: skip
    (speech / "config.json").write_text(json.dumps(fields))
    (root / "LiveAvatar").mkdir()
    save_file(lora_weights(), root / "LiveAvatar" / "liveavatar.safetensors")
    return root
