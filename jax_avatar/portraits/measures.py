"""Measures of a face: turn of the head, opening of eyes and mouth."""

import dataclasses

import numpy as np
from jaxtyping import Float, UInt8

from jax_avatar.portraits.faces import Face
from jax_avatar.portraits.framing import Framing, sample
from jax_avatar.portraits.networks import EYE_SIDE, eye_outline

__all__ = ["Measures", "measure"]

# Of the mesh: outer and inner corner of each eye, that on the picture's left first.
_CORNERS = ((33, 133), (263, 362))
_AROUND_EYE = 2.3  # side of what the network of the eye sees, in distances of the corners
_CHEEKS, _BROW_AND_CHIN = (234, 454), (10, 152)
_MOUTH_CORNERS = (61, 291)
_LIPS = (np.array([82, 13, 312]), np.array([87, 14, 317]))  # inner edges, upper and lower
_REST_PITCH = 7.0  # degrees that the mesh gives for heads that look straight ahead


@dataclasses.dataclass(frozen=True)
class Measures:
    """Looks of a face.

    Attributes:
        yaw: degrees that it is turned to the picture's right.
        pitch: degrees that it looks down.
        roll: degrees that it is tilted clockwise.
        eyes: how far they are open, that on the picture's left first: height over width. Rendered
            people have 0.23 to 0.31 at rest and 0.05 to 0.18 with lids closed.
        mouth: how far it is open: gap of the lips over the mouth's width; 0 to 0.07 closed.
    """

    yaw: float
    pitch: float
    roll: float
    eyes: tuple[float, float]
    mouth: float


def measure(image: UInt8[np.ndarray, "H W 3"], face: Face) -> Measures:
    """Measures one face of a picture."""
    across, along = (face.points[b] - face.points[a] for a, b in (_CHEEKS, _BROW_AND_CHIN))
    slope = face.points[_CORNERS[1][0]] - face.points[_CORNERS[0][0]]
    left, right = _eyes(image, face.points[:, :2])
    upper, lower = (face.points[edge, :2] for edge in _LIPS)
    width = np.linalg.norm(np.subtract(*face.points[_MOUTH_CORNERS, :2]))
    return Measures(
        yaw=_degrees(across[2], np.hypot(*across[:2])),
        pitch=_degrees(along[2], np.hypot(*along[:2])) - _REST_PITCH,
        roll=_degrees(slope[1], slope[0]),
        eyes=(left, right),
        mouth=float(np.linalg.norm(upper - lower, axis=1).mean() / width),
    )


def _degrees(rise: float, run: float) -> float:
    return float(np.degrees(np.arctan2(rise, run)))


def _eyes(image: np.ndarray, points: Float[np.ndarray, "468 2"]) -> tuple[float, float]:
    crops = []
    for i, (outer, inner) in enumerate(_CORNERS):
        left, right = points[[inner, outer] if i else [outer, inner]]
        roll = np.arctan2(*(right - left)[::-1])
        side = _AROUND_EYE * float(np.linalg.norm(right - left))
        crop = sample(image, Framing.around((left + right) / 2, side, roll), EYE_SIDE)
        crops.append(crop[:, ::-1] if i else crop)
    outline = eye_outline(np.stack(crops).astype(np.float32) / 255)
    height = np.linalg.norm(outline[:, [3, 4, 5]] - outline[:, [11, 12, 13]], axis=-1).mean(-1)
    left, right = height / np.linalg.norm(outline[:, 0] - outline[:, 8], axis=-1)
    return float(left), float(right)
