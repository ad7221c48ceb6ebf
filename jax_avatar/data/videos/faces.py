"""Face detection, and the stretches of a shot that show a single face."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np

__all__ = ["FaceFinder", "FrontalFaces", "Stretch", "single_face_stretches"]

FaceFinder = Callable[[np.ndarray], np.ndarray]
"""RGB frame `[H W 3]` uint8 -> boxes `[n 4]`: left, top, right, bottom as shares of the picture."""

_LARGEST = 360  # rows that are searched
_OVERLAP = 0.3  # intersection over union of one face in two looks
_RIVAL = 0.5  # a second face of this share of the largest one's height is another person
_MISSED = 2  # looks in a row without a face that are forgiven


@dataclass(frozen=True)
class FrontalFaces:
    """OpenCV's cascade for frontal faces, which comes inside its wheel.

    Attributes:
        smallest: height of the smallest face, as a share of the picture's.
        neighbours: detections that must agree; more find fewer faces that are none.
    """

    smallest: float = 0.1
    neighbours: int = 5

    @cached_property
    def _cascade(self) -> cv2.CascadeClassifier:
        return cv2.CascadeClassifier(f"{cv2.data.haarcascades}haarcascade_frontalface_default.xml")

    def __call__(self, frame: np.ndarray) -> np.ndarray:
        """Implements `FaceFinder`."""
        height, width = frame.shape[:2]
        scale = min(1.0, _LARGEST / height)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        grey = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY)
        grey = cv2.equalizeHist(cv2.resize(grey, size, interpolation=cv2.INTER_AREA))
        least = max(16, int(self.smallest * size[1]))
        found = self._cascade.detectMultiScale(
            grey, scaleFactor=1.1, minNeighbors=self.neighbours, minSize=(least, least)
        )
        boxes = np.array(found, np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return boxes / np.array([*size, *size], np.float32)


@dataclass(frozen=True)
class Stretch:
    """Frames that show one face.

    Attributes:
        start: first frame.
        stop: the frame after the last.
        boxes: of the face at every look, shares of the picture, `[looks 4]`.
    """

    start: int
    stop: int
    boxes: np.ndarray


def single_face_stretches(
    looks: Sequence[tuple[int, np.ndarray]], start: int, stop: int
) -> list[Stretch]:
    """Stretches of a shot with exactly one face that stays where it is.

    Args:
        looks: frame and boxes found there, in order.
        start: first frame of the shot.
        stop: the frame after its last.
    """
    stretches, boxes, first, last, missed = [], [], None, None, 0

    def end(at: int) -> None:
        nonlocal boxes, first, missed
        if boxes:
            stretches.append(Stretch(first, at, np.stack(boxes)))
        boxes, first, missed = [], None, 0

    inside = [(frame, found) for frame, found in looks if start <= frame < stop]
    for number, (frame, found) in enumerate(inside):
        box = _only_face(found)
        if box is None and len(found) == 0 and boxes and missed < _MISSED:
            missed += 1
            continue
        if box is None:
            end(last + 1 if boxes else frame)
            continue
        if boxes and _overlap(boxes[-1], box) < _OVERLAP:
            end(last + 1)
        if not boxes:
            # Up to the first look, a shot is taken to be as it is there.
            first = start if number == 0 else frame
        boxes.append(box)
        last, missed = frame, 0
    end(stop if boxes and not missed else (last or start) + 1)
    return stretches


def _only_face(boxes: np.ndarray) -> np.ndarray | None:
    if not len(boxes):
        return None
    heights = boxes[:, 3] - boxes[:, 1]
    order = np.argsort(-heights)
    is_alone = len(boxes) == 1 or heights[order[1]] < _RIVAL * heights[order[0]]
    return boxes[order[0]] if is_alone else None


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    inner = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    shared = float(np.prod(np.maximum(inner, 0)))
    return shared / float(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared)
