"""Voice activity detection by loudness: open microphone -> utterances."""

from collections import deque
from collections.abc import Iterator

import numpy as np

from jax_avatar.shapes import Float
from jax_avatar.streaming.sample_queue import SampleQueue

__all__ = ["SpeechGate"]

_WINDOW_S = 0.02


class SpeechGate:
    """Noise gate with hysteresis: opens on loud audio, closes after some quiet."""

    def __init__(
        self,
        rate: int,
        *,
        opens_at: float = 0.01,
        closes_at: float = 0.004,
        before_s: float = 0.2,
        after_s: float = 0.6,
    ):
        """Starts closed.

        Args:
            rate: samples per second.
            opens_at: RMS of 20 ms that opens the gate; 1 is full scale.
            closes_at: RMS below which audio is quiet.
            before_s: seconds before the opening that belong to the utterance; words begin softly.
            after_s: seconds of quiet that close the gate; they belong to the utterance.
        """
        self.rate, self._opens_at, self._closes_at = rate, opens_at, closes_at
        self._window = round(_WINDOW_S * rate)
        self._after = round(after_s / _WINDOW_S)
        self._waiting = SampleQueue()
        self._recent: deque[np.ndarray] = deque(maxlen=round(before_s / _WINDOW_S) + 1)
        self._is_open, self._quiet = False, 0

    def __call__(self, samples: Float[np.ndarray, " N"]) -> Iterator[np.ndarray | None]:
        """Yields pieces of utterances, and None at the end of each."""
        self._waiting.append(samples)
        while len(self._waiting) >= self._window:
            window = self._waiting.take(self._window)
            level = float(np.sqrt(np.mean(np.square(window))))
            if not self._is_open:
                self._recent.append(window)
                if level < self._opens_at:
                    continue
                self._is_open, window = True, np.concatenate(self._recent)
                self._recent.clear()
            yield window
            self._quiet = self._quiet + 1 if level < self._closes_at else 0
            if self._quiet >= self._after:
                self._is_open, self._quiet = False, 0
                yield None
