"""Faces of a picture: places, landmarks, and how sure both networks are.

picture --views--> 128x128 --detector--> boxes --turned square, 192x192--> landmarks, a score
"""

import dataclasses

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from jax_avatar.pixels import from_uint8, to_uint8
from jax_avatar.portraits.framing import Framing, sample
from jax_avatar.portraits.networks import DETECTOR_SIDE, MESH_SIDE, detect, mesh

__all__ = ["FACE_SCORE", "Face", "face_missing", "find_faces", "track_face"]

FACE_SCORE = 0.5
"""Score of both networks from which on there is a face."""

# The points of the mesh where the usual 68 landmarks have an eye's six and the mouth's twenty.
_EYE_LEFT = [33, 160, 158, 133, 153, 144]
_EYE_RIGHT = [362, 385, 387, 263, 373, 380]
_MOUTH = [61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181, 78, 82, 13, 312, 308, 317, 14, 87]
_LEFT_CORNER, _RIGHT_CORNER = 33, 263  # outer ones of the eyes, of the picture's left and right
_AROUND = 1.5  # side of what the landmarks' network sees, in sides of the face
_OVERLAP = 0.3  # of two boxes that are one face
_LOOKS = 3  # of the landmarks' network at a face, each where the last one found it
_MOST = 32  # candidates that the landmarks' network looks at


@dataclasses.dataclass(frozen=True, eq=False)
class Face:
    """One face of a picture.

    Attributes:
        points: MediaPipe's 468 landmarks in pixels of the picture: right, down, away from the
            camera (from the middle of the head, on the same scale).
        score: of the detector, from 0 to 1.
        presence: of the landmarks' network, from 0 to 1.
    """

    points: Float[np.ndarray, "468 3"]
    score: float
    presence: float

    @property
    def box(self) -> Float[np.ndarray, " 4"]:
        """Left, top, right and bottom of the landmarks."""
        return np.r_[self.points[:, :2].min(0), self.points[:, :2].max(0)]

    @property
    def eyes_and_mouth(self) -> Float[np.ndarray, "3 2"]:
        """Centres of the eye on the picture's right, of the other, and of the mouth, in pixels."""
        return np.stack([self.points[part, :2].mean(0) for part in (_EYE_RIGHT, _EYE_LEFT, _MOUTH)])

    @property
    def width(self) -> float:
        """Width of the landmarks' box in pixels."""
        return float(self.box[2] - self.box[0])


def find_faces(image: UInt8[np.ndarray, "H W 3"], *, is_quick: bool = False) -> list[Face]:
    """Faces of a picture, from left to right.

    Faces from about a tenth of the longer side on are found, or from a twentieth on where there is
    no larger one; tilted by up to some 70 degrees.

    Args:
        image: 8-bit RGB, upright.
        is_quick: True leaves out the search for the smallest.
    """
    picture = Image.fromarray(image)
    faces: list[Face] = []
    for parts in ((1, 2),) if is_quick else ((1, 2), (4,)):
        boxes, scores = _candidates([view for count in parts for view in _views(picture, count)])
        for box, score in zip(boxes, scores, strict=True):
            face = _with_landmarks(image, box, score)
            if face.presence >= FACE_SCORE:
                faces.append(face)
        if faces:
            break
    faces.sort(key=lambda face: -face.score * face.presence)
    kept: list[Face] = []
    for face in faces:
        if all(_shared(face.box, other.box) < _OVERLAP for other in kept):
            kept.append(face)
    return sorted(kept, key=lambda face: face.points[:, 0].mean())


def track_face(frames: UInt8[np.ndarray, "T H W 3"]) -> list[Face | None]:
    """The largest face of a video, frame by frame; None where there is none.

    It is looked for where it was in the frame before, which takes a fifth of the time of
    `find_faces`.
    """
    found: list[Face | None] = []
    last: Face | None = None
    for frame in frames:
        if last is not None:
            points, presence = _mesh(frame, _around(last.points))
            last = Face(points, last.score, presence) if presence >= FACE_SCORE else None
        if last is None:
            last = max(find_faces(frame, is_quick=True), key=lambda f: f.width, default=None)
        found.append(last)
    return found


def face_missing(name: str, image: np.ndarray, portrait: np.ndarray) -> str | None:
    """Warning about a portrait that shows no face; None if it shows one.

    Args:
        name: of the picture, for the message.
        image: all of it, 8-bit RGB `[H W 3]`.
        portrait: the part that the video shows, `[1 1 H W 3]` in [-1, 1].
    """
    shown = to_uint8(np.asarray(portrait)[0, 0])
    if find_faces(shown):
        return None
    size = f"{shown.shape[0]}x{shown.shape[1]}"
    if find_faces(image):
        return (
            f"{name}: its face is not in the middle, which is all that the video of {size} shows; "
            "cut the picture around the face."
        )
    return f"{name}: no face was found in it; expected a portrait, seen from the front."


@dataclasses.dataclass(frozen=True)
class _View:
    """View of the detector: a square of the picture, its side and its upper left corner."""

    pixels: Image.Image
    side: int
    left: int
    top: int


def _views(image: Image.Image, parts: int) -> list[_View]:
    """The whole, with a margin and without; or parts of it, half over one another."""
    width, height = image.size
    longest = max(width, height)
    sides = [longest, round(1.5 * longest)] if parts == 1 else [max(32, round(longest / parts))]
    views = []
    for side in sides:
        for top in _starts(height, side):
            for left in _starts(width, side):
                part = image.crop((left, top, left + side, top + side))
                size = (DETECTOR_SIDE, DETECTOR_SIDE)
                part = part.resize(size, Image.Resampling.BILINEAR, reducing_gap=3.0)
                views.append(_View(part, side, left, top))
    return views


def _starts(length: int, side: int) -> list[int]:
    """Starts of parts of that side, half over one another; the last ends with the picture."""
    if length <= side:
        return [-((side - length) // 2)]
    count = 1 + -(-2 * (length - side) // side)
    return [round(i * (length - side) / (count - 1)) for i in range(count)]


def _candidates(views: list[_View]) -> tuple[Float[np.ndarray, "n 8 2"], list[float]]:
    """Faces that the detector sees, the surest first; one where it sees one several times."""
    pixels = from_uint8(np.stack([np.asarray(view.pixels) for view in views]))
    logits, found = detect(pixels)
    scores = 1 / (1 + np.exp(-logits.clip(-80, 80)))
    found = found * np.array([view.side for view in views])[:, None, None, None]
    corner = np.array([(view.left, view.top) for view in views], np.float64)
    found[:, :, np.delete(np.arange(8), 1)] += corner[:, None, None]
    found, scores = found[scores >= FACE_SCORE], scores[scores >= FACE_SCORE]
    order = np.argsort(-scores, kind="stable")
    found, scores = found[order], scores[order]
    half = np.abs(found[:, 1]) / 2
    corners = np.concatenate([found[:, 0] - half, found[:, 0] + half], 1)
    boxes, kept = [], []
    while len(found) and len(boxes) < _MOST:
        same = np.array([_shared(corners[0], other) > _OVERLAP for other in corners])
        same[0] = True
        weight = scores[same] / scores[same].sum()
        boxes.append((found[same] * weight[:, None, None]).sum(0))
        kept.append(float(scores[0]))
        found, corners, scores = found[~same], corners[~same], scores[~same]
    return np.array(boxes, np.float64).reshape(-1, 8, 2), kept


def _with_landmarks(image: np.ndarray, box: Float[np.ndarray, "8 2"], score: float) -> Face:
    """The face at a box of the detector; looked at again, since the box is rough."""
    right, down = box[3] - box[2]
    roll = np.arctan2(down, right)
    points, presence = _mesh(image, Framing.around(box[0], _AROUND * np.abs(box[1]).max(), roll))
    for _ in range(_LOOKS - 1):
        if presence >= FACE_SCORE:
            points, presence = _mesh(image, _around(points))
    return Face(points, score, presence)


def _around(points: Float[np.ndarray, "468 3"]) -> Framing:
    """The turned square that the network expects around landmarks."""
    right, down = points[_RIGHT_CORNER, :2] - points[_LEFT_CORNER, :2]
    roll = np.arctan2(down, right)
    upright = Framing.around(np.zeros(2), 1.0, roll)
    turned = upright(points[:, :2])
    low, high = turned.min(0), turned.max(0)
    return Framing.around(upright.inverse((low + high) / 2), _AROUND * (high - low).max(), roll)


def _mesh(image: np.ndarray, framing: Framing) -> tuple[Float[np.ndarray, "468 3"], float]:
    crop = sample(image, framing, MESH_SIDE)
    points, logit = mesh(crop[None].astype(np.float32) / 255)
    there = framing.inverse(points[0, :, :2].astype(np.float64))
    depth = points[0, :, 2:] / framing.scale
    return np.concatenate([there, depth], 1), float(1 / (1 + np.exp(-np.clip(logit[0], -80, 80))))


def _shared(a: Float[np.ndarray, " 4"], b: Float[np.ndarray, " 4"]) -> float:
    """Area of both boxes over that of either."""
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    both = np.prod(np.maximum(high - low, 0))
    return float(both / max(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - both, 1e-9))
