"""Trains the anchored VAE on portraits of invented people and frames of them moving.

    seed -> portrait, frames, exact flow (rendered once, then read from a folder)
    latent of the true motion + noise, portrait -> decoder -> picture, flow, mask, outline
    portrait, frame -> encoder -> curves of the motion

Decoder and encoder share only the fixed code of the motion, see `fit_basis`.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jax_avatar.data.talking_people.head_motion import mirrored
from jax_avatar.data.talking_people.moved_portraits import (
    MovedPortraitsConfig,
    load_moved_portrait,
)
from jax_avatar.models.network import Network
from jax_avatar.models.vae.anchored import FLOW, GROUP, SIDE, AnchoredVAE, AnchoredVAEConfig
from jax_avatar.models.vae.warp import shrunk
from jax_avatar.pixels import frame_psnr, from_uint8, to_uint8
from jax_avatar.shapes import Scalar
from jax_avatar.training.run.evaluation import AverageEvaluation
from jax_avatar.training.run.step import LoopConfig
from jax_avatar.training.stages.anchored_basis import fit_basis
from jax_avatar.training.stages.task import LossTask
from jax_avatar.weights.checksums import keep_checksums
from jax_avatar.weights.files import load_weights, save_weights

__all__ = ["HELD_OUT_SEED", "AnchoredTask", "AnchoredTaskConfig", "training_row"]

HELD_OUT_SEED = 5_000
"""First of the people that are never trained on."""


@dataclass(frozen=True)
class AnchoredTaskConfig:
    """Data, batches and loss weights.

    Attributes:
        cache: folder for the rendered people; made once, read afterwards.
        people: training people.
        first_people: people that the first steps draw from, and that the code, the mean person
            and the least squares are fitted to.
        new_people: more people with every step, so that rendering them is spread over the run.
        held_out_people: people of `evaluate`.
        batch_size: portraits per step.
        frames: frames of each portrait in a batch.
        start_from: folder whose `vae.safetensors` training starts from, its basis included;
            empty for random networks.
        face_weight: weight of pixels in the boxes of mouth and eyes, all others have 1 ...
        eye_weight: ... and of those of the eyes, which are small.
        latent_noise: standard deviation of the noise added to the latents.
        edge_weight: weight of the error of differences between neighbouring pixels, as all that
            follow next to the absolute error of the picture.
        flow_weight: of the flow in pixels, coarse and fine.
        mask_weight: of the cross-entropies of mask, outline and surface.
        paint_weight: of the painted colour where the portrait does not show what is there.
        shape_weight: of the portrait's depth and head weight.
        motion_weight: of the encoder's curves.
        colour_jitter: standard deviation of the logarithm of gains and gamma.
    """

    cache: str
    people: int = 1200
    first_people: int = 256
    new_people: float = 1.0
    held_out_people: int = 6
    batch_size: int = 4
    frames: int = 2
    start_from: str = ""
    face_weight: float = 8.0
    eye_weight: float = 20.0
    latent_noise: float = 0.1
    edge_weight: float = 1.0
    flow_weight: float = 0.2
    mask_weight: float = 0.1
    paint_weight: float = 0.5
    shape_weight: float = 0.2
    motion_weight: float = 0.1
    colour_jitter: float = 0.25

    def __post_init__(self):
        if not 1 <= self.first_people <= self.people <= HELD_OUT_SEED:
            raise ValueError(
                f"people={self.people}, first_people={self.first_people}: expected 1 to "
                f"{HELD_OUT_SEED} people, the first among them."
            )


class AnchoredTask(LossTask):
    """The anchored VAE as a training task."""

    name = "anchored_vae"

    def __init__(
        self,
        model: AnchoredVAEConfig,
        task: AnchoredTaskConfig,
        pictures: MovedPortraitsConfig,
        *,
        seed: int = 0,
    ):
        self.model, self.settings, self.pictures, self.seed = model, task, pictures, seed
        self.network = Network.abstract(AnchoredVAE, model)
        self._start, basis = self._first_params()
        self._basis = jax.tree.map(jnp.asarray, basis)
        self._decode = jax.jit(self._decoded)

    def init(self, key: Array) -> dict[str, Any]:
        """Random networks, or those of `start_from`; the basis is no parameter."""
        if self._start is not None:
            return self._start
        build = jax.jit(
            lambda key: Network.of(AnchoredVAE(self.model, rngs=nnx.Rngs(params=key))).params
        )
        params = dict(build(key))
        del params["basis"]
        return params

    def model_params(self, params: dict[str, Any]) -> dict[str, Any]:
        """The VAE's weights, with the basis."""
        return {**params, "basis": self._basis}

    def batches(self, step: int) -> dict[str, np.ndarray]:
        """Portraits of a step, flipped half of the time, with a few frames of each."""
        task = self.settings
        rng = np.random.default_rng([self.seed, 2, step])
        known = int(min(task.people, task.first_people + task.new_people * step))
        rows = []
        for _ in range(task.batch_size):
            person = load_moved_portrait(task.cache, int(rng.integers(known)), self.pictures)
            chosen = rng.choice(len(person.frames), task.frames, replace=False)
            rows.append(training_row(person, chosen, is_flipped=rng.random() < 0.5))
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def loss(
        self, params: dict[str, Any], batch: dict[str, Array], key: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Errors of picture, edges, flow, mask, paint, shape and of the encoder's motion."""
        task = self.settings
        vae = self.network.bind(self.model_params(params))
        colour_key, noise_key = jax.random.split(key)
        frames, portrait = _recoloured(colour_key, batch, task.colour_jitter)
        motion = batch["motion"]
        motion = motion.reshape(-1, *motion.shape[2:])
        latent = vae.basis.to_latent(motion)
        latent = latent + task.latent_noise * jax.random.normal(noise_key, latent.shape)
        rows, offset = jnp.arange(len(latent)), batch["offset"].reshape(-1)
        curves, codes = (part[rows, offset] for part in vae.curves_and_codes(latent))
        ready = vae.prepare(portrait)
        out = vae.paint(ready, curves, codes)

        truth = frames.reshape(-1, *frames.shape[2:])
        weight = self._importance(batch["boxes"].reshape(-1, 3, 4), SIDE)
        terms = _picture_terms(out, truth, weight)
        terms |= _flow_terms(out, batch, truth, weight)
        terms |= _portrait_terms(ready, batch)
        read = vae.encoder(shrunk(portrait, SIDE), shrunk(truth, SIDE))
        terms["motion"] = jnp.mean((read - motion[rows, offset]) ** 2)
        scale = dict(
            pixel=1.0,
            edges=task.edge_weight,
            **dict.fromkeys(("flow", "coarse"), task.flow_weight),
            **dict.fromkeys(("mask", "outline", "surface"), task.mask_weight),
            paint=task.paint_weight,
            shape=task.shape_weight,
            motion=task.motion_weight,
        )
        return sum(scale[name] * term for name, term in terms.items()), terms

    def evaluations(self, config: LoopConfig, mesh: Mesh) -> list[AverageEvaluation]:
        """The one that `evaluate` makes."""
        del config, mesh
        return [AverageEvaluation(self.evaluate)]

    def evaluate(self, params: dict[str, Any], step: int) -> dict[str, float]:
        """PSNR over held-out people from true motion, whole and in the boxes of mouth and eyes.

        Also that of the portrait shown still.
        """
        del step
        plain = MovedPortraitsConfig(**{**asdict(self.pictures), "is_plain": True})
        found: dict[str, list[float]] = {"psnr": [], "face_psnr": [], "still_psnr": []}
        for i in range(self.settings.held_out_people):
            folder = Path(self.settings.cache) / "held_out"
            person = load_moved_portrait(folder, HELD_OUT_SEED + i, plain)
            picture = self._decode(
                self.model_params(params), person.portrait, person.motion[::GROUP]
            )
            count = len(picture)
            truth = person.frames[:count]
            weight = self._importance(jnp.asarray(person.boxes[:count]), truth.shape[1])
            inside = np.asarray(weight)[..., 0] > 1
            found["psnr"].append(_psnr(np.asarray(picture), truth))
            found["face_psnr"].append(_psnr(np.asarray(picture), truth, inside))
            found["still_psnr"].append(_psnr(person.portrait[None], truth))
        return {name: float(np.mean(values)) for name, values in found.items()}

    def export(self, params: dict[str, Any], folder: str | Path, metadata: dict) -> None:
        """Writes `vae.safetensors` in half precision, with scores among the metadata."""
        scores = {name: round(value, 2) for name, value in self.evaluate(params, 0).items()}
        told = {**asdict(self.settings), "cache": None}
        metadata = {**metadata, "task": told, "held_out_scores": scores}
        keep_checksums(folder)
        weights = self.model_params(params)
        save_weights(folder, "vae", weights, self.model.to_dict(), metadata, dtype="float16")

    def _first_params(self) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """Networks to start from, if any, and the basis."""
        task = self.settings
        if task.start_from:
            params, config, _ = load_weights(task.start_from, "vae")
            if AnchoredVAEConfig(**config) != self.model:
                raise ValueError(
                    f"start_from={task.start_from!r} holds a VAE of {config}, but "
                    f"{self.model.to_dict()} is to be trained; make the model settings equal."
                )
            params = dict(params)
            return params, params.pop("basis")
        people = [
            load_moved_portrait(task.cache, seed, self.pictures)
            for seed in range(task.first_people)
        ]
        return None, fit_basis(self.model, people)

    def _decoded(self, params: dict[str, Any], portrait: Array, windows: Array) -> Array:
        """Frames of one portrait from its true motion, 8 bits."""
        vae = self.network.bind(params)
        latent = vae.basis.to_latent(windows).reshape(1, -1, *self.model.latent_shape)
        ready = vae.prepare(from_uint8(portrait[None]))
        picture, _ = vae.decode_next(ready, latent)
        return to_uint8(picture[0])

    def _importance(self, boxes: Float[Array, "f 3 4"], side: int) -> Float[Array, "f h w 1"]:
        """Weight of pixels, 1 outside the boxes of mouth and eyes."""
        task = self.settings
        inside = _inside(boxes, side)
        part = jnp.array([task.face_weight, task.eye_weight, task.eye_weight])
        return (1 + (part.reshape(1, 3, 1, 1) * inside).max(-3))[..., None]


def training_row(person: Any, chosen: np.ndarray, *, is_flipped: bool) -> dict[str, np.ndarray]:
    """One portrait of a batch with its chosen frames, perhaps mirrored."""
    row = {name: getattr(person, name) for name in ("portrait", "portrait_surface")}
    row |= {name: getattr(person, name)[None] for name in ("depth", "head_weight")}
    names = ("frames", "surface", "flow", "seen", "boxes", "motion", "offset")
    row |= {name: getattr(person, name)[chosen] for name in names}
    row = {
        name: np.asarray(v, np.float32) if v.dtype == np.float16 else v for name, v in row.items()
    }
    row["offset"] = row["offset"].astype(np.int32)
    if not is_flipped:
        return row
    for name in ("portrait", "frames", "flow"):
        row[name] = row[name][..., ::-1, :]
    for name in ("portrait_surface", "surface", "depth", "head_weight", "seen"):
        row[name] = row[name][..., ::-1]
    row["flow"] = row["flow"] * np.float32([-1, 1])
    left, top, right, bottom = np.moveaxis(row["boxes"], -1, 0)
    row["boxes"] = np.stack([1 - right, top, 1 - left, bottom], -1)
    row["motion"] = mirrored(row["motion"])
    return row


def _recoloured(key: Array, batch: dict[str, Array], amount: float) -> tuple[Array, Array]:
    """Frames and portraits in [-1, 1], the colours of each person changed alike."""
    portrait, frames = batch["portrait"], batch["frames"]
    gain_key, power_key, grey_key = jax.random.split(key, 3)
    b = len(portrait)
    gain = jnp.exp(amount * jax.random.normal(gain_key, (b, 1, 1, 1, 3)))
    power = jnp.exp(amount * jax.random.normal(power_key, (b, 1, 1, 1, 1)))
    is_grey = jax.random.uniform(grey_key, (b, 1, 1, 1, 1)) < 0.1
    x = jnp.concatenate([portrait[:, None], frames], 1).astype(jnp.float32) / 255
    # Black has no slope of its power.
    x = jnp.clip(gain * jnp.maximum(x, 1e-4) ** power, 0, 1)
    x = jnp.where(is_grey, x.mean(-1, keepdims=True), x)
    return 2 * x[:, 1:] - 1, 2 * x[:, 0] - 1


def _inside(boxes: Float[Array, "f 3 4"], side: int, margin: float = 0.025) -> Array:
    """1 in each of the boxes, widened by a margin: f 3 h w."""
    at = ((jnp.arange(side) + 0.5) / side).reshape(1, 1, side)
    left, top, right, bottom = (boxes[..., i, None] for i in range(4))
    x = (at > left - margin) & (at < right + margin)
    y = (at > top - margin) & (at < bottom + margin)
    return (y[..., :, None] & x[..., None, :]).astype(jnp.float32)


def _picture_terms(out: Any, truth: Array, weight: Array) -> dict[str, Scalar]:
    error = out.picture - truth
    rows = weight[:, 1:] * jnp.abs(jnp.diff(error, axis=1))
    columns = weight[:, :, 1:] * jnp.abs(jnp.diff(error, axis=2))
    return dict(pixel=jnp.mean(weight * jnp.abs(error)), edges=jnp.mean(rows) + jnp.mean(columns))


def _flow_terms(
    out: Any, batch: dict[str, Array], truth: Array, weight: Array
) -> dict[str, Scalar]:
    """Flow and mask where a person is, paint where the portrait does not show them, outline."""
    small = shrunk(weight, FLOW)
    flow = batch["flow"].reshape(-1, FLOW, FLOW, 2)
    seen = batch["seen"].reshape(-1, FLOW, FLOW, 1).astype(jnp.float32)
    surface = batch["surface"].reshape(-1, SIDE, SIDE, 1).astype(jnp.float32) / 255
    is_person = (shrunk(surface, FLOW) > 0.5).astype(jnp.float32)
    part = SIDE * small * seen * is_person
    mask = shrunk(out.mask, FLOW)
    hidden = small * (1 - seen) * is_person
    colour = jnp.abs(shrunk(out.colour - truth, FLOW))
    return dict(
        flow=jnp.mean(part * jnp.abs(shrunk(out.flow, FLOW) - flow)),
        coarse=jnp.mean(part * jnp.abs(out.coarse - flow)),
        mask=jnp.mean(small * is_person * _cross_entropy(mask, seen)),
        paint=jnp.mean(hidden * colour),
        outline=2 * jnp.mean(_cross_entropy(jax.nn.sigmoid(out.outline), surface)),
    )


def _portrait_terms(ready: Any, batch: dict[str, Array]) -> dict[str, Scalar]:
    """Surface, depth and head weight of the portrait."""
    surface = batch["portrait_surface"][..., None].astype(jnp.float32) / 255
    is_person = (shrunk(surface, FLOW) > 0.9).astype(jnp.float32)[..., 0]
    depth = jnp.abs(ready.head.depth[..., 0] - batch["depth"][:, 0])
    share = jnp.abs(ready.head.weight[..., 0] - batch["head_weight"][:, 0])
    return dict(
        surface=2 * jnp.mean(_cross_entropy(jax.nn.sigmoid(ready.surface), surface)),
        shape=jnp.mean(is_person * (4 * depth + share)),
    )


def _cross_entropy(share: Array, truth: Array) -> Array:
    share = jnp.clip(share, 1e-4, 1 - 1e-4)
    return -(truth * jnp.log(share) + (1 - truth) * jnp.log(1 - share))


def _psnr(x: np.ndarray, truth: np.ndarray, where: np.ndarray | None = None) -> float:
    error = ((x.astype(np.float32) - truth) ** 2).mean(-1)
    return float(frame_psnr(error, where).mean())
