"""Networks that can be converted, recognised by the names of their tensors.

files of a download --open--> official name -> array --table--> our flat path -> array
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conversion import umt5, wan_dit, wan_vae, wav2vec2
from conversion.readers import is_shard, open_weights, read_index
from conversion.rules import Table, infer_leaves
from jax_avatar.models.config import DiTConfig, UMT5Config, WanVAEConfig
from jax_avatar.models.network import Network, flatten
from jax_avatar.models.speech.wav2vec2 import Wav2Vec2Config
from jax_avatar.weights.files import load_json
from jax_avatar.weights.kinds import KINDS
from jax_avatar.weights.whole_file import BrokenFile, unfinished_downloads

__all__ = [
    "NETWORKS",
    "NetworkKind",
    "Shapes",
    "find_weights",
    "identify",
    "recognise",
    "weight_files",
]

Shapes = Mapping[str, tuple[int, ...]]
"""Name of a tensor -> its shape."""


@dataclass(frozen=True)
class NetworkKind:
    """Recognition, reading and layout of one kind of network.

    Attributes:
        name: on the command line.
        part: its place in a model folder.
        kind: what `config.json` of the model folder calls it.
        licence: of the published weights, as their page states it.
        marks: endings of tensor names, one of which every such file has.
        config: (file, name -> shape) -> config of the network.
        table: config -> rules.
        official_names: (names, config) -> official name -> name in the file, for networks that
            are published in more than one spelling.
    """

    name: str
    part: str
    kind: str
    licence: str
    marks: tuple[str, ...]
    config: Callable[[Path, Shapes], Any]
    table: Callable[[Any], Table]
    official_names: Callable[[Mapping[str, str], Any], dict[str, str]] | None = None

    @property
    def config_class(self) -> type:
        """The dataclass that `config` returns."""
        return LoraConfig if self.part == "lora" else KINDS[self.part][self.kind].config

    def leaves(self, config: Any, shapes: Shapes) -> dict[str, Any]:
        """Our flat path -> shape and type.

        Args:
            config: of the network.
            shapes: official name -> shape.
        """
        if self.part == "lora":
            # A LoRA does not tell the size of its transformer; that is checked when they meet.
            return infer_leaves(shapes, wan_dit.LORA_TABLE)
        return flatten(Network.abstract(KINDS[self.part][self.kind].network, config).params)

    def open(self, path: Path) -> tuple[Mapping[str, np.ndarray], Any]:
        """Weights under their official names, and the network's config."""
        weights = open_weights(path)
        config = self.config(path, weights.shapes)
        if self.official_names:
            weights = _Renamed(weights, self.names(weights.shapes, config))
        return weights, config

    def names(self, shapes: Shapes, config: Any) -> dict[str, str]:
        """Official name -> name in the file."""
        there = {name: name for name in shapes}
        return self.official_names(there, config) if self.official_names else there


class _Renamed(Mapping):
    """A lazy mapping of weights under other names.

    Attributes:
        spelling: name here -> name in the file, where they differ.
    """

    def __init__(self, weights, names: Mapping[str, str]):
        self._weights, self._names, self.files = weights, dict(names), weights.files
        self.spelling = {new: old for new, old in names.items() if new != old}
        self.shapes = {new: weights.shapes[old] for new, old in names.items()}
        self.dtypes = {new: weights.dtypes[old] for new, old in names.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._weights[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def identify(shapes: Shapes) -> NetworkKind | None:
    """The network whose tensors these are, or None."""
    for kind in NETWORKS.values():
        if any(name.endswith(kind.marks) for name in shapes):
            return kind
    return None


def weight_files(folder: Path, *, below: bool = False) -> list[Path]:
    """Files of a download that may hold weights: whole ones, and the indices of sharded ones.

    Args:
        folder: to look in.
        below: whether to look in its subfolders too.
    """
    folders = [folder]
    if below:
        folders += sorted(path for path in folder.rglob("*") if path.is_dir())
    found = []
    for place in folders:
        indices = sorted(place.glob("*.safetensors.index.json"))
        single = sorted(place.glob("*.safetensors"))
        try:
            shards = {shard for index in indices for shard in read_index(index).values()}
            single = [path for path in single if path.name not in shards]
        except BrokenFile:  # the index stays in the list and is reported when it is opened
            single = [path for path in single if not is_shard(path)]
        torch = [
            path for ending in ("pth", "pt", "bin") for path in sorted(place.glob(f"*.{ending}"))
        ]
        found += [*indices, *single, *torch]
    return found


def recognise(path: Path) -> tuple[NetworkKind | None, str]:
    """The network in a file, or None and why not; downloads hold other files too.

    Raises:
        BrokenFile: the file is not whole, so that it cannot be recognised.
    """
    try:
        kind = identify(open_weights(path).shapes)
    except BrokenFile:
        raise
    except (ValueError, OSError) as error:
        return None, str(error)
    return kind, "" if kind else "unknown tensors"


def find_weights(kind: NetworkKind, source: str | Path) -> Path:
    """Path of the network's weights file in a downloaded folder, or the given file.

    Safetensors are preferred where a folder has both.

    Raises:
        ValueError: there is none, or several equally good ones; the message lists what is there.
        BrokenFile: there is none, and a file of the folder is not whole.
    """
    source = Path(source)
    if source.is_file():
        return source
    if not source.is_dir():
        raise ValueError(f"--src {source}: no such file or folder.")
    there, broken = {}, []
    for path in weight_files(source):
        try:
            there[path] = recognise(path)
        except BrokenFile as error:
            broken.append(error)
    found = [path for path, (what, _) in there.items() if what is kind]
    safe = [path for path in found if ".safetensors" in path.name]
    found = safe or found
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"--src {source} holds {len(found)} files of {kind.name}: "
            f"{[path.name for path in found]}; name the one to convert."
        )
    if broken:
        raise BrokenFile("\n".join(map(str, broken)))
    seen = [
        f"{path.name} ({what.name if what else problem})" for path, (what, problem) in there.items()
    ]
    seen += [f"{path.name} (unfinished)" for path in unfinished_downloads(source)]
    raise ValueError(
        f"--src {source} holds no weights of {kind.name}; found: "
        f"{', '.join(seen) or 'no weights'}. Is the download complete?"
    )


def _dit_config(path: Path, shapes: Shapes) -> DiTConfig:
    beside = path.parent / "config.json"
    if not beside.is_file():
        raise ValueError(
            f"{beside} is missing; it holds the size of the transformer and belongs to the "
            "download of Wan2.2-S2V-14B."
        )
    # Compute in bfloat16 and round the rotary factors as the released model does.
    return wan_dit.config_from_official(
        load_json(beside), dtype="bfloat16", param_dtype="bfloat16", half_rotary=True
    )


def _text_config(path: Path, shapes: Shapes) -> UMT5Config:
    types = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
    beside = path.parent / "config.json"
    if beside.is_file() and load_json(beside).get("model_type") == "umt5":  # transformers' naming
        return umt5.config_from(load_json(beside), **types)
    return umt5.config_from_shapes(umt5.official_names(shapes), **types)


def _vae_config(path: Path, shapes: Shapes) -> WanVAEConfig:
    beside = path.parent / "config.json"
    if "quant_conv.weight" in shapes and beside.is_file():  # diffusers' naming
        return wan_vae.config_from(load_json(beside))
    return wan_vae.config_from_shapes(shapes)


def _speech_config(path: Path, shapes: Shapes) -> Wav2Vec2Config:
    beside = path.parent / "config.json"
    if beside.is_file():
        return wav2vec2.config_from(load_json(beside))
    return wav2vec2.config_from_shapes(wav2vec2.official_names(shapes))


@dataclass(frozen=True)
class LoraConfig:
    """Size of an adapter.

    Attributes:
        rank: of the factors.
        scaling: alpha over rank; the file does not tell it.
    """

    rank: int
    scaling: float = wan_dit.SCALING


def _lora_config(path: Path, shapes: Shapes) -> LoraConfig:
    ranks = {shape[0] for name, shape in shapes.items() if ".lora_A." in name}
    if len(ranks) != 1:
        raise ValueError(
            f"{path} has factors lora_A of ranks {sorted(ranks)}; a LoRA of one rank is expected."
        )
    return LoraConfig(ranks.pop())


NETWORKS = {
    kind.name: kind
    for kind in (
        NetworkKind(
            "live_avatar",
            "lora",
            "lora",
            "see the page of the download (Live Avatar)",
            (".lora_A.weight", ".lora_A.default.weight"),
            _lora_config,
            lambda config: wan_dit.LORA_TABLE,
            lambda names, config: {wan_dit.plain_lora_name(n): old for n, old in names.items()},
        ),
        NetworkKind(
            "wan_s2v",
            "dit",
            "wan_s2v",
            "Apache-2.0 (Wan2.2-S2V-14B)",
            ("casual_audio_encoder.weights", "audio_injector.injector.0.q.weight"),
            _dit_config,
            lambda config: wan_dit.TABLE,
        ),
        NetworkKind(
            "vae",
            "vae",
            "wan",
            "Apache-2.0 (Wan 2.1)",
            ("decoder.conv1.weight", "post_quant_conv.weight"),
            _vae_config,
            lambda config: wan_vae.TABLE,
            lambda names, config: wan_vae.official_names(names, config.num_res_blocks),
        ),
        NetworkKind(
            "umt5",
            "text",
            "umt5",
            "Apache-2.0 (google/umt5-xxl)",
            ("pos_embedding.embedding.weight", "SelfAttention.relative_attention_bias.weight"),
            _text_config,
            lambda config: umt5.TABLE,
            lambda names, config: umt5.official_names(names),
        ),
        NetworkKind(
            "wav2vec2",
            "speech",
            "wav2vec2",
            "Apache-2.0 (wav2vec2-large-xlsr-53-english)",
            ("encoder.pos_conv_embed.conv.bias",),
            _speech_config,
            lambda config: wav2vec2.TABLE,
            lambda names, config: wav2vec2.official_names(names),
        ),
    )
}
"""Command-line name -> network; a new one is added here."""
