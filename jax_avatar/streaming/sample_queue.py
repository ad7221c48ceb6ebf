"""Queue of audio samples."""

from collections import deque

import numpy as np

from jax_avatar.shapes import Float

__all__ = ["SampleQueue"]


class SampleQueue:
    """First in, first out; a sample is copied once, however small the pieces."""

    def __init__(self):
        self._pieces: deque[np.ndarray] = deque()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, samples: Float[np.ndarray, " N"]) -> None:
        """Adds samples at the end; the array is kept, not copied."""
        if len(samples):
            self._pieces.append(np.asarray(samples, np.float32))
            self._count += len(samples)

    def take(self, count: int) -> Float[np.ndarray, " N"]:
        """Removes the first `count` samples, or all if there are fewer."""
        left = count = min(count, self._count)
        taken = []
        while left:
            piece = self._pieces.popleft()
            if len(piece) > left:
                self._pieces.appendleft(piece[left:])
                piece = piece[:left]
            taken.append(piece)
            left -= len(piece)
        self._count -= count
        return np.concatenate(taken) if taken else np.zeros(0, np.float32)

    def clear(self) -> None:
        """Removes everything."""
        self._pieces.clear()
        self._count = 0
