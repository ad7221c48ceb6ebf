"""Shot cuts: frames that differ from the one before far more than their neighbours do."""

import cv2
import numpy as np

__all__ = ["ShotCuts"]

_SIZE = (64, 36)
_REACH = 2  # neighbours on either side


class ShotCuts:
    """Watches the frames of a video one after the other.

    A cut is a change above `level` that is `ratio` times the changes around it, so that fast
    movement is none. Slow dissolves are not seen.

    Source: the adaptive detector of github.com/Breakthrough/PySceneDetect, on grey levels.
    """

    def __init__(self, level: float = 12.0, ratio: float = 3.0):
        """Sets the limits.

        Args:
            level: mean absolute change of a small picture's pixels, of 255.
            ratio: over the mean of the two changes before and the two after.
        """
        self.level, self.ratio = level, ratio
        self._before, self._changes = None, []

    def watch(self, frame: np.ndarray) -> None:
        """Takes the next RGB frame `[H W 3]` uint8."""
        frame = np.ascontiguousarray(frame)
        small = cv2.resize(frame, _SIZE, interpolation=cv2.INTER_AREA).astype(np.float32)
        is_first = self._before is None
        self._changes.append(0.0 if is_first else float(np.abs(small - self._before).mean()))
        self._before = small

    def shots(self) -> list[tuple[int, int]]:
        """First frame and the frame after the last of every shot."""
        change = np.array(self._changes)
        edges = [0]
        for i in range(1, len(change)):
            around = np.r_[change[max(1, i - _REACH) : i], change[i + 1 : i + 1 + _REACH]]
            calm = max(1.0, around.mean()) if len(around) else 1.0
            if change[i] >= self.level and change[i] >= self.ratio * calm:
                edges.append(i)
        return [(a, b) for a, b in zip(edges, [*edges[1:], len(change)], strict=True) if b > a]
