"""Motion of a face, frame by frame, as curves that a portrait's pixels can be moved by.

A frame is described against its portrait: face units as they are, the turn of the head and the
place of the face in the picture as differences. All of it is in the framing that `Framing`
gives every portrait, eyes and mouth in the same places.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Float

from jax_avatar.data.talking_people import mesh as mesh_lib
from jax_avatar.data.talking_people.person import Person
from jax_avatar.data.talking_people.render import (
    CAMERA_DISTANCE,
    Pose,
    pivot,
    project,
    rotation,
)
from jax_avatar.data.talking_people.speech import MOUTH_UNITS
from jax_avatar.models.vae.rigid_head import BRIDGE
from jax_avatar.portraits.framing import Framing

LIDS = ("eyeBlinkLeft", "eyeBlinkRight")
BROWS = ("browInnerUp", "browOuterUpLeft", "browOuterUpRight")
CHEEKS = ("cheekSquintLeft", "cheekSquintRight")
POSE = ("yaw", "pitch", "roll", "right", "down", "growth")
"""Turn of the head in radians; place of the bridge of the nose in widths, and its growth."""
GAZE = ("gaze_right", "gaze_down")
UNITS = (*MOUTH_UNITS, *BROWS, *CHEEKS, *LIDS)
CURVES = (*UNITS, *POSE, *GAZE)
"""Names of the curves in the order in which all arrays hold them."""

_LARGE_UNITS = ("jawOpen", "mouthFunnel", "mouthPucker", "mouthPress", "eyeBlink")
_SPREAD = dict(
    yaw=0.06, pitch=0.04, roll=0.03, right=0.013, down=0.008, growth=0.004,
    gaze_right=0.15, gaze_down=0.08,
)  # fmt: skip
SCALE = np.array(
    [_SPREAD.get(c, 0.15 if c.startswith(_LARGE_UNITS) else 0.3) for c in CURVES], np.float32
)
"""By which curves are divided, so that each is about as large as what it changes."""

_MEAN_BRIDGE = 0.59  # decimetres, nearer than the camera is told; mean of a dozen people
_FLIP = np.diag([1.0, -1.0, 1.0])  # the mesh's y points up, that of pictures down


def index(*names: str) -> list[int]:
    """Positions of curves by name."""
    return [CURVES.index(name) for name in names]


def mirrored(curves: Float[np.ndarray, "... c"]) -> Float[np.ndarray, "... c"]:
    """The curves of a picture that is flipped left to right."""

    def other(name: str) -> str:
        for side, opposite in (("Left", "Right"), ("Right", "Left")):
            if name.endswith(side):
                return name.removesuffix(side) + opposite
        return name

    flipped = curves[..., index(*map(other, CURVES))].copy()
    flipped[..., index("yaw", "roll", "right", "gaze_right")] *= -1
    return flipped


def head_curves(
    pose: Float[np.ndarray, "T 6"], lever: Float[np.ndarray, " 3"], focal: float
) -> Float[np.ndarray, "T 6"]:
    """The values of `POSE` against a neutral portrait, without a person.

    Args:
        pose: yaw, pitch, roll in radians; shift right, up, near in decimetres.
        lever: of a `Camera`, or the mean of many.
        focal: the same.
    """
    unit = focal / (CAMERA_DISTANCE - _MEAN_BRIDGE)
    turned = np.stack(
        [_FLIP @ rotation(*angles) @ _FLIP @ lever for angles in pose[:, :3].tolist()]
    )
    right, down, near = (turned - lever + unit * pose[:, 3:] * (1, -1, 1)).T
    growth = near / (focal - near)
    nose = np.asarray(BRIDGE) - 0.5
    place = (nose + np.stack([right, down], 1)) * (1 + growth[:, None]) - nose
    return np.concatenate([pose[:, :3], place, growth[:, None]], 1).astype(np.float32)


@functools.cache
def _bridge() -> np.ndarray:
    """Vertices of the bridge of the nose."""
    mesh = mesh_lib.load_face_mesh()
    x, y, z = mesh.vertices.T
    is_body = mesh.vertex_group == mesh_lib.GROUPS.index("body")
    low, high = mesh_lib.EYE_Y - 0.2, mesh_lib.EYE_Y - 0.02
    return np.nonzero(is_body & (np.abs(x) < 0.1) & (low < y) & (y < high) & (z > 1.2))[0]


def eyes_and_mouth(person: Person, vertices: Float[np.ndarray, "v 3"]) -> Float[np.ndarray, "3 2"]:
    """Places of eyes and mouth in the renderer's picture, in its widths."""
    xy, _ = project(person, vertices, 1)
    parts = (person.left_eye, person.right_eye, mesh_lib.load_face_mesh().lips)
    points = np.stack([xy[part].mean(0) for part in parts]).astype(np.float64)
    return points[[0, 1, 2] if points[0, 0] > points[1, 0] else [1, 0, 2]]


@dataclasses.dataclass(frozen=True, eq=False)
class Camera:
    """Camera of a framed portrait; lengths in picture widths at the depth of the nose's bridge."""

    person: Person
    pose: Pose  # of the portrait
    framing: Framing

    @functools.cached_property
    def _rest(self) -> np.ndarray:
        return self.person.vertices[_bridge()].mean(0)

    def _bridge_at(self, pose: Pose) -> np.ndarray:
        centre = pivot(self.person)
        turn = rotation(pose.yaw, pose.pitch, pose.roll)
        return turn @ (self._rest - centre) + centre + np.asarray(pose.shift, np.float32)

    @functools.cached_property
    def unit(self) -> float:
        """Widths of the picture per decimetre, at the bridge of the nose in the portrait."""
        at = self._bridge_at(self.pose)
        xy, _ = project(self.person, np.stack([at, at + np.float32([1, 0, 0])]), 1)
        return float(xy[1, 0] - xy[0, 0]) * self.framing.scale

    @property
    def focal(self) -> float:
        """Distance of the camera from the bridge of the nose."""
        return self.unit * (CAMERA_DISTANCE - (self._bridge_at(self.pose)[2] - 0.9))

    def depth(self, vertices: Float[np.ndarray, "v 3"]) -> Float[np.ndarray, " v"]:
        """Depth of points of the portrait before the bridge of the nose, in picture widths."""
        return self.unit * (vertices[:, 2] - self._bridge_at(self.pose)[2])

    @property
    def _frame(self) -> np.ndarray:
        """The renderer's axes -> the framed picture's, without the scale."""
        frame = np.eye(3)
        frame[:2, :2] = self.framing.linear / self.framing.scale
        return frame

    def _turned(self, matrix: np.ndarray) -> np.ndarray:
        """A turn in the mesh's axes -> in the picture's axes."""
        return self._frame @ _FLIP @ matrix @ _FLIP @ self._frame.T

    @property
    def lever(self) -> Float[np.ndarray, " 3"]:
        """From the point that the head turns about to the bridge: right, down, nearer."""
        arm = rotation(self.pose.yaw, self.pose.pitch, self.pose.roll) @ (
            self._rest - pivot(self.person)
        )
        return self.unit * (self._frame @ _FLIP @ arm)

    def head(self, pose: Pose) -> Float[np.ndarray, " 6"]:
        """The values of `POSE` in a frame with this pose of the renderer."""
        angles = (pose.yaw, pose.pitch, pose.roll), (self.pose.yaw, self.pose.pitch, self.pose.roll)
        now, then = (rotation(*a).astype(np.float64) for a in angles)
        r = _FLIP @ self._turned(now @ then.T) @ _FLIP
        yaw, pitch, roll = -np.arcsin(r[2, 0]), np.arctan2(*r[2, 1:]), np.arctan2(r[1, 0], r[0, 0])
        points = np.stack([self._bridge_at(self.pose), self._bridge_at(pose)])
        xy, near = project(self.person, points, 1)
        before, after = self.framing(xy)
        return np.array([yaw, pitch, roll, *(after - before), near[1] / near[0] - 1], np.float32)
