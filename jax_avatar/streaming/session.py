"""Audio in, video out: one avatar, one stream.

    samples --level, speech encoder--> features --Algorithm 3 or 4--> latents --VAE--> RGB frames
    (host)                             (per block)                   (promises)  (when ready)

The loop never waits for the newest block: frames are fetched when they are ready, or when more
blocks than `in_flight` are under way. They leave the VAE in pieces, as many latents at a time as
the model's settings say.
"""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from jax_avatar.layout import Layout, make_mesh, parse_layout
from jax_avatar.models.conditions import Conditions
from jax_avatar.shapes import Array, Float
from jax_avatar.streaming.decode import Decoder
from jax_avatar.streaming.features import DROPPED_FRAMES, SpeechFeatures
from jax_avatar.streaming.format import StreamFormat
from jax_avatar.streaming.pipeline import PipelinedStream
from jax_avatar.streaming.plan import StreamPlan, check_slices
from jax_avatar.streaming.portrait import make_encode, still_conditions
from jax_avatar.streaming.sampler import SequentialStream
from jax_avatar.weights.folder import AvatarModel

__all__ = ["AvatarSession", "SessionTimes", "num_slices"]


@dataclass
class SessionTimes:
    """Timestamps of a session, in seconds of its clock.

    Attributes:
        started: first samples came in.
        first_frame: first frames were fetched; None before that.
        last_frame: latest frames were fetched.
        blocks: per block, from handing it to the devices until its frames were fetched.
        submitted: when each block under way was handed to the devices.
    """

    started: float | None = None
    first_frame: float | None = None
    last_frame: float | None = None
    blocks: deque = field(default_factory=lambda: deque(maxlen=10_000))
    submitted: deque = field(default_factory=deque)

    def fetched(self, *, is_whole_block: bool) -> None:
        """Notes that frames were fetched, of a block the last ones or not."""
        self.last_frame = time.perf_counter()
        self.first_frame = self.first_frame or self.last_frame
        if is_whole_block:
            self.blocks.append(self.last_frame - self.submitted.popleft())


def num_slices(layout: Layout) -> int:
    """Devices that a session uses, the speech encoder's on a CPU included."""
    return layout.num_devices + 1


class AvatarSession:
    """A portrait that speaks the given audio.

    Frame `j` of the video shows time `j / fps` of the audio: nothing leads, nothing lags.

    Attributes:
        model: that is streamed.
        layout: of its devices.
        format: rates and sizes of picture and sound.
        stream: Algorithm 3 or 4.
        decoder: latents -> pixels.
        features: samples -> speech features.
        portrait: `1 1 H W 3` in [-1, 1], where the decoder runs.
        still: latents of the portrait that stands still, on the host.
        times: timestamps since the start.
    """

    def __init__(
        self,
        model: AvatarModel,
        portrait: Float[np.ndarray, "1 1 H W 3"],
        layout: Layout | str = "1",
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
            layout: from `parse_layout`, or what it parses, as "4x2+1".
            seed: of the noise.
            text: prompt states `1 p f`; zeros if not given.
            devices: candidates in order; all if not given.
            in_flight: finished blocks that may wait to be fetched.
        """
        settings, dit = model.settings, model.dit
        model.vae.config.latent_grid(*portrait.shape[2:4])  # refuses what the VAE cannot make
        if isinstance(layout, str):
            layout = parse_layout(layout, settings.num_steps)
        check_slices(settings, layout.stages)
        self.model, self.layout, self._in_flight = model, layout, in_flight
        mesh, self._vae_device = make_mesh(layout, devices)
        self.decoder = Decoder(model, self._vae_device)
        self._encode = make_encode(model.vae, settings)
        self._text_type = jnp.float32 if text is None else text.dtype
        latents = dit.config.frames_per_block
        self.format = StreamFormat(
            settings.fps,
            model.speech.config.sample_rate,
            *portrait.shape[2:4],
            block_frames=4 * latents,
            piece_frames=4 * settings.piece_latents(latents),
        )
        conditions = self._conditions(portrait, text)
        plan = StreamPlan.from_settings(settings, seed)
        if layout.is_sequential:
            self.stream = SequentialStream(dit, plan, conditions, device=mesh.devices[0, 0])
        else:
            self.stream = PipelinedStream(dit, plan, conditions, mesh)
        host = _host_device() if settings.speech_device == "host" else None
        is_whole = settings.audio_window == "whole"
        self.features = SpeechFeatures(
            model.speech, host or self._vae_device, self.format.block_frames, is_whole=is_whole
        )
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
        self.times, self._frames_out = SessionTimes(), 0
        warmup = self.still[:, : self.model.settings.warmup_latents]
        self.decoder.start(self.portrait, jax.device_put(jnp.asarray(warmup), self._vae_device))
        self.features.start()

    @property
    def portrait_error(self) -> float:
        """RMS of the portrait, encoded and decoded again, in pixels within [-1, 1]."""
        return float(self.decoder.portrait_error)

    def shared_model(self) -> AvatarModel:
        """The model with its weights where this session put them, for more of its kind."""
        model = self.model
        return replace(
            model,
            dit=model.dit.with_params(self.stream.params),
            vae=model.vae.with_params(self.decoder.params),
            speech=model.speech.with_params(self.features.params),
        )

    def warm_up(self) -> None:
        """Compiles everything by streaming silence, and starts anew."""
        renewal = self.model.settings.aas_after_blocks
        blocks = max(renewal + 1, self.layout.stages + 1)
        frames, per_frame = self.format.block_frames, self.format.samples_per_frame
        silence = np.zeros(frames * per_frame, np.float32)
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
            self.features.push(np.zeros(self.samples_wanted, np.float32))
            moment = [time.perf_counter()]
            features = np.asarray(self.features.next_block())
            moment.append(time.perf_counter())
            latents = jax.block_until_ready(self.stream.push(features))
            moment.append(time.perf_counter())
            self._decode(latents)
            jax.block_until_ready(self.decoder.state)
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
        self._add(samples)
        while self._take_block():
            yield from self._collect(self._in_flight)

    def feed(self, samples: Float[np.ndarray, " N"]) -> int:
        """Feeds audio without fetching frames: that is left to `fetch`, in this thread or another.

        Args:
            samples: as for `push`; `samples_wanted` of them make one block.

        Returns:
            How many pieces can be fetched from now on, in addition to those before.
        """
        self._add(samples)
        before = self.decoder.decoded
        while self._take_block():
            pass
        return self.decoder.decoded - before

    def fetch(self) -> UInt8[np.ndarray, "T H W 3"]:
        """Waits for the oldest piece that `feed` has promised: `piece_frames`, the first fewer.

        Raises:
            NotFinite: it is NaN or infinity.
        """
        frames = self.decoder.fetch()
        self.times.fetched(is_whole_block=self.decoder.fetched % self.format.pieces_per_block == 0)
        return frames[DROPPED_FRAMES:] if self.decoder.fetched == 1 else frames

    @property
    def samples_wanted(self) -> int:
        """Samples missing until the next block can be taken."""
        return self.features.samples_wanted

    def set_text(self, text: Array) -> None:
        """Changes the prompt from the next block on, which keeps it through all denoising steps.

        Args:
            text: prompt states `1 p f`.
        """
        self.stream.set_text(self._padded(text))

    def finish(self) -> Iterator[np.ndarray]:
        """Ends the audio; yields the remaining frames, up to its last one."""
        wanted = self.features.num_frames
        self.features.end()
        while self._frames_promised < wanted:
            self.features.push_silence()
            while self._frames_promised < wanted and self._take_block():
                yield from self._collect(self._in_flight, wanted)
        self._decode(self.stream.finish())
        yield from self._collect(0, wanted)

    @property
    def _frames_promised(self) -> int:
        return max(0, self.stream.state.block * self.format.block_frames - DROPPED_FRAMES)

    def _add(self, samples: np.ndarray) -> None:
        if self.times.started is None:
            self.times.started = time.perf_counter()
        self.features.push(samples)

    def _take_block(self) -> bool:
        """Hands the next block to the devices if its audio is there."""
        features = self.features.take(self.stream.state.block)
        if features is None:
            return False
        self.times.submitted.append(time.perf_counter())
        # Only the speech encoder is waited for; it has a device of its own.
        self._decode(self.stream.push(np.asarray(features)))
        return True

    def _decode(self, blocks: list) -> None:
        for latents in blocks:
            self.decoder.push(jax.device_put(latents, self._vae_device))

    def _collect(self, in_flight: int, wanted: int | None = None) -> Iterator[np.ndarray]:
        """Fetches finished frames; waits only while more than `in_flight` blocks are pending."""
        pieces = in_flight * self.format.pieces_per_block
        while self.decoder.is_ready or self.decoder.num_pending > pieces:
            frames = self.fetch()
            if wanted is not None:
                frames = frames[: max(0, wanted - self._frames_out)]
            if len(frames):
                self._frames_out += len(frames)
                yield frames

    def _conditions(self, portrait: np.ndarray, text: Array | None) -> Conditions:
        """Conditions of a stream from a portrait and a prompt; keeps the still portrait's latents.

        Raises:
            ValueError: the portrait is not of the size of the one before.
        """
        size = self.format.height, self.format.width
        if portrait.shape[2:4] != size:
            raise ValueError(
                f"a portrait of {portrait.shape[2:4]} pixels for a session made for {size}; "
                "resize it with prepare_reference."
            )
        self.portrait = jax.device_put(jnp.asarray(portrait, jnp.float32), self._vae_device)
        self.still = np.asarray(self._encode(self.decoder.params, self.portrait))
        if text is None:
            text = jnp.zeros((1, 1, self.model.dit.config.text_width), jnp.float32)
        return still_conditions(self.model, self.still, self._padded(text))

    def _padded(self, text: Array) -> Array:
        """Prompt states with all rows that the transformer pads them to: one compiled shape."""
        rows = max(0, self.model.dit.config.text_len - text.shape[1])
        return jnp.pad(jnp.asarray(text).astype(self._text_type), ((0, 0), (0, rows), (0, 0)))


def _host_device() -> jax.Device | None:
    """The last CPU device, which no slice uses, or None where JAX has no CPU backend."""
    try:
        return jax.local_devices(backend="cpu")[-1]
    except RuntimeError:
        return None
