"""Playout buffer: frames and the sound of the same moments, until they are delivered.

blocks of sound --append_sound--> | waits for its frames | ready |  --take--> delivered
frames ----------append_frames----------------------------^
"""

from collections import deque
from dataclasses import dataclass

import numpy as np

from jax_avatar.live.jitter_buffer import SpeechBlock
from jax_avatar.streaming.sample_queue import SampleQueue

__all__ = ["Piece", "PlayoutBuffer"]


@dataclass(frozen=True)
class Piece:
    """Frames with their sound.

    Attributes:
        frames: `[T H W 3]` uint8.
        sound: mono samples in [-1, 1], as long as the frames.
        marks: of each sample, 1 for speech, 0 for inserted silence.
    """

    frames: np.ndarray
    sound: np.ndarray
    marks: np.ndarray

    def muted(self) -> "Piece":
        """The frames with silence."""
        return Piece(self.frames, np.zeros_like(self.sound), np.zeros_like(self.marks))

    def split(self, frames: int, samples_per_frame: int) -> tuple["Piece", "Piece"]:
        """The first frames, and the rest."""
        n = frames * samples_per_frame
        return (
            Piece(self.frames[:frames], self.sound[:n], self.marks[:n]),
            Piece(self.frames[frames:], self.sound[n:], self.marks[n:]),
        )


class PlayoutBuffer:
    """First in, first out: sound goes in with its block, its frames follow piece by piece."""

    def __init__(self, samples_per_frame: int):
        self._per_frame = samples_per_frame
        self._sound, self._marks = SampleQueue(), SampleQueue()  # without frames yet
        self._ready: deque[Piece] = deque()

    def append_sound(self, block: SpeechBlock) -> None:
        """Adds the sound of a block that has begun."""
        self._sound.append(block.samples)
        self._marks.append(block.marks)

    def append_frames(self, frames: np.ndarray) -> None:
        """Adds frames; the oldest sound without frames is theirs."""
        count = len(frames) * self._per_frame
        self._ready.append(Piece(frames, self._sound.take(count), self._marks.take(count)))

    def mute(self) -> None:
        """Replaces all sound by silence."""
        self._ready = deque(piece.muted() for piece in self._ready)
        for queue in (self._sound, self._marks):
            queue.append(np.zeros_like(queue.take(len(queue))))

    def drop_ready(self) -> None:
        """Drops the frames that are ready, with their sound."""
        self._ready.clear()

    def take(self, frames: int) -> Piece:
        """Removes the next frames of the oldest piece, at most as many as given."""
        piece = self._ready.popleft()
        if frames < len(piece.frames):
            piece, rest = piece.split(frames, self._per_frame)
            self._ready.appendleft(rest)
        return piece
