"""Golden cases of wav2vec 2.0, of the change to video rate, and of what comes before.

A model is `<stem>_weights.safetensors` and `<stem>_io.safetensors` with the `config.json` of the
checkpoint in the metadata key `config`; its waves are `w<i>`. Resampled and picked features are
`<name>.in` and `<name>.out`, exact indices a JSON list.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from conversion.cases import Case, Check, compare, weight_pairs
from conversion.readers import SafetensorsFile
from conversion.rules import conv, convert
from conversion.wav2vec2 import TABLE, config_from, official_names
from jax_avatar.io.audio import PcmReader
from jax_avatar.models.network import Network, flatten, unflatten
from jax_avatar.models.speech.feature_rate import (
    bucket_indices,
    context_indices,
    pick_frames,
    to_30hz,
)
from jax_avatar.models.speech.wav2vec2 import Wav2Vec2, normalise
from jax_avatar.models.tap import record

__all__ = ["AudioFrontEndCases", "BucketCases", "BucketTables", "Wav2Vec2Cases"]

_TOLERANCE = 1e-4
_WAVE_TOLERANCE = 1e-5
_RATE_TOLERANCE = 1e-6
# Rates of the case that does not name its own.
_SINGLE_LAYER = (25, 48)


class Wav2Vec2Cases:
    """A small official model, from waves to features per video frame."""

    name = "wav2vec2"

    def find(self, files: Sequence[Path]) -> list[Case]:
        """Pairs of weights and inputs/outputs whose config has a convolutional extractor."""
        return weight_pairs(files, {"conv_dim", "num_conv_pos_embeddings"})

    def run(self, case: Case) -> Iterable[Check]:
        """Every tensor of the case, or a failing check for one it does not know."""
        weights, file = (SafetensorsFile(path) for path in case.files)
        config = config_from(json.loads(weights.metadata["config"]))
        network = Network.abstract(Wav2Vec2, config)
        target = network.params
        source = official_names({name.removeprefix("sd."): weights[name] for name in weights})
        params, report = convert(source, TABLE, flatten(target))
        yield Check("weights", 0.0, 0.0, str(report))
        yield from _outputs(network.bind(unflatten(params)), file)


class BucketCases:
    """Features at 50 Hz -> 30 Hz, and at 30 Hz -> video rate."""

    name = "feature rate"
    _names = r"(c\d+|single_layer|interp\d+)\.(in|out|params_n_fps_bf_m_nr)"

    def find(self, files: Sequence[Path]) -> list[Case]:
        """Files with nothing but such pairs."""
        return _named(files, self._names)

    def run(self, case: Case) -> Iterable[Check]:
        """Interpolation within rounding, picking exact."""
        file = SafetensorsFile(case.files[0])
        for name in file:
            stem, _, part = name.partition(".")
            if part == "in" and f"{stem}.out" not in file:
                yield Check(name, np.inf, 0.0, f"no {stem}.out")
            if part != "out":
                continue
            source, expected = file[f"{stem}.in"], file[name]
            if stem.startswith("interp"):
                yield compare(name, to_30hz(source), expected, _RATE_TOLERANCE)
            elif stem == "single_layer":
                picked, _ = _bucketed(source, *_SINGLE_LAYER, context=0)
                yield compare(name, picked[:, 0], expected, 0.0)
            else:
                frames, fps, clip, context, clips = file[f"{stem}.params_n_fps_bf_m_nr"].tolist()
                picked, made = _bucketed(source[:, :frames], fps, clip, context)
                yield compare(f"{stem}.clips", made, clips, 0.0)
                yield compare(name, picked, expected, 0.0)


class BucketTables:
    """Indices of `get_audio_embed_bucket_fps`, exact."""

    name = "bucket index"
    _keys = frozenset({"audio_frames", "fps", "batch_frames", "m", "index"})

    def find(self, files: Sequence[Path]) -> list[Case]:
        """JSON lists of such objects."""
        cases = []
        for path in files:
            rows = json.loads(path.read_text()) if path.suffix == ".json" else None
            if isinstance(rows, list) and rows and all(self._is_row(row) for row in rows):
                cases.append(Case(path.stem, (path,), rows))
        return cases

    def _is_row(self, row: Any) -> bool:
        return isinstance(row, dict) and self._keys <= set(row)

    def run(self, case: Case) -> Iterable[Check]:
        """One check per row."""
        for row in case.data:
            frames, fps, clip, context = (
                row[key] for key in ("audio_frames", "fps", "batch_frames", "m")
            )
            index = context_indices(bucket_indices(frames, fps, clip), frames, fps, context)
            actual = [len(index), len(index) // clip, *index.ravel()]
            wanted = [row["num_out"], row["num_batches"], *np.ravel(row["index"])]
            yield compare(f"{frames} frames, {fps} fps, {clip}, {context}", actual, wanted, 0.0)


class AudioFrontEndCases:
    """Normalisation of waves, and resampling of files."""

    name = "waveform"
    _resample = r"resample\.(?:in_pcm16_(\d+)_stereo|out_(\d+)_mono)"
    _names = rf"(n\d+|silence)\.(in|out)|{_resample}"

    def find(self, files: Sequence[Path]) -> list[Case]:
        """Files with nothing but such pairs."""
        return _named(files, self._names)

    def run(self, case: Case) -> Iterable[Check]:
        """One check per output."""
        file = SafetensorsFile(case.files[0])
        rates = {name: found for name in file if (found := re.fullmatch(self._resample, name))}
        inputs = [(name, int(found[1])) for name, found in rates.items() if found[1]]
        for name in file:
            stem, _, part = name.partition(".")
            if name in rates and (rate := rates[name][2]):
                (source, input_rate), expected = inputs[0], file[name]
                resampled = _read_pcm(file[source], input_rate, int(rate))[: len(expected)]
                yield compare(name, resampled, expected, _WAVE_TOLERANCE)
            elif part == "out":
                normed = normalise(jnp.asarray(file[f"{stem}.in"]))
                yield compare(name, normed, file[name], _WAVE_TOLERANCE)


def _named(files: Sequence[Path], pattern: str) -> list[Case]:
    """Weight files all of whose tensors have names of one kind."""
    tensors = {path: SafetensorsFile(path) for path in files if path.suffix == ".safetensors"}
    return [
        Case(path.stem, (path,))
        for path, file in tensors.items()
        if len(file) and all(re.fullmatch(pattern, name) for name in file)
    ]


def _bucketed(features: np.ndarray, fps: int, clip: int, context: int) -> tuple[np.ndarray, int]:
    """Features `[T l c]` per video frame, neighbours side by side, and the number of clips."""
    frames = features.shape[1]
    index = context_indices(bucket_indices(frames, fps, clip), frames, fps, context)
    picked = [pick_frames(features, column) for column in index.T]
    return np.moveaxis(np.concatenate(picked, axis=-1), 0, 1), len(index) // clip


def _read_pcm(pcm: np.ndarray, input_rate: int, rate: int) -> np.ndarray:
    """Interleaved 16-bit samples through the reader that streams use."""
    stream = io.BytesIO(pcm.astype("<i2").tobytes())
    reader = PcmReader(stream, rate, input_rate=input_rate, channels=pcm.shape[1])
    return np.concatenate(list(reader))


class _Results:
    """Our outputs for one wave, each computed on first access."""

    def __init__(self, model: Wav2Vec2, wave: np.ndarray):
        self.model, self.wave = model, jnp.asarray(wave)[None]

    @cached_property
    def input_values(self) -> Any:
        return normalise(self.wave)

    @cached_property
    def _run(self) -> tuple[np.ndarray, Mapping[str, Any]]:
        structure, state = nnx.split(self.model)

        def run(state, wave):
            with record() as taps:
                return nnx.merge(structure, state).hidden_states(wave), taps

        # Each length runs once, so compiling fast matters more than running fast.
        run = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})
        states, taps = run(state, self.input_values)
        return np.asarray(states[:, 0]), taps

    @property
    def hidden_states(self) -> np.ndarray:
        return self._run[0]

    def tap(self, name: str) -> Any:
        return self._run[1].get(name)

    @cached_property
    def feat30(self) -> np.ndarray:
        return to_30hz(self.hidden_states)

    def bucket(self, fps: int, clip: int) -> np.ndarray:
        """`[1 l c T]`, as the pipeline has it."""
        picked, _ = _bucketed(self.feat30, fps, clip, context=0)
        return np.transpose(picked, (1, 2, 0))[None]


def _outputs(model: Wav2Vec2, file: SafetensorsFile) -> Iterator[Check]:
    results: dict[str, _Results] = {}
    for name in file:
        stem, _, part = name.partition(".")
        if name == "pos_conv_effective_weight":
            kernel = conv.backward(np.asarray(model.position.kernel()))
            yield compare(name, kernel, file[name], _WAVE_TOLERANCE)
        elif f"{stem}.wave" not in file:
            yield Check(name, np.inf, _TOLERANCE, "unknown tensor")
        elif part != "wave":
            result = results.setdefault(stem, _Results(model, file[f"{stem}.wave"]))
            yield _output(result, file, name, part)
            if part == "feat30" and f"{stem}.hidden_states" in file:
                given = to_30hz(file[f"{stem}.hidden_states"])
                yield compare(f"{name} (given states)", given, file[name], _RATE_TOLERANCE)


def _output(result: _Results, file: SafetensorsFile, name: str, part: str) -> Check:
    if part == "input_values":
        return compare(name, result.input_values, file[name], _WAVE_TOLERANCE)
    if part in ("hidden_states", "feat30"):
        return compare(name, getattr(result, part), file[name], _TOLERANCE)
    if found := re.fullmatch(r"bucket_fps(\d+)_bf(\d+)", part):
        bucket = result.bucket(*map(int, found.groups()))
        return compare(name, bucket, file[name], _TOLERANCE)
    taps = {"proj_out": "projected", "pos_conv_out": "positions"}
    value = result.tap(taps.get(part, part.removesuffix("_out")))
    if value is None:
        return Check(name, np.inf, _TOLERANCE, "unknown tensor")
    return compare(name, value, file[name], _TOLERANCE)
