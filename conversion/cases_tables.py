"""Golden tables beside the transformer: rotary factors, speaker routing, the sampler.

rotary factors, speaker routing    safetensors
sampler_tables.json                sizes, schedules, feature rates, positions
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from conversion.cases import Case, Check, compare
from conversion.readers import SafetensorsFile
from jax_avatar.diffusion.schedule import euler_schedule
from jax_avatar.io.image import fit_size, resized_size
from jax_avatar.models.config import DiTConfig
from jax_avatar.models.layers import TimeEmbedding
from jax_avatar.models.rope import axis_rotation, motion_positions
from jax_avatar.models.speech.feature_rate import bucket_indices, num_frames_30hz, to_30hz
from jax_avatar.streaming.speakers import speaker_masks

__all__ = ["RotaryCases", "RoutingCases", "SamplerTables"]


class RotaryCases:
    """Rotary factors and timestep sinusoids at selected positions."""

    name = "rotary"

    def find(self, files: Sequence[Path]) -> list[Case]:
        """Files with factors, positions and the split of the channel pairs."""
        wanted = {"cos_f64", "sin_f64", "positions", "split"}
        return [
            Case(path.stem, (path,))
            for path in files
            if path.suffix == ".safetensors" and wanted <= set(SafetensorsFile(path))
        ]

    def run(self, case: Case) -> Iterable[Check]:
        """Exact where rounded to float16, else to float32."""
        tensors = dict(SafetensorsFile(case.files[0]))
        positions, split_ = tensors.pop("positions"), tensors.pop("split")
        for half, suffix, tolerance in ((False, "f64", 1e-7), (True, "fp16_rounded", 0.0)):
            parts = [
                axis_rotation(positions, int(pairs), theta=10000.0, half=half) for pairs in split_
            ]
            for kind in ("cos", "sin"):
                name = f"{kind}_{suffix}"
                value = np.concatenate([getattr(part, kind) for part in parts], axis=-1)
                if name in tensors:
                    yield compare(name, value, tensors.pop(name), tolerance)
        time = tensors.pop("time.t", None)
        for name, expected in tensors.items():
            found = re.fullmatch(r"time\.sinusoid(\d+)", name)
            if found and time is not None:
                config = DiTConfig(16, 16, 1, 1, freq_width=int(found[1]))
                made = TimeEmbedding(config, rngs=nnx.Rngs(0)).sinusoid(jnp.asarray(time))
                yield compare(name, made, expected, 1e-6)
            else:
                yield Check(name, np.inf, 0.0, "no check covers this tensor")


class RoutingCases:
    """Pixel masks of several people -> routing masks."""

    name = "routing"

    def find(self, files: Sequence[Path]) -> list[Case]:
        """Files with pixel masks and final masks."""
        found = []
        for path in files:
            if path.suffix == ".safetensors":
                names = SafetensorsFile(path)
                if any(name.endswith(".pixel_masks") for name in names):
                    found.append(Case(path.stem, (path,)))
        return found

    def run(self, case: Case) -> Iterable[Check]:
        """Exact."""
        tensors = dict(SafetensorsFile(case.files[0]))
        for name in [n for n in tensors if n.endswith(".pixel_masks")]:
            group = name.removesuffix(".pixel_masks")
            steps = {}
            expected = tensors[f"{group}.mask"]
            _, frames, rows, cols, _ = expected.shape
            pixels = tensors[name].astype(np.float32)
            steps["mask"] = speaker_masks(pixels, frames, rows, cols, tap=steps.__setitem__)
            for step in ("onehot", "dilated", "mask"):
                if f"{group}.{step}" in tensors:
                    made = steps[step].astype(np.float32)[..., None]
                    yield compare(f"{group}.{step}", made, tensors[f"{group}.{step}"], 0.0)


class SamplerTables:
    """Sizes, schedules, feature picking and token positions."""

    name = "tables"

    def find(self, files: Sequence[Path]) -> list[Case]:
        """JSON files with at least one of the tables."""
        found = []
        for path in files:
            if path.suffix == ".json":
                content = json.loads(path.read_text())
                if isinstance(content, dict) and set(content) & set(self._tables()):
                    found.append(Case(path.stem, (path,), content))
        return found

    def run(self, case: Case) -> Iterable[Check]:
        """One check per table; integers exact, numbers to float32."""
        tables = self._tables()
        for name, content in case.data.items():
            if name not in tables:
                yield Check(name, np.inf, 0.0, "no check covers this table")
                continue
            actual, expected = tables[name](content)
            exact = all(isinstance(value, int) for value in expected)
            yield compare(name, actual, expected, 0.0 if exact else 1e-6, 0.0 if exact else 1e-7)

    def _tables(self) -> dict[str, Callable[[Any], tuple[list, list]]]:
        return {
            "size_rule": self._sizes,
            "scheduler_flow_match_euler": self._schedules,
            "audio_bucket": self._buckets,
            "audio_50_to_30": lambda rows: (
                [num_frames_30hz(row["frames50"]) for row in rows],
                [row["frames30"] for row in rows],
            ),
            "audio_interp_example": lambda row: (
                to_30hz(np.array(row["input"], np.float32)[None, :, None]).ravel().tolist(),
                row["output"],
            ),
            "rope_positions": self._positions,
        }

    def _sizes(self, rows):
        actual, expected = [], []
        for row in rows:
            size = fit_size(row["image_h"], row["image_w"], row["max_area"])
            actual += [*size, *resized_size(row["image_h"], row["image_w"], *size)]
            expected += [row["H"], row["W"], *row["resized"]]
        return actual, expected

    def _schedules(self, table):
        actual, expected = [], []
        for name, row in table.items():
            shift, steps = re.fullmatch(r"shift([\d.]+)_steps(\d+)", name).groups()
            schedule = euler_schedule(int(steps), float(shift))
            actual += [*schedule.sigmas, *schedule.timesteps]
            expected += [*row["sigmas"], *row["timesteps"]]
        return actual, [float(value) for value in expected]

    def _buckets(self, rows):
        actual, expected = [], []
        for row in rows:
            index = bucket_indices(row["frames30"], row["fps"], row["clip_frames"])
            actual += [len(index) // row["clip_frames"], *index.tolist()]
            expected += [row["num_clips"], *row["index"]]
        return actual, expected

    def _positions(self, rows):
        actual, expected = [], []
        for row in rows:
            height, width = row["latent_h"], row["latent_w"]
            grid = (list(range(height // 2)), list(range(width // 2)))
            near, mid, far = (
                tuple(list(map(int, axis)) for axis in part)
                for part in motion_positions(height, width)
            )
            made = {"motion_1x": near, "motion_2x": mid, "motion_4x": far}
            for name, axes in row.items():
                if not isinstance(axes, dict):
                    continue
                found = re.fullmatch(r"(noisy|ref)_at_(\d+)", name)
                if found:
                    first = int(found[2])
                    count = 3 if found[1] == "noisy" else 1
                    made[name] = ([first + i for i in range(count)], *grid)
                actual += [position for axis in made[name] for position in axis]
                expected += axes["frame"] + axes["row"] + axes["col"]
        return actual, expected
