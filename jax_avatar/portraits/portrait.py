"""Any photograph -> the square that a portrait-anchored model starts from.

photograph --find_faces--> one face --eyes and mouth to their places--> square, and remarks about it
"""

import dataclasses

import numpy as np
from jaxtyping import Float, UInt8

from jax_avatar.pixels import from_uint8
from jax_avatar.portraits.faces import Face, find_faces
from jax_avatar.portraits.framing import Framing, sample
from jax_avatar.portraits.measures import Measures, measure

__all__ = ["LANDMARK_PLACES", "FramedPortrait", "frame_portrait"]

LANDMARK_PLACES = np.array([[0.6117, 0.5109], [0.3882, 0.5171], [0.5035, 0.7505]])
"""Where `Face.eyes_and_mouth` lies in a square whose `EYES_AND_MOUTH` are in their places.

Both mean eyes and mouth, one by landmarks, the other by the renderer's vertices. Means of 64
rendered people, half of them at rest, half turned or smiling; framed by these the renderer's points
lie 0.4 % (at rest) and 0.6 % of the side from their places, p95 0.7 and 1.3 %.
`tests/portraits/test_portrait.py` measures it again.
"""

_UPRIGHT = 0.8  # score below which the face may be one that stands on its head
_YAW, _PITCH = 20.0, 20.0  # degrees; most that portraits were turned in training
_CLOSED = 0.18  # openness of eyes; see `Measures`
_OPEN = 0.085  # gap of the lips
_UNSURE = 0.7  # score of a face of which much is hidden, or that is drawn
_BEYOND = 0.25  # share of the square that the picture does not show
_ENLARGED = 1.6  # pixels of the video from one of the picture


@dataclasses.dataclass(frozen=True, eq=False)
class FramedPortrait:
    """A face in its place.

    Attributes:
        pixels: the square, 8-bit RGB.
        framing: from pixels of the picture to widths of the square.
        face: that was taken, of the picture.
        measures: of that face.
        remarks: what to expect of it, and what to change; one sentence each.
    """

    pixels: UInt8[np.ndarray, "s s 3"]
    framing: Framing
    face: Face
    measures: Measures
    remarks: tuple[str, ...]

    @property
    def reference(self) -> Float[np.ndarray, "1 1 s s 3"]:
        """The square as one frame in [-1, 1]."""
        return from_uint8(self.pixels)[None, None]


def frame_portrait(
    image: UInt8[np.ndarray, "H W 3"],
    side: int,
    *,
    number: int | None = None,
    name: str = "the picture",
) -> FramedPortrait:
    """Turns, scales and shifts a picture so that eyes and mouth of a face come to their places.

    The places are those of training (`EYES_AND_MOUTH`). Where the picture ends its border goes on.

    Args:
        image: 8-bit RGB, upright.
        side: pixels of the square.
        number: of the face, from 1 on, from left to right; None takes the largest.
        name: of the picture, in messages.

    Raises:
        ValueError: no face, or fewer than `number`.
    """
    faces = find_faces(image)
    if _best_score(faces) < _UPRIGHT:
        _refuse_turned(image, faces, name)
    if not faces:
        raise ValueError(
            f"{name}: no face was found in it; expected a picture of a face, seen from the front."
        )
    if number is not None and not 1 <= number <= len(faces):
        raise ValueError(
            f"{name} shows {len(faces)} {'face' if len(faces) == 1 else 'faces'}, numbered from "
            f"left to right; face {number} was asked for."
        )
    if number is None:
        number = 1 + max(range(len(faces)), key=lambda i: faces[i].width)
    face = faces[number - 1]
    framing = Framing.of(face.eyes_and_mouth, LANDMARK_PLACES)
    measures = measure(image, face)
    remarks = [] if len(faces) == 1 else [_which(faces, number)]
    remarks += _about_face(face, measures) + _about_square(image, framing, side)
    remarks = tuple(f"{name}: {remark}" for remark in remarks)
    return FramedPortrait(sample(image, framing, side), framing, face, measures, remarks)


def _refuse_turned(image: np.ndarray, faces: list[Face], name: str) -> None:
    """Raises ValueError if there is a better face in the picture turned by quarters."""
    scores = [_best_score(faces)]
    for quarters in (1, 2, 3):
        turned = np.ascontiguousarray(np.rot90(image, -quarters))
        scores.append(_best_score(find_faces(turned, is_quick=True)))
    if max(scores) > scores[0] + 0.1:
        raise ValueError(
            f"{name}: its face does not stand upright; turn the picture clockwise by "
            f"{90 * int(np.argmax(scores))} degrees."
        )


def _best_score(faces: list[Face]) -> float:
    return max((face.score for face in faces), default=0.0)


def _which(faces: list[Face], number: int) -> str:
    places = ", ".join(
        f"{i} at {round(face.points[:, 0].mean())},{round(face.points[:, 1].mean())} "
        f"({round(face.width)} px wide)"
        for i, face in enumerate(faces, 1)
    )
    return f"{len(faces)} faces, from left to right: {places}; number {number} is taken."


def _about_face(face: Face, measures: Measures) -> list[str]:
    remarks = []
    if face.score < _UNSURE:
        remarks.append(
            f"it hardly looks like a face (score {face.score:.2f}), as one behind a hand or drawn "
            "freely does, so it may move wrongly; take a picture of the whole face."
        )
    if abs(measures.yaw) > _YAW:
        remarks.append(
            f"the head is turned to the side by about {abs(measures.yaw):.0f} degrees, so it will "
            "be distorted when it moves; take a picture from the front."
        )
    elif abs(measures.pitch) > _PITCH:
        remarks.append(
            f"the head looks {'down' if measures.pitch > 0 else 'up'} by about "
            f"{abs(measures.pitch):.0f} degrees, so it will be distorted when it moves; take a "
            "picture from the front."
        )
    if max(measures.eyes) < _CLOSED:
        remarks.append("the eyes are closed and will stay so; take a picture with open eyes.")
    if measures.mouth > _OPEN:
        remarks.append(
            "the mouth is open or shows teeth, so the lips may not close all the way; take a "
            "picture with closed lips."
        )
    return remarks


def _about_square(image: np.ndarray, framing: Framing, side: int) -> list[str]:
    remarks, pixels = [], 1 / framing.scale
    if side > _ENLARGED * pixels:
        remarks.append(
            f"the face is small: {round(pixels)} of its pixels become {side} of the video, so it "
            "will be blurred; take a larger picture."
        )
    at = (np.arange(32) + 0.5) / 32
    x, y = np.moveaxis(framing.inverse(np.stack(np.meshgrid(at, at), -1)), -1, 0)
    height, width = image.shape[:2]
    beyond = 1 - ((x > 0) & (x < width) & (y > 0) & (y < height)).mean()
    if beyond > _BEYOND:
        remarks.append(
            f"it ends close to the face: {100 * beyond:.0f} % of the video repeat its border; take "
            "a picture with more around the head."
        )
    return remarks
