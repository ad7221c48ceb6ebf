"""Flow matching of the transformer on clips: a teacher (stage 0), or diffusion forcing (stage 1).

    clean latents --noise level per block--> noisy --DiT--> velocity --weighted error
    portrait, speech features, prompt -----------------^

A teacher sees whole clips at one noise level, in both directions. In diffusion forcing every block
has a level of its own, sees itself and the blocks before it, and the portrait stands at another
distance in every clip.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float

from jax_avatar.data.latents import Clips
from jax_avatar.data.windows import Windows, check_fit
from jax_avatar.diffusion.flow import add_noise
from jax_avatar.diffusion.sampling import Sampling
from jax_avatar.diffusion.schedule import gaussian_weight, level_of_draw
from jax_avatar.models.conditions import Conditions
from jax_avatar.models.config import DiTConfig
from jax_avatar.models.dit import DiT
from jax_avatar.models.lora import init_adapter
from jax_avatar.models.network import Network
from jax_avatar.models.tokens import LAST_FRAME, MOTION_LATENTS
from jax_avatar.shapes import Array, Latent, PyTree
from jax_avatar.training.adapters import AdapterConfig, FrozenBase
from jax_avatar.training.run.step import LoopConfig
from jax_avatar.training.stages.mouth_reader import fit_mouth_reader
from jax_avatar.training.stages.task import LossTask, OnClips
from jax_avatar.training.stages.validation import LEVELS_SEED, FlowValidation, levels_in_bins

__all__ = ["ForcingConfig", "ForcingFiles", "ForcingTask"]

_LEVELS = 1000  # that noise is drawn from, before the shift
_SCAFFOLD = 73  # folded into a key
_SMALLEST_WEIGHT = 0.1  # noise level below which "clean" weights stay


@dataclass(frozen=True)
class ForcingConfig(AdapterConfig):
    """Batches, noise levels, conditions and loss; the defaults are the paper's stage 1.

    Attributes, with those of `AdapterConfig`:
        batch_size: clips per step.
        latents: latent frames per clip, whole blocks.
        still_share: share of every person's windows to train on, those nearest to the portrait.
            A small network trained for an hour blurs large movements of the head.
        form: of the transformer, "block_causal" or "bidirectional".
        audio_context: what a block of the form "block_causal" hears of the time before it:
            "block_reset", nothing, or "clip", what the window has. A stream does the same as the
            student. "bidirectional" hears the window as one.
        shift: moves noise levels toward noise; uniform levels before the shift.
        shared_share: share of the clips whose blocks all have the same noise level.
        smallest_sigma: levels are drawn between this one and 1; at least the network's own
            `smallest_sigma`.
        audio_dropout: share of the clips whose speech features are zeros.
        text_dropout: share of the clips whose prompt is the negative prompt, or zeros.
        reference_dropout: share of the clips whose portrait is zeros.
        reference_noise: largest deviation of the noise added to the portrait.
        shift_max: clips start at a latent frame drawn from 0 to this.
        sink: where the portrait stands in time: "follow", ahead of the clip's first frame by
            `reference_frames`, or "fixed", at the model's frame while the clip moves away.
        reference_frames: inclusive range of that distance, drawn per clip.
        weight: of the error at a noise level: "uniform", "gaussian", which is 0 at pure noise, or
            "clean", which makes it the error of the clean prediction.
        motion_frames: "none", or "scaffold": the network's motion packer sees the 19 latents before
            the window, each noised to a level of its own, uniform within 0..1; stage 2 drops them.
            The packer is frozen beside adapters, and trained with the rest without.
        mouth_weight: weight of the latents around the mouth; all others have 1.
        mouth_probe_weight: weight of the error of the lip gap read from the predicted clean
            latents by a linear map fitted beforehand; 0 leaves it out.
    """

    batch_size: int = 128
    latents: int = 21
    still_share: float = 1.0
    form: str = "block_causal"
    audio_context: str = "block_reset"
    shift: float = 5.0
    shared_share: float = 0.0
    smallest_sigma: float = 0.0
    audio_dropout: float = 0.15
    text_dropout: float = 0.1
    reference_dropout: float = 0.0
    reference_noise: float = 0.0
    shift_max: int = 1003
    sink: str = "follow"
    reference_frames: tuple[int, int] = (22, 30)
    weight: str = "uniform"
    motion_frames: str = "none"
    mouth_weight: float = 1.0
    mouth_probe_weight: float = 0.0

    CHOICES = {
        "form": ("block_causal", "bidirectional"),
        "audio_context": Sampling.CHOICES["audio_context"],
        "sink": ("follow", "fixed"),
        "weight": ("uniform", "gaussian", "clean"),
        "motion_frames": ("none", "scaffold"),
    }
    SHARES = (
        "still_share", "shared_share", "smallest_sigma", "audio_dropout", "text_dropout",
        "reference_dropout",
    )  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "reference_frames", tuple(self.reference_frames))
        for name, choices in self.CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"task.{name} {getattr(self, name)!r} must be one of {', '.join(choices)}."
                )
        for name in self.SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"task.{name} {getattr(self, name)} must be within 0..1.")
        if min(self.batch_size, self.latents) < 1:
            raise ValueError("task.batch_size and task.latents must be at least 1.")
        low, high = self.reference_frames
        if not 0 <= low <= high:
            raise ValueError(
                f"task.reference_frames {self.reference_frames} must be two numbers of latent "
                "frames, the smaller first, for example (22, 30)."
            )
        room = LAST_FRAME - max(self.latents - 1, high)
        if not 0 <= self.shift_max <= room:
            raise ValueError(
                f"task.shift_max {self.shift_max} must be within 0..{room}, since rotary frames "
                f"end at {LAST_FRAME}."
            )

        if self.motion_frames == "scaffold" and self.form != "block_causal":
            raise ValueError(
                f"task.motion_frames='scaffold' is for task.form='block_causal', {self.form!r} "
                "came: a teacher is asked without motion frames. Set task.motion_frames=none."
            )

    @property
    def motion_latents(self) -> int:
        """Latents before the window that the network sees."""
        return MOTION_LATENTS if self.motion_frames == "scaffold" else 0

    def sampling(self) -> dict[str, Any]:
        """Settings of `Sampling` that a stream must share, as plain values."""
        is_causal = self.form == "block_causal"
        return {"audio_context": self.audio_context} if is_causal else {}


@dataclass(frozen=True)
class ForcingFiles:
    """Inputs and outputs of a task beside its training clips.

    Attributes:
        start: reads the parameters to start from, instead of random ones, for a mesh if there is
            one; with adapters they are the frozen base.
        held_out: reads clips to validate on; None where there are none.
        stream: stream settings that go with the transformer, instead of the model's.
        export: writes the model folder: `(folder, parameters, metadata, adapter=...)`, the latter
            two as `export_model` takes them.
    """

    start: Callable[[Mesh | None], PyTree] | None = None
    held_out: Callable[[], Clips | None] = lambda: None
    stream: Mapping[str, Any] = field(default_factory=dict)
    export: Callable[..., None] | None = None


class ForcingTask(OnClips, LossTask):
    """Flow matching as a training task: parameters, batches, loss."""

    by_clip = True

    def __init__(
        self,
        model: DiTConfig,
        settings: ForcingConfig,
        clips: Clips,
        *,
        network: type[DiT] = DiT,
        pose: str = "zeros",
        seed: int = 0,
        name: str = "diffusion_forcing",
        files: ForcingFiles | None = None,
    ):
        """Checks that the parts fit together.

        Args:
            model: size of the transformer.
            settings: batches, noise levels, conditions and loss.
            clips: to train on.
            network: the transformer, `DiT` or `PortraitDiT`.
            pose: what its pose input carries: "zeros", or "reference", the portrait.
            seed: of the order of the clips.
            name: of the stage, for the progress bar.
            files: what is read and written beside the clips.
        """
        check_fit(clips, model, settings.latents, motion=settings.motion_latents)
        if settings.motion_latents and not model.framepack:
            raise ValueError(
                f"task.motion_frames={settings.motion_frames!r} needs the network's motion packer; "
                "leave model.framepack out, or set it to True."
            )
        network.check_level("task.smallest_sigma", settings.smallest_sigma)
        if settings.mouth_probe_weight and not clips.has_lips:
            raise ValueError(
                f"task.mouth_probe_weight={settings.mouth_probe_weight} needs clips whose lips are "
                "known, as rendered ones are; set it to 0."
            )
        self.model, self.settings, self.clips = model, settings, clips
        self.name, self.seed, self._pose = name, seed, pose
        self._files = files or ForcingFiles()
        self.windows = self._windows(clips, settings.still_share)
        self.transformer = self._trained = Network.abstract(network, model)
        if settings.adapter_rank:
            self._trained = Network.abstract(network, settings.adapted(model))
        self.base = FrozenBase(self._start_or_draw)
        self.reader = None
        if settings.mouth_probe_weight:
            few = clips.take(slice(None, None, max(1, len(clips) // 800)))
            self.reader = fit_mouth_reader(few)

    @property
    def stream_settings(self) -> Mapping[str, Any]:
        """Stream settings that go with the transformer, instead of the model's."""
        return self._files.stream

    def evaluations(self, config: LoopConfig, mesh: Mesh) -> list[FlowValidation]:
        """The error of the velocity on held-out clips, where there are any."""
        held_out = self._files.held_out() if config.validation_clips else None
        if held_out is None:
            return []
        windows, frozen = self._windows(held_out), self.frozen(mesh)

        def errors(weights, base, batch):
            def one(clip):
                key = jax.random.fold_in(jax.random.key(LEVELS_SEED), clip["row"])
                return self.flow_errors(weights, jax.tree.map(lambda x: x[None], clip), key, base)

            return jax.vmap(one, spmd_axis_name="data")(batch)

        return [
            FlowValidation(
                errors,
                lambda rows: windows.batch(0, rows) | {"row": rows.astype(np.int32)},
                mesh,
                count=min(config.validation_clips, len(windows.windows)),
                at_once=self.batch_size // config.accumulate,
                beside=lambda state: frozen,
            )
        ]

    def flow_errors(
        self, params: PyTree, batch: Mapping[str, Array], key: Array, frozen: PyTree | None = None
    ) -> Float[Array, " n"]:
        """Mean square error of the velocity of clips in every bin of the noise level.

        Every latent has the level of its bin and nothing is dropped; the error has no weights.
        """
        params, clean = self.settings.bind(frozen)(params), batch["latent"]
        level_key, noise_key, place_key = jax.random.split(key, 3)
        noise = jax.random.normal(noise_key, clean.shape)
        conditions = self.conditions(batch, key)

        def error(level):
            sigma = jnp.full(clean.shape[:2], level)
            noised = add_noise(clean, noise, level)
            velocity = self.velocity(params, noised, sigma, conditions, place_key)
            return jnp.mean((velocity - (noise - clean)) ** 2)

        return jax.lax.map(error, levels_in_bins(level_key))

    def _windows(self, clips: Clips, still_share: float = 1.0) -> Windows:
        return Windows.for_model(
            clips,
            self.model,
            self.settings,
            seed=[self.seed, 1],
            still_share=still_share,
            motion=self.settings.motion_latents,
        )

    def init(self, key: Array) -> PyTree:
        """Random parameters or those to start from; or a fresh adapter."""
        if self.settings.adapter_rank:
            return init_adapter(self.transformer.params, self.settings.adapter_rank, key)
        return self._start_or_draw(None, key)

    def frozen(self, mesh: Mesh | None = None) -> PyTree | None:
        """The base that an adapter lies beside, spread over a mesh."""
        return self.base.on(mesh) if self.settings.adapter_rank else None

    @property
    def streamed(self) -> Network:
        """Structure and size of the transformer, with adapters if there are any."""
        return self._trained

    def bound(self, params: PyTree, mesh: Mesh | None = None) -> PyTree:
        """Parameters of the transformer, adapters beside the base, from what is trained."""
        return self.settings.bind(self.frozen(mesh))(params)

    @property
    def source(self) -> Callable[..., dict[str, np.ndarray]]:
        """`batches` without the task, for other processes."""
        return self.windows.batch

    def batches(self, step: int, rows: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The batch of a step, or some of its rows; see `Windows.batch`."""
        return self.windows.batch(step, rows)

    def loss(
        self, params: PyTree, batch: Mapping[str, Array], key: Array, frozen: PyTree | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """Weighted error of the velocity, and its parts."""
        settings, clean = self.settings, batch["latent"]
        params = settings.bind(frozen)(params)
        noise_key, level_key, drop_key, place_key = jax.random.split(key, 4)
        noise = jax.random.normal(noise_key, clean.shape)
        sigma = self.sigmas(level_key, *clean.shape[:2])
        wide = sigma[:, :, None, None, None]
        noisy = add_noise(clean, noise, wide)
        conditions, heard = self.dropped_conditions(batch, drop_key)
        velocity = self.velocity(params, noisy, sigma, conditions, place_key)

        square = jnp.mean((velocity - (noise - clean)) ** 2, axis=-1)
        square = square * self.level_weight(sigma)[:, :, None, None]
        weight = 1 + (settings.mouth_weight - 1) * batch["mouth"]
        loss = jnp.sum(square * weight) / jnp.sum(weight)
        predicted = noisy - wide * velocity
        metrics = {"flow": loss} | _errors(predicted, clean, square, sigma, batch["mouth"])
        if self.reader:
            gap = self.reader(predicted, batch["reference"], batch["mouth"])
            gap_error = ((gap - batch["lip_gap"]) / self.reader.spread) ** 2
            probe = jnp.mean(gap_error * heard[:, None])
            loss = loss + settings.mouth_probe_weight * probe
            metrics["probe"] = probe
        return loss, metrics

    def _start_or_draw(self, mesh: Mesh | None, key: Array | None = None) -> PyTree:
        if self._files.start:
            return self._files.start(mesh)
        key = jax.random.key(self.seed) if key is None else key
        build = self.transformer.module_class
        return Network.of(build(self.model, rngs=nnx.Rngs(params=key))).params

    def export(self, weights: PyTree, folder: str | Path, metadata: Mapping[str, Any]) -> None:
        """Writes a model folder, where `ForcingFiles.export` says how."""
        if self._files.export:
            params, adapter = self.settings.stored(self.base, weights)
            self._files.export(folder, params, metadata, adapter=adapter)

    def conditions(self, batch: Mapping[str, Array], key: Array) -> Conditions:
        """Conditions of clips, with the latents before them where the network sees any."""
        return Conditions.of_portrait(
            *(self.model, batch["reference"]),
            pose=self._pose,
            text=batch["text"],
            audio=batch["features"],
            motion=self.scaffold(batch, key),
        )

    def dropped_conditions(
        self, batch: Mapping[str, Array], key: Array
    ) -> tuple[Conditions, Array]:
        """Conditions with some of them dropped, and True for clips that keep their speech."""
        settings, reference = self.settings, batch["reference"]
        audio_key, text_key, face_key, level_key, noise_key = jax.random.split(key, 5)

        def kept(key, dropout):
            return jax.random.uniform(key, (len(reference),)) >= dropout

        heard = kept(audio_key, settings.audio_dropout)
        prompted = kept(text_key, settings.text_dropout)[:, None, None]
        shown = kept(face_key, settings.reference_dropout)[:, None, None, None, None]
        level = settings.reference_noise * jax.random.uniform(level_key, shown.shape)
        reference = reference + level * jax.random.normal(noise_key, reference.shape)
        left = {
            "reference": reference * shown,
            "features": batch["features"] * heard[:, None, None, None, None],
            "text": jnp.where(prompted, batch["text"], batch["null_text"]),
        }
        return self.conditions({**batch, **left}, key), heard

    def scaffold(self, batch: Mapping[str, Array], key: Array) -> Array | None:
        """Latents before the clip, each at a level of its own, where the network sees any.

        Source: Live Avatar (arXiv 2512.04677), version 5.
        """
        if not self.settings.motion_latents:
            return None
        motion = batch["motion"]
        # No other number of this key: splits of it may be the same as its first ones.
        level_key, noise_key = jax.random.split(jax.random.fold_in(key, _SCAFFOLD))
        sigma = jax.random.uniform(level_key, motion.shape[:2])[:, :, None, None, None]
        return add_noise(motion, jax.random.normal(noise_key, motion.shape), sigma)

    def velocity(
        self,
        params: PyTree,
        noisy: Latent,
        sigma: Float[Array, "b t"],
        conditions: Conditions,
        key: Array,
    ) -> Latent:
        """Velocity of noisy clips, in the form of the transformer that is trained."""
        inputs = (noisy, 1000 * sigma, conditions)
        dit = self._trained.bind(params)
        if self.settings.form == "bidirectional":
            return dit.bidirectional(*inputs)
        first, face = self.places(key, len(noisy))
        return dit.block_causal(
            *inputs,
            first_frame=first,
            reference_frame=face,
            past_blocks=self.model.ring_blocks - 1,
            audio_context=self.settings.audio_context,
        )

    def places(self, key: Array, b: int) -> tuple[Array, Array]:
        """Rotary frames at which every clip starts and its portrait stands."""
        settings = self.settings
        first_key, ahead_key = jax.random.split(key)
        first = jax.random.randint(first_key, (b,), 0, settings.shift_max + 1)
        if settings.sink == "fixed":
            return first, jnp.full((b,), self.model.reference_frame)
        low, high = settings.reference_frames
        return first, first + jax.random.randint(ahead_key, (b,), low, high + 1)

    def sigmas(self, key: Array, b: int, t: int) -> Float[Array, "b t"]:
        """Noise level of every latent frame, equal inside a block."""
        settings, size = self.settings, self.model.frames_per_block
        level_key, shared_key = jax.random.split(key)
        draw = jax.random.randint(level_key, (b, t // size), 1, _LEVELS + 1)
        shared = jax.random.uniform(shared_key, (b, 1)) < settings.shared_share
        draw = jnp.where(shared, draw[:, :1], draw)
        low = settings.smallest_sigma
        sigma = low + (1 - low) * level_of_draw(draw, settings.shift)
        return jnp.repeat(sigma, size, axis=1)

    def level_weight(self, sigma: Float[Array, "b t"]) -> Float[Array, "b t"]:
        """Weight of the error at noise levels."""
        if self.settings.weight == "gaussian":
            return gaussian_weight(sigma, self.settings.shift)
        if self.settings.weight == "clean":
            return jnp.maximum(sigma, _SMALLEST_WEIGHT) ** 2
        return jnp.ones_like(sigma)


def _errors(predicted: Latent, clean: Latent, square, sigma, mouth) -> dict[str, Array]:
    """Parts of the error that tell how lips come along."""
    high_noise = (sigma > 0.8).astype(jnp.float32)[:, :, None, None]
    error = jnp.mean((predicted - clean) ** 2, axis=-1)
    return {
        "mouth_error": _weighted_mean(square, mouth),
        "clean_error_high": _weighted_mean(error, jnp.broadcast_to(high_noise, error.shape)),
        "mouth_error_high": _weighted_mean(error, mouth * high_noise),
    }


def _weighted_mean(value: Array, weight: Array) -> Array:
    return jnp.sum(value * weight) / (jnp.sum(weight) + 1e-6)
