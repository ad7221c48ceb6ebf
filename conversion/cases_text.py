"""Golden cases of the prompt encoder and of the cleaning of prompts.

A case is `<stem>_weights.safetensors` and `<stem>_io.safetensors`, the official constructor
arguments in the metadata key `config`. Cleaning examples are a JSON list of objects with `in` and
`out`.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conversion.cases import Case, Check, compare, weight_pairs
from conversion.readers import SafetensorsFile
from conversion.rules import convert
from conversion.umt5 import TABLE, config_from, official_names
from jax_avatar.io.prompt import clean_prompt
from jax_avatar.models.config import UMT5Config
from jax_avatar.models.network import Network, flatten, unflatten
from jax_avatar.models.tap import record
from jax_avatar.models.text import UMT5Encoder, position_buckets
from jax_avatar.streaming.prompts import encode_tokens

__all__ = ["PromptCleaning", "TextCases"]

_TOLERANCE = 1e-4
_BIAS_TOLERANCE = 1e-6
_BFLOAT16_TOLERANCES = {"max": 0.1, "mean": 0.02}
_INPUTS = ("ids", "mask", "rel_pos")


class TextCases:
    """States of prompts against the official class's numbers."""

    name = "text"

    def find(self, files: Sequence[Path]) -> list[Case]:
        """Pairs of weights and inputs/outputs whose config is that of a T5 encoder."""
        return weight_pairs(files, {"dim_attn", "num_buckets"})

    def run(self, case: Case) -> Iterable[Check]:
        """Every tensor of the case, or a failing check for one it does not know."""
        weights, io = (SafetensorsFile(path) for path in case.files)
        config = config_from(json.loads(weights.metadata["config"]))
        target = Network.abstract(UMT5Encoder, config).params
        source = official_names({name.removeprefix("sd."): weights[name] for name in weights})
        params, report = convert(source, TABLE, flatten(target))
        yield Check("weights", 0.0, 0.0, str(report))
        yield from _outputs(_Results(config, unflatten(params), io), io)


class PromptCleaning:
    """Pairs of prompts, as written and as cleaned."""

    name = "prompt cleaning"

    def find(self, files: Sequence[Path]) -> list[Case]:
        """JSON lists of objects with `in` and `out`."""
        cases = []
        for path in files:
            if path.suffix == ".json":
                pairs = json.loads(path.read_text())
                if isinstance(pairs, list) and pairs and all(map(_is_pair, pairs)):
                    cases.append(Case(path.stem, (path,), pairs))
        return cases

    def run(self, case: Case) -> Iterable[Check]:
        """Exact."""
        for number, pair in enumerate(case.data):
            cleaned = clean_prompt(pair["in"])
            is_same = cleaned == pair["out"]
            note = "" if is_same else f"{cleaned!r}, expected {pair['out']!r}"
            name = pair.get("name", f"example {number}")
            yield Check(name, 0.0 if is_same else np.inf, 0.0, note)


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, dict) and {"in", "out"} <= set(entry)


class _Results:
    """Our outputs for the inputs of a case, each computed on first access."""

    def __init__(self, config: UMT5Config, params: Any, io: SafetensorsFile):
        self.config, self.params = config, params
        self.encoder = _encoder(config, params)
        self.ids, self.mask = np.array(io["ids"]), np.array(io["mask"])
        self.lengths = self.mask.sum(axis=1)
        if (self.mask != (np.arange(self.mask.shape[1]) < self.lengths[:, None])).any():
            raise ValueError("mask has gaps; prompts are expected to be padded at their ends.")

    @cached_property
    def states(self) -> np.ndarray:
        """Through the scan over layers, as in production."""
        return self._run(self.encoder)

    @cached_property
    def states_bfloat16(self) -> np.ndarray:
        config = self.config.replace(dtype="bfloat16", param_dtype="bfloat16")
        return self._run(_encoder(config, self.params)).astype(np.float32)

    @cached_property
    def layers(self) -> dict[str, np.ndarray]:
        with record() as taps:
            self._run(self.encoder)
        return {name: np.asarray(value) for name, value in taps.items()}

    @cached_property
    def contexts(self) -> list[np.ndarray]:
        """Streaming form: each prompt alone, padded to its length in the stream."""
        encoder = Network.of(self.encoder)
        prompts = zip(self.ids, self.lengths, strict=True)
        return [np.asarray(encode_tokens(encoder, ids[:n]))[0] for ids, n in prompts]

    @cached_property
    def padded(self) -> np.ndarray:
        """The contexts with zeros behind them, as the transformer pads them."""
        padded = np.zeros((*self.ids.shape, self.config.width), np.float32)
        for row, context in zip(padded, self.contexts, strict=True):
            row[: len(context)] = context
        return padded

    def _run(self, encoder: UMT5Encoder) -> np.ndarray:
        return np.asarray(encoder(jnp.asarray(self.ids), jnp.asarray(self.mask)))


def _encoder(config: UMT5Config, params: Any) -> UMT5Encoder:
    network = Network.abstract(UMT5Encoder, config)
    cast = jax.tree.map(lambda leaf, like: jnp.asarray(leaf, like.dtype), params, network.params)
    return network.bind(cast)


def _outputs(results: _Results, io: SafetensorsFile) -> Iterator[Check]:
    config = results.config
    for name in io:
        if name == "seq_lens":
            yield compare(name, results.lengths, io[name], 0.0)
        elif name == "rel_bucket":
            buckets = position_buckets(
                np.array(io["rel_pos"]), config.num_buckets, config.max_distance
            )
            yield compare(name, buckets, io[name], 0.0)
        elif found := re.fullmatch(r"pos_bias_block(\d+)_L(\d+)", name):
            bias = results.encoder.position_bias(int(found[1]), int(found[2]))
            yield compare(name, bias, io[name], _BIAS_TOLERANCE)
        elif re.fullmatch(r"block\d+_out", name) and name in results.layers:
            yield compare(name, results.layers[name], io[name], _TOLERANCE)
        elif name == "out_full":
            yield compare(name, results.states, io[name], _TOLERANCE)
        elif name == "out_full_bf16_model":
            yield from _bfloat16(name, results, io[name])
        elif found := re.fullmatch(r"prompt(\d+)\.context", name):
            yield compare(name, results.contexts[int(found[1])], io[name], _TOLERANCE)
        elif name == "context_zero_padded":
            yield compare(name, results.padded, io[name], _TOLERANCE)
            is_padding = results.mask == 0
            yield compare(
                f"{name} (padding)", results.padded[is_padding], io[name][is_padding], 0.0
            )
        elif name not in _INPUTS:
            yield Check(name, np.inf, _TOLERANCE, "unknown tensor")


def _bfloat16(name: str, results: _Results, expected: np.ndarray) -> Iterator[Check]:
    """Roundings differ, so that the worst and the mean error at real tokens are judged."""
    is_token = results.mask > 0
    error = np.abs(results.states_bfloat16 - expected)[is_token]
    for kind, tolerance in _BFLOAT16_TOLERANCES.items():
        yield Check(f"{name} ({kind})", float(getattr(error, kind)()), tolerance)
