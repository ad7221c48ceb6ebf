"""Trains the light VAE on windows of talking people, the mouth above all.

    window of 1 + 4k frames -> colour jitter -> encode -> + noise -> decode -> weighted L1

A picture can be good and still show no speech, so pixels near the mouth count several times.
Noise on the latents teaches the decoder to take small errors of the diffusion gracefully.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Shaped, UInt8

from jax_avatar.models.network import Network
from jax_avatar.models.vae.light import (
    LightVAE,
    LightVAEConfig,
    PatchBasis,
    principal_components,
    with_patch_basis,
)
from jax_avatar.pixels import from_uint8, psnr, to_uint8
from jax_avatar.shapes import Latent, Scalar, Video
from jax_avatar.training.run.evaluation import AverageEvaluation
from jax_avatar.training.run.step import LoopConfig
from jax_avatar.training.stages.task import LossTask
from jax_avatar.weights.checksums import keep_checksums
from jax_avatar.weights.files import load_weights, save_weights

__all__ = [
    "FaceWindows",
    "VAELossConfig",
    "VAETask",
    "latent_statistics",
    "mouth_weight",
    "reconstruction_scores",
]


_BASIS_WINDOWS = 128


@dataclass(frozen=True)
class VAELossConfig:
    """Loss weights and batches.

    Attributes:
        mouth_weight: weight of pixels in the mouth box; all others have 1.
        basis_mouth_weight: the same for the principal components that training starts from.
        square_weight: weight of the squared error next to the absolute one, whose optimum is a
            median and makes rare mouth shapes too small.
        gradient_weight: weight of the error of horizontal and vertical differences.
        motion_weight: weight of the error of differences between neighbouring frames.
        latent_weight: weight of the mean square of the latents, which keeps them near zero.
        latent_noise: largest standard deviation of the noise added to the latents.
        start_from: folder whose `vae.safetensors` training starts from; empty for random
            convolutions and principal components.
        train_encoder: whether the encoder learns too; if not, it stays at the principal
            components, and the transformer can be trained before the decoder is.
        colour_jitter: largest relative change of brightness, contrast and each colour.
        batch_size: windows per step at full size; as many pixels come when windows are cropped.
        frames: frames of a window, `1 + 4k`.
        crop: side in pixels of the cropped windows; 0 for none.
        crop_share: share of the steps that take cropped windows, most of them at the mouth.
    """

    mouth_weight: float = 6.0
    basis_mouth_weight: float = 24.0
    square_weight: float = 4.0
    gradient_weight: float = 0.5
    motion_weight: float = 2.0
    latent_weight: float = 1e-4
    latent_noise: float = 0.1
    start_from: str = ""
    train_encoder: bool = False
    colour_jitter: float = 0.15
    batch_size: int = 1
    frames: int = 9
    crop: int = 48
    crop_share: float = 0.75

    def __post_init__(self):
        if self.frames % 4 != 1 or self.frames < 5:
            raise ValueError(
                f"frames={self.frames}: a window has 1 + 4k frames and at least one group of "
                "four; use 5, 9 or 13."
            )
        if self.crop % 8:
            raise ValueError(f"crop={self.crop}: the VAE needs sides that are multiples of 8.")


@dataclass(frozen=True)
class FaceWindows:
    """Frames of many clips in memory, with the mouth's box in each frame."""

    frames: list[UInt8[np.ndarray, "T H W 3"]]
    mouth_box: list[Float[np.ndarray, "T 4"]]  # left, top, right, bottom in pixels

    @classmethod
    def from_clips(cls, clips: Iterable[Any], *, max_frames: int | None = None) -> "FaceWindows":
        """Collects whole clips, objects with `frames` and `mouth_box`, up to `max_frames`."""
        frames, boxes, total = [], [], 0
        for clip in clips:
            frames.append(np.asarray(clip.frames))
            boxes.append(np.asarray(clip.mouth_box, np.float32))
            total += len(clip.frames)
            if max_frames is not None and total >= max_frames:
                break
        return cls(frames, boxes)


def mouth_weight(
    mouth_box: Float[np.ndarray, "... 4"],
    height: int,
    width: int,
    weight: float,
    margin: float = 2.0,
) -> Float[np.ndarray, "... H W"]:
    """Weight of every pixel: `weight` in the box widened by `margin` pixels, 1 elsewhere."""
    left, top, right, bottom = np.moveaxis(np.asarray(mouth_box, np.float32), -1, 0)
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    columns = (x > left[..., None] - margin) & (x < right[..., None] + margin)
    rows = (y > top[..., None] - margin) & (y < bottom[..., None] + margin)
    inside = rows[..., :, None] & columns[..., None, :]
    return np.where(inside, weight, 1.0).astype(np.float32)


class VAETask(LossTask):
    """The light VAE as a training task: parameters, batches, loss."""

    name = "vae"

    def __init__(
        self,
        model: LightVAEConfig,
        loss: VAELossConfig,
        train: FaceWindows,
        held_out: FaceWindows | None = None,
        *,
        seed: int = 0,
    ):
        shortest = min(len(frames) for frames in train.frames)
        if shortest < loss.frames:
            raise ValueError(
                f"A clip has {shortest} frames, but frames={loss.frames}: leave out clips that "
                "are shorter than a window, or shorten the window."
            )
        self.model, self.settings, self.train, self.held_out = model, loss, train, held_out
        self.seed = seed
        self.network = Network.abstract(LightVAE, model)
        # Made now and not when first needed, which may be inside a compiled function.
        self._start_params = self._start(jax.random.key(seed))
        self._reconstruct = jax.jit(lambda params, video: self._apply(params, video))

    def init(self, key: Array) -> dict[str, Any]:
        """Random convolutions; linear paths at the principal components of the training frames.

        The key is not used, the task's seed is. An encoder that is not trained is no parameter,
        lest weight decay change it.
        """
        del key
        params = dict(self._start_params)
        if not self.settings.train_encoder:
            del params["encoder"]
        return params

    def model_params(self, params: dict[str, Any]) -> dict[str, Any]:
        """The VAE's weights alone, with the encoder also where it is not trained."""
        trained = params if self.settings.train_encoder else self._start_params
        return {"encoder": trained["encoder"], "decoder": params["decoder"]}

    def _start(self, key: Array) -> dict[str, Any]:
        if self.settings.start_from:
            params, config, _ = load_weights(self.settings.start_from, "vae")
            if LightVAEConfig(**config) != self.model:
                raise ValueError(
                    f"start_from={self.settings.start_from!r} holds a VAE of {config}, but "
                    f"{self.model.to_dict()} is to be trained; make the model settings equal."
                )
            return params
        build = jax.jit(
            lambda key: Network.of(LightVAE(self.model, rngs=nnx.Rngs(params=key))).params
        )
        return with_patch_basis(build(key), self.fit_basis())

    def fit_basis(self) -> PatchBasis:
        """Principal components of patches of the training clips, the mouth's weighted."""
        rng = np.random.default_rng([self.seed, 1])
        sample = [self._window(rng, cropped=False) for _ in range(_BASIS_WINDOWS)]
        video, box = (np.stack(part) for part in zip(*sample, strict=True))
        weight = mouth_weight(box, *video.shape[2:4], self.settings.basis_mouth_weight)
        return principal_components(from_uint8(video), weight, self.model.z_dim)

    def batches(self, step: int) -> dict[str, np.ndarray]:
        """The batch of a step: uint8 frames and the weight of every pixel."""
        settings = self.settings
        rng = np.random.default_rng([self.seed, 2, step])
        cropped = bool(settings.crop) and rng.random() < settings.crop_share
        count = settings.batch_size
        if cropped:
            height, width = self.train.frames[0].shape[1:3]
            count = max(1, count * height * width // settings.crop**2)
        sample = [self._window(rng, cropped) for _ in range(count)]
        video, box = (np.stack(part) for part in zip(*sample, strict=True))
        weight = mouth_weight(box, *video.shape[2:4], settings.mouth_weight)
        return {"video": video, "weight": weight}

    def loss(
        self, params: dict[str, Any], batch: dict[str, Array], key: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Weighted error of the reconstruction from noisy latents, and its parts."""
        settings = self.settings
        jitter_key, level_key, noise_key = jax.random.split(key, 3)
        video = from_uint8(batch["video"])
        video = _jitter(jitter_key, video, settings.colour_jitter)
        model = self.network.bind(self.model_params(params))
        latent = model.encode(video)
        level = settings.latent_noise * jax.random.uniform(
            level_key, (latent.shape[0], latent.shape[1], 1, 1, 1)
        )
        noisy = latent + level * jax.random.normal(noise_key, latent.shape)
        error = model.decode(noisy) - video
        weight = batch["weight"][..., None]
        pixel = _weighted_mean(jnp.abs(error), weight)
        gradient = _weighted_mean(
            jnp.abs(error[:, :, 1:] - error[:, :, :-1]), weight[:, :, 1:]
        ) + _weighted_mean(jnp.abs(error[:, :, :, 1:] - error[:, :, :, :-1]), weight[:, :, :, 1:])
        motion = _weighted_mean(jnp.abs(error[:, 1:] - error[:, :-1]), weight[:, 1:])
        spread = jnp.mean(latent**2)
        square = _weighted_mean(error**2, weight)
        total = (
            pixel
            + settings.square_weight * square
            + settings.gradient_weight * gradient
            + settings.motion_weight * motion
            + settings.latent_weight * spread
        )
        metrics = {
            "l1": pixel,
            "gradient": gradient,
            "motion": motion,
            "latent_ms": spread,
            "psnr": 10 * jnp.log10(4.0 / jnp.mean(error**2)),
        }
        return total, metrics

    def evaluations(self, config: LoopConfig, mesh: Mesh) -> list[AverageEvaluation]:
        """The one that `evaluate` makes, where there are held-out windows."""
        del config, mesh
        return [AverageEvaluation(self.evaluate)] if self.held_out else []

    def evaluate(self, params: dict[str, Any], step: int) -> dict[str, float]:
        """PSNR of held-out windows, overall and in the mouth box, without noise."""
        del step
        if self.held_out is None:
            return {}
        length = self.settings.frames
        video = np.stack([frames[:length] for frames in self.held_out.frames[:32]])
        box = np.stack([box[:length] for box in self.held_out.mouth_box[:32]])
        return reconstruction_scores(video, self.reconstruct(params, video), box)

    def reconstruct(
        self, params: dict[str, Any], video: UInt8[np.ndarray, "b T H W 3"]
    ) -> UInt8[np.ndarray, "b T H W 3"]:
        """Encodes and decodes clips of `1 + 4k` frames, one at a time."""
        params = self.model_params(params)
        parts = [self._reconstruct(params, from_uint8(clip[None])) for clip in video]
        return to_uint8(np.concatenate([np.asarray(part) for part in parts]))

    def export(self, params: dict[str, Any], folder: str | Path, metadata: dict) -> None:
        """Writes `vae.safetensors` in half precision, with scores among the metadata.

        If the encoder was trained, the normalisation of its latents is measured anew; a linear one
        already has it in its weights.
        """
        config, weights = self.model, self.model_params(params)
        if self.settings.train_encoder:
            rng = np.random.default_rng([self.seed, 3])
            video = np.stack([self._window(rng, cropped=False)[0] for _ in range(64)])
            encode = jax.jit(lambda params, video: self.network.bind(params).encode(video))
            latent = np.concatenate(
                [np.asarray(encode(weights, clip[None])) for clip in from_uint8(video)]
            )
            old_mean, old_std = np.asarray(config.latent_mean), np.asarray(config.latent_std)
            mean, std = latent_statistics(latent * old_std + old_mean)
            config = replace(config, latent_mean=mean, latent_std=std)
        scores = {name: round(value, 2) for name, value in self.evaluate(params, 0).items()}
        metadata = {**metadata, "task": asdict(self.settings), "held_out_scores": scores}
        keep_checksums(folder)
        save_weights(folder, "vae", weights, config.to_dict(), metadata, dtype="float16")

    def _apply(self, params: dict[str, Any], video: Video) -> Video:
        model = self.network.bind(params)
        return model.decode(model.encode(video))

    def _window(self, rng: np.random.Generator, cropped: bool) -> tuple[np.ndarray, np.ndarray]:
        """Frames and mouth boxes of a random window, flipped half of the time."""
        clip = rng.integers(len(self.train.frames))
        frames, box = self.train.frames[clip], self.train.mouth_box[clip]
        start = rng.integers(len(frames) - self.settings.frames + 1)
        frames = frames[start : start + self.settings.frames]
        box = box[start : start + self.settings.frames]
        if cropped:
            side = self.settings.crop
            limit = np.array(frames.shape[2:0:-1]) - side
            if rng.random() < 0.7:
                centre = (box[:, :2] + box[:, 2:]).mean(0) / 2
                corner = centre - side / 2 + rng.uniform(-0.25, 0.25, 2) * side
                x, y = np.clip(corner.astype(int), 0, limit)
            else:
                x, y = rng.integers(0, limit + 1)
            frames = frames[:, y : y + side, x : x + side]
            box = box - np.array([x, y, x, y], np.float32)
        if rng.random() < 0.5:
            frames = frames[:, :, ::-1]
            left, top, right, bottom = np.moveaxis(box, -1, 0)
            width = frames.shape[2]
            box = np.stack([width - right, top, width - left, bottom], -1)
        return frames, box


def reconstruction_scores(
    video: UInt8[np.ndarray, "b T H W 3"],
    decoded: UInt8[np.ndarray, "b T H W 3"],
    mouth_box: Float[np.ndarray, "b T 4"],
) -> dict[str, float]:
    """Peak signal-to-noise ratio in dB over all pixels, and over those of the mouth box."""
    square = ((video.astype(np.float32) - decoded.astype(np.float32)) ** 2).mean(-1)
    inside = mouth_weight(mouth_box, *video.shape[2:4], 2.0, margin=0.0) - 1.0
    mouth = (square * inside).sum() / max(inside.sum(), 1.0)
    return {
        "psnr": float(psnr(square.mean())),
        "mouth_psnr": float(psnr(mouth)),
    }


def latent_statistics(
    latent: Latent | Float[np.ndarray, "b t h w c"], *, whitening: float = 0.5
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and divisor per channel that make latents fit for diffusion.

    Args:
        latent: raw latents, those of a VAE with neither mean nor divisor.
        whitening: 0 divides all channels by one number, 1 each by its own spread; in between is
            the geometric mean with that weight.

    Returns:
        `latent_mean` and `latent_std`; divided latents have a mean square of one over all.
    """
    rows = np.asarray(latent, np.float64).reshape(-1, latent.shape[-1])
    std = rows.std(0)
    divisor = std**whitening * np.sqrt((std**2).mean()) ** (1 - whitening)
    divisor = divisor * np.sqrt(((std / divisor) ** 2).mean())
    return tuple(rows.mean(0).tolist()), tuple(divisor.tolist())


def _jitter(key: Array, video: Shaped[Array, "b T H W 3"], amount: float) -> Array:
    """Scales contrast and colours and moves the brightness, alike in all frames of a clip."""
    if not amount:
        return video
    shift_key, gain_key, colour_key = jax.random.split(key, 3)
    count = video.shape[0]
    shift = jax.random.uniform(shift_key, (count, 1, 1, 1, 1), minval=-amount, maxval=amount)
    gain = jax.random.uniform(gain_key, (count, 1, 1, 1, 1), minval=1 - amount, maxval=1 + amount)
    colour = jax.random.uniform(
        colour_key, (count, 1, 1, 1, 3), minval=1 - amount / 2, maxval=1 + amount / 2
    )
    return jnp.clip(((video + 1.0) * colour - 1.0) * gain + shift, -1.0, 1.0)


def _weighted_mean(error: Array, weight: Array) -> Scalar:
    return jnp.sum(error * weight) / (jnp.sum(weight) * error.shape[-1])
