"""Trains the transformer block-causally on latents of talking people (diffusion forcing).

    clean latents --noise level per block--> noisy --block-causal DiT--> velocity --weighted error
    portrait, speech features, prompt -------------------^

In half of the clips all blocks share one noise level: that is what a stream sees, whose every
denoising step keeps a window of blocks at its own level.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float

from jax_avatar.diffusion.flow import add_noise
from jax_avatar.diffusion.schedule import shift_sigma
from jax_avatar.io.checkpoint import save_weights
from jax_avatar.models.config import DiTConfig
from jax_avatar.models.params import merge, split
from jax_avatar.models.portrait_dit import PortraitDiT
from jax_avatar.shapes import Array, Latent, PyTree
from jax_avatar.training.latents import LatentClips

__all__ = ["ForcingConfig", "ForcingTask", "MouthReader", "fit_mouth_reader"]


@dataclass(frozen=True)
class ForcingConfig:
    """Batches and loss.

    Attributes:
        batch_size: clips per step.
        latents: latent frames per clip, whole blocks.
        still_share: share of every person's windows to train on, those nearest to the portrait.
            A small network trained for an hour blurs large movements of the head.
        shift: moves noise levels toward noise; uniform levels before the shift.
        shared_share: share of the clips whose blocks all have the same noise level.
        smallest_sigma: levels are drawn between this one and 1; a sampler of few steps never
            feeds smaller ones than its last.
        audio_dropout: share of the clips whose speech features are zeros.
        reference_noise: largest deviation of the noise added to the portrait.
        reference_frames: inclusive range of the portrait's rotary frame, drawn once per step.
        mouth_weight: weight of the latents around the mouth; all others have 1.
        mouth_probe_weight: weight of the error of the lip gap read from the predicted clean
            latents by a linear map fitted beforehand; 0 leaves it out.
        weighting: "velocity", or "clean" for the same weight at every noise level.
    """

    batch_size: int = 8
    latents: int = 12
    still_share: float = 1.0
    shift: float = 2.0
    shared_share: float = 0.5
    smallest_sigma: float = 0.4
    audio_dropout: float = 0.1
    reference_noise: float = 0.05
    reference_frames: tuple[int, int] = (13, 39)
    mouth_weight: float = 5.0
    mouth_probe_weight: float = 0.0
    weighting: str = "velocity"

    def __post_init__(self):
        object.__setattr__(self, "reference_frames", tuple(self.reference_frames))
        if self.weighting not in ("velocity", "clean"):
            raise ValueError(f'weighting {self.weighting!r} must be "velocity" or "clean"')


@dataclass(frozen=True)
class MouthReader:
    """A linear map from the latents around the mouth to the lip gap of their video frames."""

    kernel: np.ndarray  # features, 4
    bias: np.ndarray  # 4
    correlation: float  # with the truth, on the clips it was fitted on

    def __call__(
        self, latent: Latent, reference: Float[Array, "b 1 h w c"], mouth: Array
    ) -> Float[Array, "b T"]:
        """Lip gap of every video frame."""
        features = _mouth_features(latent, reference, mouth, jnp)
        gap = features @ jnp.asarray(self.kernel) + jnp.asarray(self.bias)[None, None]
        return gap.reshape(gap.shape[0], -1)


def fit_mouth_reader(clips: LatentClips, ridge: float = 10.0) -> MouthReader:
    """Ridge regression of the lip gap on how the mouth differs from the portrait's."""
    x = _mouth_features(
        clips.latent.astype(np.float32),
        clips.reference.astype(np.float32),
        clips.mouth.astype(np.float32),
        np,
    )
    x = x.reshape(-1, x.shape[-1]).astype(np.float64)
    y = clips.lip_gap.reshape(len(x), 4).astype(np.float64)
    mean, centre = x.mean(0), y.mean(0)
    gram = (x - mean).T @ (x - mean) + ridge * len(x) * 1e-3 * np.eye(x.shape[1])
    kernel = np.linalg.solve(gram, (x - mean).T @ (y - centre))
    read = (x - mean) @ kernel
    correlation = np.corrcoef(read.ravel(), (y - centre).ravel())[0, 1]
    bias = centre - mean @ kernel
    return MouthReader(kernel.astype(np.float32), bias.astype(np.float32), float(correlation))


class ForcingTask:
    """Block-causal flow matching as a training task: parameters, batches, loss."""

    name = "dit"

    def __init__(
        self,
        model: DiTConfig,
        settings: ForcingConfig,
        clips: LatentClips,
        *,
        seed: int = 0,
        evaluate: Callable[[PyTree, int], dict[str, float]] | None = None,
        start_from: PyTree | None = None,
    ):
        """Checks that the parts fit together.

        Args:
            model: size of the transformer.
            settings: batches and loss.
            clips: to train on.
            seed: of the order of the clips.
            evaluate: `(params, step) -> scores`, called by the loop.
            start_from: parameters to start from instead of random ones.
        """
        frames, _, _, channels = clips.latent.shape[1:]
        if channels != model.latent_channels:
            raise ValueError(
                f"latents have {channels} channels, the transformer expects "
                f"{model.latent_channels}; set model.latent_channels."
            )
        if settings.latents > frames or settings.latents % model.frames_per_block:
            raise ValueError(
                f"latents={settings.latents}: clips have {frames} and a block has "
                f"{model.frames_per_block}; give whole blocks, no more than a clip has."
            )
        if clips.features.shape[2:] != (model.audio_layers, model.audio_width):
            raise ValueError(
                f"speech features have {clips.features.shape[2:]} states and channels, the "
                f"transformer expects {(model.audio_layers, model.audio_width)}; set "
                "model.audio_layers and model.audio_width."
            )
        self.model, self.settings, self.clips, self.seed = model, settings, clips, seed
        self.start_from = start_from
        self.windows = _windows(clips, settings.latents, settings.still_share)
        self.graphdef, _ = split(nnx.eval_shape(lambda: PortraitDiT(model, rngs=nnx.Rngs(0))))
        few = clips.take(slice(None, None, max(1, len(clips) // 800)))
        self.reader = fit_mouth_reader(few) if settings.mouth_probe_weight else None
        self._gap_scale = float(clips.lip_gap.std()) + 1e-6
        if evaluate:
            self.evaluate = evaluate

    def init(self, key: Array) -> PyTree:
        """Random parameters, or those to start from."""
        if self.start_from is not None:
            return self.start_from
        return split(PortraitDiT(self.model, rngs=nnx.Rngs(params=key)))[1]

    def batches(self, step: int) -> dict[str, np.ndarray]:
        """The batch of a step; every window of the clips once per epoch."""
        settings, clips = self.settings, self.clips
        size, count = settings.batch_size, len(self.windows)
        positions = np.arange(step * size, (step + 1) * size)
        orders = {
            epoch: np.random.default_rng([self.seed, 1, epoch]).permutation(count)
            for epoch in set(positions // count)
        }
        chosen = np.array([orders[p // count][p % count] for p in positions])
        index, starts = self.windows[chosen].T
        frames = settings.latents

        def cut(array, rate=1):
            windows = zip(index, starts, strict=True)
            cuts = [array[i, rate * s : rate * (s + frames)] for i, s in windows]
            return np.stack(cuts).astype(np.float32)

        return {
            "latent": cut(clips.latent),
            "reference": clips.reference[index].astype(np.float32),
            "features": cut(clips.features, 4)[:, None],
            "mouth": cut(clips.mouth),
            "lip_gap": cut(clips.lip_gap, 4),
        }

    def loss(
        self, params: PyTree, batch: Mapping[str, Array], key: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Weighted error of the velocity, and its parts."""
        settings, model = self.settings, self.model
        clean, features = batch["latent"], batch["features"]
        b, t = clean.shape[:2]
        keys = iter(jax.random.split(key, 7))
        noise = jax.random.normal(next(keys), clean.shape)
        sigma = self._sigmas(next(keys), b, t)
        wide = sigma[:, :, None, None, None]
        noisy = add_noise(clean, noise, wide)
        heard = jax.random.uniform(next(keys), (b, 1, 1, 1, 1)) >= settings.audio_dropout
        reference = batch["reference"]
        level = settings.reference_noise * jax.random.uniform(next(keys), (b, 1, 1, 1, 1))
        reference = reference + level * jax.random.normal(next(keys), reference.shape)
        low, high = settings.reference_frames
        reference_frame = jax.random.randint(next(keys), (), low, high + 1)

        velocity = merge(self.graphdef, params).block_causal(
            noisy,
            1000 * sigma,
            jnp.zeros((b, 1, model.text_width)),
            reference,
            None,
            jnp.broadcast_to(reference, clean.shape),
            features * heard,
            reference_frame=reference_frame,
        )
        error = velocity - (noise - clean)
        if settings.weighting == "clean":
            error = error * jnp.maximum(wide, 0.1)
        square = jnp.mean(error**2, axis=-1)
        weight = 1 + (settings.mouth_weight - 1) * batch["mouth"]
        loss = jnp.sum(square * weight) / jnp.sum(weight)

        predicted = noisy - wide * velocity
        high_noise = (sigma > 0.8).astype(jnp.float32)[:, :, None, None]
        clean_error = jnp.mean((predicted - clean) ** 2, axis=-1)
        metrics = {
            "flow": loss,
            "mouth_error": _weighted_mean(square, batch["mouth"]),
            "clean_error_high": _weighted_mean(
                clean_error, jnp.broadcast_to(high_noise, square.shape)
            ),
            "mouth_error_high": _weighted_mean(clean_error, batch["mouth"] * high_noise),
        }
        if self.reader:
            gap = self.reader(predicted, batch["reference"], batch["mouth"])
            gap_error = ((gap - batch["lip_gap"]) / self._gap_scale) ** 2
            probe = jnp.mean(gap_error * heard[:, :, 0, 0, 0])
            loss = loss + settings.mouth_probe_weight * probe
            metrics["probe"] = probe
        return loss, metrics

    def export(self, params: PyTree, folder: str | Path, metadata: Mapping[str, Any]) -> None:
        """Writes `dit.safetensors`."""
        config = dataclasses.asdict(self.model)
        config |= {"dtype": str(config["dtype"]), "param_dtype": str(config["param_dtype"])}
        save_weights(folder, "dit", jax.device_get(params), config, dict(metadata))

    def _sigmas(self, key: Array, b: int, t: int) -> Float[Array, "b t"]:
        """Noise level of every latent frame, equal inside a block."""
        settings, size = self.settings, self.model.frames_per_block
        level_key, shared_key = jax.random.split(key)
        level = jax.random.uniform(level_key, (b, t // size))
        shared = jax.random.uniform(shared_key, (b, 1)) < settings.shared_share
        level = jnp.where(shared, level[:, :1], level)
        low = settings.smallest_sigma
        sigma = low + (1 - low) * shift_sigma(level, settings.shift)
        return jnp.repeat(sigma, size, axis=1)


def _windows(clips: LatentClips, latents: int, share: float) -> np.ndarray:
    """Clip and first latent of the windows to train on, `[windows 2]`."""
    starts = np.arange(clips.latent.shape[1] - latents + 1)
    windows = np.stack(np.meshgrid(np.arange(len(clips)), starts, indexing="ij"), -1)
    if share >= 1:
        return windows.reshape(-1, 2)
    moved = np.stack(
        [
            (np.square(np.float32(latent) - reference).mean(-1) * ~mouth).mean((1, 2))
            for latent, reference, mouth in zip(
                clips.latent, clips.reference, clips.mouth, strict=True
            )
        ]
    )
    moved = np.stack([moved[:, s : s + latents].mean(1) for s in starts], axis=1)
    kept = []
    for person in np.unique(clips.person):
        own, distance = windows[clips.person == person], moved[clips.person == person]
        order = np.argsort(distance, axis=None)[: max(1, round(share * distance.size))]
        kept.append(own.reshape(-1, 2)[order])
    return np.concatenate(kept)


def _mouth_features(latent, reference, mouth: Bool[Any, "b t h w"] | Any, np_like):
    """What is linear in the latents: their mean change in a grid laid over the mouth's box."""
    change = latent - reference
    parts = []
    _, _, h, w = mouth.shape
    rows, cols = np_like.arange(h, dtype=np_like.float32), np_like.arange(w, dtype=np_like.float32)
    mass = mouth.sum((2, 3)) + 1e-6
    row = (mouth.sum(3) * rows[None, None]).sum(2) / mass
    col = (mouth.sum(2) * cols[None, None]).sum(2) / mass
    for dr in (-1.0, 0.0, 1.0):
        for dc in (-1.0, 0.0, 1.0):
            # Bilinear tents, so that the map follows a moving head smoothly.
            tent_row = np_like.maximum(0, 1 - abs(rows[None, None] - (row + dr)[..., None]))
            tent_col = np_like.maximum(0, 1 - abs(cols[None, None] - (col + dc)[..., None]))
            tent = tent_row[..., :, None] * tent_col[..., None, :]
            parts.append(np_like.einsum("bthwc,bthw->btc", change, tent))
    return np_like.concatenate(parts, axis=-1)


def _weighted_mean(value: Array, weight: Array) -> Array:
    return jnp.sum(value * weight) / (jnp.sum(weight) + 1e-6)
