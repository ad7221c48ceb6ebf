"""Samples -> speech features of a block, as soon as its audio is there."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_avatar.models.network import Network
from jax_avatar.shapes import Array, AudioFeatures, Float
from jax_avatar.streaming.sample_queue import SampleQueue
from jax_avatar.streaming.working_level import WorkingLevel

__all__ = ["DROPPED_FRAMES", "SpeechFeatures"]

DROPPED_FRAMES = 3
"""Frames at the start that are thrown away: the first block's first latent is decoded next to the
still portrait; the release drops the frames of that transition, and so does this."""


class SpeechFeatures:
    """The speech encoder in front of a stream: block by block, or a whole recording at its end.

    Attributes:
        config: of the encoder.
        params: its weights, where it runs.
        samples: that wait to be encoded, at the level that the encoder knows.
        num_samples: that were pushed.
    """

    def __init__(
        self, speech: Network, device: jax.Device, block_frames: int, *, is_whole: bool = False
    ):
        """Places the weights.

        Args:
            speech: the audio front end.
            device: where it runs.
            block_frames: video frames of a block.
            is_whole: audio is encoded all at once after its end.
        """
        self.config, self.params = speech.config, jax.device_put(speech.params, device)
        self._network = speech.without_params()
        self._device = device
        self._block_frames, self._is_whole = block_frames, is_whole
        self._features = _compiled(self._network)

    def start(self) -> None:
        """Begins anew, without audio."""
        # Video frame j of the stream is frame j - 3 of the output; silence comes before.
        self.samples = SampleQueue()
        self.samples.append(np.zeros(DROPPED_FRAMES * self.config.samples_per_frame, np.float32))
        self._level = WorkingLevel(self.config.sample_rate)
        self._state = self._recording = None
        self.num_samples = 0

    def push(self, samples: Float[np.ndarray, " N"]) -> None:
        """Adds audio, as loud as the encoder knows speech."""
        self.num_samples += len(samples)
        self.samples.append(self._level(samples))

    def push_silence(self) -> None:
        """Adds a block of silence after the end of the audio."""
        count = self._block_frames * self.config.samples_per_frame
        self.samples.append(np.zeros(count, np.float32))

    @property
    def num_frames(self) -> int:
        """Video frames that the audio pushed so far lasts, the last one begun."""
        return -(-self.num_samples // self.config.samples_per_frame)

    @property
    def samples_wanted(self) -> int:
        """Samples missing until the next block can be taken."""
        start, stop = self.config.sample_range(0, self._block_frames)
        return (stop if self._state is None else stop - start) - len(self.samples)

    def take(self, block: int) -> Any:
        """Features of the next block, or None if its audio has not come.

        Args:
            block: its number.
        """
        if self._is_whole:
            return self._of_recording(block)
        return self.next_block()

    def next_block(self) -> Array | None:
        """Features of the next block as audio comes, or None if that of the block has not."""
        if self.samples_wanted > 0:
            return None
        start, stop = self.config.sample_range(0, self._block_frames)
        count = stop - start
        with jax.default_device(self._device):
            if self._state is None:
                heard = self.samples.take(stop)
                encoder = self._network.bind(self.params)
                self._state = encoder.start(jnp.asarray(heard[: max(0, start)])[None, None])
                # With less look-ahead than a frame, the first chunk begins before the audio.
                chunk = np.pad(heard, (max(0, -start), 0))[-count:]
            else:
                chunk = self.samples.take(count)
            features, self._state = self._features(self.params, self._state, chunk[None, None])
        return features

    def _of_recording(self, block: int) -> np.ndarray | None:
        if self._recording is None:
            return None
        first = block * self._block_frames
        return self._recording[:, :, first : first + self._block_frames]

    def end(self) -> None:
        """Encodes the recording, where it is encoded as a whole."""
        if not self._is_whole or not self.num_frames:
            return
        blocks = -(-(self.num_frames + DROPPED_FRAMES) // self._block_frames)
        frames = blocks * self._block_frames - DROPPED_FRAMES
        silence = DROPPED_FRAMES * self.config.samples_per_frame
        heard = self.samples.take(len(self.samples))[silence:]
        with jax.default_device(self._device):
            encode = jax.jit(lambda p, wave: self._network.bind(p).encode(wave, frames))
            features = encode(self.params, heard[None, None])
        # Before the first frame there is more of it, as the transformer itself repeats it.
        before = [(0, 0)] * 2 + [(DROPPED_FRAMES, 0)] + [(0, 0)] * 2
        self._recording = np.pad(features, before, mode="edge")


@functools.lru_cache(maxsize=16)
def _compiled(bare: Network) -> Callable[..., tuple[AudioFeatures, Any]]:
    """The compiled `features`; streams of one speech encoder share it."""

    def features(params, state, samples):
        return bare.bind(params).features(state, samples)

    return jax.jit(features)
