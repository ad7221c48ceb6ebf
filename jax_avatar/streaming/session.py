"""Audio in, video out: one avatar, one stream.

    samples --level, speech encoder--> features --Algorithm 3 or 4--> latents --VAE--> RGB frames
    (host)                             (per block)                   (promises)  (when ready)

The loop never waits for the newest block: frames are fetched when they are ready, or when more
blocks than `in_flight` are under way. They leave the VAE in pieces, as many latents at a time as
the model's settings say.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from jax_avatar.models.conditions import Conditions
from jax_avatar.models.dit import MOTION_LATENTS
from jax_avatar.models.params import merge
from jax_avatar.shapes import Array, Float
from jax_avatar.streaming.format import StreamFormat
from jax_avatar.streaming.mesh import Layout, make_mesh
from jax_avatar.streaming.pipeline import PipelinedStream
from jax_avatar.streaming.plan import StreamPlan, check_slices
from jax_avatar.streaming.sample_queue import SampleQueue
from jax_avatar.streaming.sampler import SequentialStream
from jax_avatar.streaming.working_level import WorkingLevel
from jax_avatar.weights.folder import AvatarModel
from jax_avatar.weights.settings import StreamSettings

__all__ = [
    "DROPPED_FRAMES",
    "AvatarSession",
    "NotFinite",
    "SessionTimes",
    "make_decode",
    "make_encode",
    "num_slices",
]

DROPPED_FRAMES = 3
"""Frames at the start that are thrown away: the first block's first latent is decoded next to the
still portrait; the release drops the frames of that transition, and so does this."""


@dataclass
class SessionTimes:
    """Timestamps of a session, in seconds of its clock.

    Attributes:
        started: first samples came in.
        first_frame: first frames were fetched; None before that.
        last_frame: latest frames were fetched.
        blocks: per block, from handing it to the devices until its frames were fetched.
    """

    started: float | None = None
    first_frame: float | None = None
    last_frame: float | None = None
    blocks: deque = field(default_factory=lambda: deque(maxlen=10_000))


class NotFinite(ValueError):
    """The networks' output is NaN or infinity, which would be a black video."""


def num_slices(layout: Layout) -> int:
    """Devices that a session uses, the speech encoder's on a CPU included."""
    return layout.num_devices + 1


def make_decode(graphdef: Any) -> tuple[Callable, Callable]:
    """The compiled decoders of a VAE: latents -> uint8 pixels, with the state of the stream.

    Args:
        graphdef: structure of the VAE, from `split`.

    Returns:
        `(params, latents) -> (pixels, is_finite, state)` for the first latents, and
        `(params, state, latents) -> (pixels, is_finite, state)` for all others; the state is
        donated. `is_finite` is False where the pixels would be NaN or infinity, which are black.
    """

    def decoder(method):
        def decode(params, *arguments):
            video, state = getattr(merge(graphdef, params), method)(*arguments)
            video = video.astype(jnp.float32)
            pixels = jnp.round((jnp.clip(video, -1, 1) + 1) * 127.5)
            return pixels.astype(jnp.uint8), jnp.isfinite(video).all(), state

        return decode

    first, following = decoder("decode_first"), decoder("decode_next")
    return jax.jit(first), jax.jit(following, donate_argnums=1)


def make_encode(graphdef: Any, settings: StreamSettings) -> Callable[..., tuple[Array, Array]]:
    """The compiled encoder of portraits that stand still, as long as the stream needs it.

    Args:
        graphdef: structure of the VAE, from `split`.
        settings: of the stream.

    Returns:
        `(params, portraits) -> (latents, error)`; the error of the first latents, decoded again, is
        RMS.
    """
    latents = settings.warmup_latents
    if settings.motion == "still":
        latents = max(latents, MOTION_LATENTS)
    frames = 1 + 4 * (latents - 1)

    @jax.jit
    def encode(params, portrait):
        vae = merge(graphdef, params)
        video = (len(portrait), frames, *portrait.shape[2:])
        still = vae.encode(jnp.broadcast_to(portrait, video))
        again = jnp.clip(vae.decode_first(still[:, :1])[0], -1, 1)
        return still, jnp.sqrt(jnp.mean((again - portrait) ** 2))

    return encode


class AvatarSession:
    """A portrait that speaks the given audio.

    Frame `j` of the video shows time `j / fps` of the audio: nothing leads, nothing lags.
    """

    def __init__(
        self,
        model: AvatarModel,
        portrait: Float[np.ndarray, "1 1 H W 3"],
        layout: Layout,
        *,
        seed: int = 420,
        text: Array | None = None,
        devices: list[jax.Device] | None = None,
        in_flight: int = 2,
    ):
        """Places the networks, encodes the portrait, prefills the sink.

        Args:
            model: from `load_model`.
            portrait: in [-1, 1], sides as the stream's.
            layout: from `parse_layout`.
            seed: of the noise.
            text: prompt states `1 p f`; zeros if not given.
            devices: candidates in order; all if not given.
            in_flight: finished blocks that may wait to be fetched.
        """
        settings, dit = model.settings, model.dit
        check_slices(settings, layout.stages)
        self.model, self.layout = model, layout
        mesh, self._vae_device = make_mesh(layout, devices)
        self._in_flight = in_flight
        self.block_frames = 4 * dit.config.frames_per_block
        self._piece_latents = settings.piece_latents(dit.config.frames_per_block)
        self.piece_frames = 4 * self._piece_latents
        self.speech = model.speech.config

        self._vae_params = jax.device_put(model.vae.params, self._vae_device)
        self._encode = make_encode(model.vae.graphdef, settings)
        self._size = None
        self._text_type = jnp.float32 if text is None else text.dtype
        conditions = self._conditions(portrait, text)
        plan = StreamPlan.from_settings(settings, seed)
        arguments = (dit.graphdef, dit.params, dit.config, plan, conditions)
        if layout.is_sequential:
            self.stream = SequentialStream(*arguments, device=mesh.devices[0, 0])
        else:
            self.stream = PipelinedStream(*arguments, mesh)
        host = _host_device() if settings.speech_device == "host" else None
        self._speech_device = host or self._vae_device
        self._speech_params = jax.device_put(model.speech.params, self._speech_device)
        self._features = jax.jit(self._make_features())
        self._decode_first, self._decode = make_decode(model.vae.graphdef)
        self._begin()

    def reset(
        self, portrait: Float[np.ndarray, "1 1 H W 3"] | None = None, *, text: Array | None = None
    ) -> None:
        """Back to the first frame: empty windows, the portrait in the sink.

        Args:
            portrait: of the new stream, in the size of the first; the last one if not given.
            text: prompt states for the new portrait; zeros if not given.
        """
        conditions = None if portrait is None else self._conditions(portrait, text)
        self.stream.reset(conditions)
        self._begin()

    def _begin(self) -> None:
        self.times = SessionTimes()
        warmup = self._still[:, : self.model.settings.warmup_latents]
        put = lambda x: jax.device_put(jnp.asarray(x), self._vae_device)  # noqa: E731
        *_, self._vae_state = self._decode_first(self._vae_params, put(warmup[:, :1]))
        if warmup.shape[1] > 1:
            *_, self._vae_state = self._decode(
                self._vae_params, self._vae_state, put(warmup[:, 1:])
            )
        # Video frame j of the stream is frame j - 3 of the output; silence comes before.
        self._samples = SampleQueue()
        self._samples.append(np.zeros(DROPPED_FRAMES * self.speech.samples_per_frame, np.float32))
        self._level = WorkingLevel(self.speech.sample_rate)
        self._speech_state = self._recording = None
        self._blocks_in = self._pieces_decoded = self._pieces_out = 0
        self._num_samples = 0
        self._frames_out = 0
        self._pending: deque = deque()
        self._submitted: deque = deque()

    @property
    def format(self) -> StreamFormat:
        """Rates and sizes of picture and sound."""
        fps, height, width = self.model.settings.fps, *self._size[2:4]
        frames = (self.block_frames, self.piece_frames)
        return StreamFormat(fps, self.speech.sample_rate, height, width, *frames)

    @property
    def pieces_per_block(self) -> int:
        """Pieces in which the frames of a block leave the VAE."""
        return self.block_frames // self.piece_frames

    def shared_model(self) -> AvatarModel:
        """The model with its weights where this session put them, for more of its kind."""
        model = self.model
        return replace(
            model,
            dit=replace(model.dit, params=self.stream.params),
            vae=replace(model.vae, params=self._vae_params),
            speech=replace(model.speech, params=self._speech_params),
        )

    def warm_up(self) -> None:
        """Compiles everything by streaming silence, and starts anew."""
        renewal = self.model.settings.aas_after_blocks
        blocks = max(renewal + 1, self.layout.stages + 1)
        silence = np.zeros(self.block_frames * self.speech.samples_per_frame, np.float32)
        for _ in range(blocks):
            for _ in self.push(silence):
                pass
        for _ in self.finish():
            pass
        self.reset()

    def part_seconds(self, blocks: int = 4) -> dict[str, float]:
        """Seconds per block of each part of a warm session, run one after the other.

        Streams silence and waits for every part, which a stream never does; then starts anew.

        Args:
            blocks: to take the median of.

        Returns:
            Seconds of "speech", the encoder; of "step", an evaluation of the transformer or, of a
            pipeline, what each slice does in a tick over its evaluations; of "vae", pixels
            included.
        """
        self.reset()
        names = ("speech", "step", "vae")
        moments = []
        for _ in range(self.layout.stages + blocks):
            self._hear(np.zeros(self.samples_wanted, np.float32))
            moment = [time.perf_counter()]
            features = np.asarray(self._next_features())
            moment.append(time.perf_counter())
            latents = jax.block_until_ready(self.stream.push(features))
            moment.append(time.perf_counter())
            self._decode_all(latents)
            jax.block_until_ready(self._vae_state)
            moment.append(time.perf_counter())
            moments.append(moment)
        self.reset()
        # The first blocks fill the pipeline: nothing comes out that could be waited for.
        speech, denoising, vae = np.median(np.diff(moments[-blocks:], axis=1), axis=0)
        steps = self.model.settings.num_evaluations / self.layout.stages
        return dict(zip(names, (float(speech), float(denoising / steps), float(vae)), strict=True))

    def push(self, samples: Float[np.ndarray, " N"]) -> Iterator[np.ndarray]:
        """Feeds audio as it comes; yields the frames that are ready.

        With the setting `audio_window="whole"` frames come from `finish` only.

        Args:
            samples: mono in [-1, 1] at the speech encoder's rate, any number.

        Yields:
            `[T H W 3]` uint8, in order.
        """
        self._hear(samples)
        while self._take_block():
            yield from self._collect(self._in_flight)

    def feed(self, samples: Float[np.ndarray, " N"]) -> int:
        """Feeds audio without fetching frames: that is left to `fetch`, in this thread or another.

        Args:
            samples: as for `push`; `samples_wanted` of them make one block.

        Returns:
            How many pieces can be fetched from now on, in addition to those before.
        """
        self._hear(samples)
        before = self._pieces_decoded
        while self._take_block():
            pass
        return self._pieces_decoded - before

    def fetch(self) -> UInt8[np.ndarray, "T H W 3"]:
        """Waits for the oldest piece that `feed` has promised: `piece_frames`, the first fewer."""
        return self._next_frames()

    @property
    def samples_wanted(self) -> int:
        """Samples missing until the next block can be taken."""
        start, stop = self.speech.sample_range(0, self.block_frames)
        return (stop if self._speech_state is None else stop - start) - len(self._samples)

    def set_text(self, text: Array) -> None:
        """Changes the prompt from the next block on, which keeps it through all denoising steps.

        Args:
            text: prompt states `1 p f`.
        """
        self.stream.set_text(self._padded(text))

    def finish(self) -> Iterator[np.ndarray]:
        """Ends the audio; yields the remaining frames, up to its last one."""
        per_frame = self.speech.samples_per_frame
        wanted = -(-self._num_samples // per_frame)
        if self._is_whole and wanted:
            self._recording = self._hear_recording(wanted)
        while self._frames_promised < wanted:
            self._samples.append(np.zeros(self.block_frames * per_frame, np.float32))
            while self._frames_promised < wanted and self._take_block():
                yield from self._collect(self._in_flight, wanted)
        self._decode_all(self.stream.finish())
        yield from self._collect(0, wanted)

    @property
    def _is_whole(self) -> bool:
        return self.model.settings.audio_window == "whole"

    @property
    def _frames_promised(self) -> int:
        return max(0, self._blocks_in * self.block_frames - DROPPED_FRAMES)

    def _hear(self, samples: np.ndarray) -> None:
        if self.times.started is None:
            self.times.started = time.perf_counter()
        self._num_samples += len(samples)
        self._samples.append(self._level(samples))

    def _take_block(self) -> bool:
        """Hands the next block to the devices if its audio is there."""
        features = self._next_of_recording() if self._is_whole else self._next_features()
        if features is None:
            return False
        self._submitted.append(time.perf_counter())
        # Only the speech encoder is waited for; it has a device of its own.
        self._decode_all(self.stream.push(np.asarray(features)))
        self._blocks_in += 1
        return True

    def _next_features(self) -> Array | None:
        """Features of the next block if its audio has come."""
        if self.samples_wanted > 0:
            return None
        start, stop = self.speech.sample_range(0, self.block_frames)
        count = stop - start
        if self._speech_state is None:
            heard = self._samples.take(stop)
            self._speech_state = self._start_speech(heard[: max(0, start)])
            # With less look-ahead than a frame, the first chunk begins before the audio.
            chunk = np.pad(heard, (max(0, -start), 0))[-count:]
        else:
            chunk = self._samples.take(count)
        with jax.default_device(self._speech_device):
            features, self._speech_state = self._features(
                self._speech_params, self._speech_state, chunk[None, None]
            )
        return features

    def _next_of_recording(self) -> np.ndarray | None:
        """Features of the next block if the audio has ended."""
        if self._recording is None:
            return None
        first = self._blocks_in * self.block_frames
        return self._recording[:, :, first : first + self.block_frames]

    def _hear_recording(self, wanted: int) -> np.ndarray:
        """Features of all blocks, from all of the audio at once."""
        blocks = -(-(wanted + DROPPED_FRAMES) // self.block_frames)
        frames = blocks * self.block_frames - DROPPED_FRAMES
        graphdef = self.model.speech.graphdef
        heard = self._samples.take(len(self._samples))[
            DROPPED_FRAMES * self.speech.samples_per_frame :
        ]
        with jax.default_device(self._speech_device):
            features = jax.jit(lambda params, wave: merge(graphdef, params).encode(wave, frames))(
                self._speech_params, heard[None, None]
            )
        # Before the first frame there is more of it, as the transformer itself repeats it.
        return np.pad(features, [(0, 0)] * 2 + [(DROPPED_FRAMES, 0)] + [(0, 0)] * 2, mode="edge")

    def _start_speech(self, head: np.ndarray):
        speech = self.model.speech
        with jax.default_device(self._speech_device):
            return merge(speech.graphdef, self._speech_params).start(jnp.asarray(head)[None, None])

    def _decode_all(self, latents: list) -> None:
        for latent in latents:
            latent = jax.device_put(latent, self._vae_device)
            for start in range(0, latent.shape[1], self._piece_latents):
                piece = latent[:, start : start + self._piece_latents]
                decoded = self._decode(self._vae_params, self._vae_state, piece)
                *pixels_and_flag, self._vae_state = decoded
                for array in pixels_and_flag:
                    array.copy_to_host_async()
                self._pending.append(pixels_and_flag)
                self._pieces_decoded += 1

    def _collect(self, in_flight: int, wanted: int | None = None) -> Iterator[np.ndarray]:
        """Fetches finished frames; waits only while more than `in_flight` blocks are pending."""
        pieces = in_flight * self.pieces_per_block
        while self._pending and (len(self._pending) > pieces or self._pending[0][0].is_ready()):
            frames = self._next_frames()
            if wanted is not None:
                frames = frames[: max(0, wanted - self._frames_out)]
            if len(frames):
                self._frames_out += len(frames)
                yield frames

    def _next_frames(self) -> np.ndarray:
        """Waits for the oldest pending piece.

        Raises:
            NotFinite: it is NaN or infinity.
        """
        pixels, is_finite = self._pending.popleft()
        frames = np.asarray(pixels)[0]
        if not np.asarray(is_finite):  # it came with the pixels
            raise NotFinite(
                f"the output of {self.model.name} is NaN or infinity from frame "
                f"{self._pieces_out * self.piece_frames} on: its weights are too large for "
                "their type, or diverged in training. Convert them again, take an earlier "
                "checkpoint, or stream without --weights."
            )
        now = time.perf_counter()
        self.times.first_frame = self.times.first_frame or now
        self.times.last_frame = now
        self._pieces_out += 1
        if self._pieces_out % self.pieces_per_block == 0:
            self.times.blocks.append(now - self._submitted.popleft())
        return frames[DROPPED_FRAMES:] if self._pieces_out == 1 else frames

    def _conditions(self, portrait: np.ndarray, text: Array | None) -> Conditions:
        """Conditions of a stream from a portrait and a prompt; keeps the still portrait's latents.

        Raises:
            ValueError: the portrait is not of the size of the one before.
        """
        settings, dit = self.model.settings, self.model.dit.config
        if self._size not in (None, portrait.shape):
            raise ValueError(
                f"a portrait of shape {portrait.shape} for a session made for {self._size}; "
                "resize it with prepare_reference."
            )
        self._size = portrait.shape
        placed = jax.device_put(jnp.asarray(portrait, jnp.float32), self._vae_device)
        still, error = self._encode(self._vae_params, placed)
        self._still, self.portrait_error = np.asarray(still), float(error)
        self.reference = self._still[:, :1]
        if text is None:
            text = jnp.zeros((1, 1, dit.text_width), jnp.float32)
        motion = self._still[:, -MOTION_LATENTS:] if settings.motion == "still" else None
        return Conditions.of_portrait(
            dit, self.reference, pose=settings.pose, text=self._padded(text), motion=motion
        )

    def _padded(self, text: Array) -> Array:
        """Prompt states with all rows that the transformer pads them to: one compiled shape."""
        rows = max(0, self.model.dit.config.text_len - text.shape[1])
        return jnp.pad(jnp.asarray(text).astype(self._text_type), ((0, 0), (0, rows), (0, 0)))

    def _make_features(self):
        graphdef = self.model.speech.graphdef

        def features(params, state, samples):
            return merge(graphdef, params).features(state, samples)

        return features


def _host_device() -> jax.Device | None:
    """The last CPU device, which no slice uses, or None where JAX has no CPU backend."""
    try:
        return jax.local_devices(backend="cpu")[-1]
    except RuntimeError:
        return None
