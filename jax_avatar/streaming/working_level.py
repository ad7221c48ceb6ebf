"""Quiet speech -> as loud as a speech encoder was trained on; a video keeps its own sound."""

import math

import numpy as np

from jax_avatar.shapes import Float

__all__ = ["WorkingLevel"]

_STEP_S = 0.02  # over which a level is taken
_WANTED_DB = -30.0  # of the loudest steps; speech of training data is louder, and so is left alone
_MOST_DB = 50.0
_SILENT_DB = -80.0
_ABOVE_FLOOR_DB = 10.0  # from there on a step is taken for speech
_WAIT_STEPS = 25  # of speech, before anything is made louder: the first sounds are faint ones
_FORGETS_DB = 1.0 * _STEP_S  # a step of speech that the loudest level comes down by
_FLOOR_RISES_DB = 1.0 * _STEP_S


class WorkingLevel:
    """A gain that follows the level of a stream, without looking ahead.

    The loudest level so far decides; it comes down slowly while there is speech, never in a pause,
    so that a room is not taken for quiet speech. Speech of a usual level passes unchanged, bit by
    bit, and so does silence, and steady noise.
    """

    def __init__(self, sample_rate: int):
        """Starts with nothing heard."""
        self._step = max(1, round(_STEP_S * sample_rate))
        self._power, self._have = 0.0, 0  # of the step that is under way
        self._top, self._floor = -math.inf, math.inf
        self._speech_steps = 0
        self.gain = 1.0

    def __call__(self, samples: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        """The next samples, louder where they are quiet; however they are cut into pieces."""
        parts, at = [], 0
        while at < len(samples):
            part = samples[at : at + self._step - self._have]
            parts.append(part if self.gain == 1 else np.clip(self.gain * part, -1, 1))
            self._power += float(np.dot(part, part))
            self._have += len(part)
            at += len(part)
            if self._have == self._step:
                self._listen(10 * math.log10(self._power / self._step + 1e-20))
                self._power, self._have = 0.0, 0
        if self.gain == 1 and all(part.base is samples for part in parts):
            return samples
        return np.concatenate(parts).astype(np.float32)

    def _listen(self, level: float) -> None:
        if level <= _SILENT_DB:
            return
        self._top = max(level, self._top)
        if level <= self._floor + _ABOVE_FLOOR_DB:
            self._floor = min(level, self._floor + _FLOOR_RISES_DB)
        else:
            self._floor += _FLOOR_RISES_DB
            self._speech_steps += 1
            self._top = max(level, self._top - _FORGETS_DB)
        if self._speech_steps < _WAIT_STEPS:
            return
        wanted = min(max(0.0, _WANTED_DB - self._top), _MOST_DB)
        self.gain = 10 ** (wanted / 20) if wanted else 1.0
