"""Renders a person: units, head pose and gaze in, pixels and the true place of the mouth out."""

import dataclasses
import functools
import math

import numpy as np
from jaxtyping import Float, UInt8

from jax_avatar.data.talking_people import mesh as mesh_lib
from jax_avatar.data.talking_people import raster
from jax_avatar.data.talking_people.person import Person, make_background

HEAD_FRACTION = 0.78
"""Height of the head, chin to crown, as a fraction of the picture; the face is most of it."""

CAMERA_DISTANCE = 14.0
"""Of the face, in decimetres."""
_SUPERSAMPLING = 2


@dataclasses.dataclass(frozen=True)
class Pose:
    """Head pose of one frame."""

    yaw: float = 0.0
    """Turn about the vertical axis in radians; positive turns the face to the picture's right."""
    pitch: float = 0.0
    """Nod in radians; positive looks down."""
    roll: float = 0.0
    """Tilt in radians; positive tips the crown to the picture's left."""
    shift: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Movement of head and shoulders right, up and towards the camera, in decimetres."""


FRONTAL = Pose()


@dataclasses.dataclass(frozen=True, eq=False)
class Rendering:
    """One picture and what is known about it."""

    image: np.ndarray  # [H W 3] uint8
    lip_gap: float
    """Opening between the inner lips on the midline, divided by the height of the head."""
    mouth_box: np.ndarray  # [4] float32: left, top, right, bottom of both lips in pixels


def rotation(yaw: float, pitch: float, roll: float) -> Float[np.ndarray, "3 3"]:
    """Matrix that nods, then turns, then tilts column vectors; angles in radians."""
    cy, sy, cp, sp = math.cos(yaw), math.sin(yaw), math.cos(pitch), math.sin(pitch)
    cr, sr = math.cos(roll), math.sin(roll)
    turn = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    nod = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    tilt = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return (tilt @ turn @ nod).astype(np.float32)


@functools.lru_cache(maxsize=8)
def _background(seed: int, size: int) -> np.ndarray:
    return make_background(seed, size)


def pivot(person: Person) -> Float[np.ndarray, " 3"]:
    """Point about which a person's head turns: that of the base mesh, moved with the neck."""
    mesh = mesh_lib.load_face_mesh()
    moved = person.vertices[mesh.neck] - mesh.vertices[mesh.neck]
    return np.asarray(mesh_lib.PIVOT, np.float32) + moved.mean(0) * (0, 1, 1)


def posed_vertices(
    person: Person,
    units: Float[np.ndarray, " q"],
    pose: Pose = FRONTAL,
    gaze: tuple[float, float] = (0.0, 0.0),
) -> Float[np.ndarray, "v 3"]:
    """Vertices in decimetres with expression, pose and gaze; arguments as those of `render`."""
    mesh = mesh_lib.load_face_mesh()
    if units.shape != (len(mesh.unit_names),):
        raise ValueError(
            f"units of shape {units.shape}: expected ({len(mesh.unit_names)},), one weight per "
            "face unit in the order of FaceMesh.unit_names; build it with `unit_weights`"
        )
    units = units.astype(np.float32).copy()
    # Lids rest a little low and follow the eyes down: wide-open eyes stare.
    lids = [mesh.unit_names.index(f"eyeBlink{side}") for side in ("Left", "Right")]
    rest = person.lid_droop + 0.8 * max(0.0, gaze[1])
    units[lids] = rest + (1 - rest) * units[lids]
    moving = np.nonzero(units)[0]
    vertices = person.vertices + np.einsum("q,qvx->vx", units[moving], mesh.units[moving])
    if gaze != (0.0, 0.0):
        look = rotation(*gaze, 0.0).T
        for eye in (person.left_eye, person.right_eye):
            centre = vertices[eye].mean(0)
            vertices[eye] = centre + (vertices[eye] - centre) @ look
    centre = pivot(person)
    turned = (vertices - centre) @ rotation(pose.yaw, pose.pitch, pose.roll).T + centre
    vertices = vertices + (turned - vertices) * person.head_weight[:, None]
    return (vertices + np.asarray(pose.shift, np.float32)).astype(np.float32)


def project(
    person: Person, vertices: Float[np.ndarray, "v 3"], size: int | float
) -> tuple[Float[np.ndarray, "v 2"], Float[np.ndarray, " v"]]:
    """Screen positions in a square picture of edge `size`, y down, and one over the depth."""
    mesh = mesh_lib.load_face_mesh()
    crown, chin = person.vertices[mesh.crown, 1], person.vertices[mesh.chin, 1]
    zoom, right, up = person.framing
    distance = CAMERA_DISTANCE - (vertices[:, 2] - 0.9)
    pixels = size * HEAD_FRACTION * zoom / (crown - chin) * CAMERA_DISTANCE
    # The chin stands at 0.87 of the picture, which leaves room for hair above the crown.
    middle = chin + (crown - chin) * (0.87 - 0.5) / HEAD_FRACTION
    x = size * (0.5 + right) + vertices[:, 0] * pixels / distance
    y = size * (0.5 - up) - (vertices[:, 1] - middle) * pixels / distance
    return np.stack([x, y], 1).astype(np.float32), (1 / distance).astype(np.float32)


def paint(
    person: Person,
    vertices: Float[np.ndarray, "v 3"],
    xy: Float[np.ndarray, "v 2"],
    inverse_z: Float[np.ndarray, " v"],
    background: Float[np.ndarray, "r r 3"],
) -> tuple[UInt8[np.ndarray, "r r 3"], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Rasterises and lights the surface of a person.

    Args:
        person: the looks.
        vertices: of `posed_vertices`, for the light.
        xy: screen positions in samples, of which a pixel has 2 x 2.
        inverse_z: one over the depth.
        background: linear colours behind the surface; sets the size of the picture.

    Returns:
        The picture, and what `raster.rasterise` found under each sample.
    """
    fine = _SUPERSAMPLING * len(background)
    hits = raster.rasterise(
        xy, inverse_z, person.visible, person.layers, person.triangles, fine, fine
    )
    image = raster.shade(
        hits,
        person.triangles,
        person.uv_triangles,
        mesh_lib.load_face_mesh().uv,
        raster.vertex_normals(vertices, person.triangles),
        person.layers,
        person.texture,
        background,
        *person.lights,
    )
    return image, hits


def render(
    person: Person,
    units: Float[np.ndarray, " q"],
    pose: Pose = FRONTAL,
    gaze: tuple[float, float] = (0.0, 0.0),
    size: int = 96,
) -> Rendering:
    """Draws one frame.

    Args:
        person: made by `make_person`.
        units: face-unit weights in the order of `FaceMesh.unit_names`, 0 is rest, 1 full.
        pose: of the head and shoulders.
        gaze: turn of the eyes against the head, right and down, in radians.
        size: edge of the square picture in pixels.
    """
    vertices = posed_vertices(person, units, pose, gaze)
    fine = size * _SUPERSAMPLING
    xy, inverse_z = project(person, vertices, fine)
    image, _ = paint(person, vertices, xy, inverse_z, _background(person.background_seed, size))
    mesh = mesh_lib.load_face_mesh()
    lips = xy[mesh.lips] / _SUPERSAMPLING
    gap = xy[mesh.lower_lip_edge, 1].min() - xy[mesh.upper_lip_edge, 1].max()
    # Measured at rest, since the chin drops with the jaw.
    at_rest, _ = project(person, person.vertices[[mesh.crown, mesh.chin]], fine)
    return Rendering(
        image=image,
        lip_gap=max(0.0, float(gap / (at_rest[1, 1] - at_rest[0, 1]))),
        mouth_box=np.concatenate([lips.min(0), lips.max(0)]).astype(np.float32),
    )


def unit_weights(named: dict[str, float]) -> Float[np.ndarray, " q"]:
    """Weights in the order of `FaceMesh.unit_names` from a dictionary; the rest is 0."""
    names = mesh_lib.load_face_mesh().unit_names
    unknown = sorted(set(named) - set(names))
    if unknown:
        raise ValueError(f"unknown face units {unknown}; expected names among {list(names)}")
    return np.array([named.get(name, 0.0) for name in names], np.float32)


def render_portrait(person: Person, size: int = 96) -> UInt8[np.ndarray, "r r 3"]:
    """The still picture a stream starts from: mouth closed, eyes open, facing the camera."""
    return render(person, unit_weights({}), size=size).image
