"""Invented people: from one integer a face shape, skin, hair, clothes, light and background."""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image

from jax_avatar.data.talking_people import mesh as mesh_lib
from jax_avatar.data.talking_people import raster
from jax_avatar.data.talking_people.mesh import CHIN_Y, EYE_X, EYE_Y, MOUTH_Y, NECK_Y, NECK_Z

Field = Float[np.ndarray, "..."]

# Gamma-coded colours; the powers make them linear.
_SKIN = (
    np.array(
        [
            [0.92, 0.73, 0.62],
            [0.84, 0.62, 0.49],
            [0.70, 0.47, 0.34],
            [0.55, 0.36, 0.25],
            [0.40, 0.25, 0.17],
            [0.95, 0.79, 0.70],
        ]
    )
    ** 2.2
)
_HAIR = (
    np.array(
        [
            [0.07, 0.055, 0.05],
            [0.17, 0.10, 0.06],
            [0.33, 0.20, 0.11],
            [0.58, 0.43, 0.24],
            [0.42, 0.18, 0.08],
            [0.58, 0.57, 0.56],
            [0.30, 0.27, 0.25],
        ]
    )
    ** 1.6
)
_IRIS = (
    np.array(
        [
            [0.27, 0.15, 0.07],
            [0.17, 0.32, 0.48],
            [0.22, 0.36, 0.20],
            [0.35, 0.26, 0.12],
            [0.35, 0.41, 0.44],
        ]
    )
    ** 1.8
)

HAIR_STYLES = ("shaved", "crop", "medium", "full", "bob", "long", "curly")
_SHELL_THICKNESS = dict(
    shaved=0.0, crop=0.06, medium=0.15, full=0.26, bob=0.13, long=0.13, curly=0.34
)


class Lights(NamedTuple):
    """Light on a person, in linear colours."""

    directions: np.ndarray  # [q 3] float32, unit vectors
    colours: np.ndarray  # [q 3] float32
    ambient: np.ndarray  # [3] float32


@dataclasses.dataclass(frozen=True, eq=False)
class Person:
    """One invented person, ready to be rendered; made by `make_person`."""

    seed: int
    hair_style: str
    vertices: np.ndarray  # [v 3] float32, the neutral face, mouth closed
    triangles: np.ndarray  # [f 3] int32
    uv_triangles: np.ndarray  # [f 3] int32
    layers: np.ndarray  # [f] int32, texture layer of each triangle; 1, hair, is two-sided
    visible: np.ndarray  # [v] float32, negative where the surface is cut away
    texture: np.ndarray  # [2 r r 4] float32: linear colour and gloss
    head_weight: np.ndarray  # [v] float32, 1 where the surface turns with the head
    left_eye: np.ndarray  # vertex indices of the eyeball
    right_eye: np.ndarray
    lights: Lights
    background_seed: int
    lid_droop: float  # resting weight of the blink units
    framing: tuple[float, float, float]  # zoom; shift right and up in picture heights


def smooth_step(low: float, high: float, x: Field) -> Field:
    """0 below `low`, 1 above `high`, a cubic in between; `low` may exceed `high`."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


class _Paint:
    """Texel-wise helpers over one texture: where each texel lies, noise and masks."""

    def __init__(self, texture_size: int, rng: np.random.Generator):
        position, group = mesh_lib.texel_positions(texture_size)
        self.size, self.rng = texture_size, rng
        self.x, self.y, self.z = np.moveaxis(position[0], -1, 0)
        self.side = np.abs(self.x)
        self.position, self.group = position[0], group[0]

    def is_in(self, group: str) -> np.ndarray:
        return self.group == mesh_lib.GROUPS.index(group)

    def resized(self, image: np.ndarray) -> np.ndarray:
        picture = Image.fromarray((np.clip(image, 0, 1) * 255).astype(np.uint8))
        resized = picture.resize((self.size, self.size), Image.Resampling.BICUBIC)
        return np.asarray(resized, np.float32) / 255

    def noise(self, cells: int, amount: float) -> np.ndarray:
        """Smooth noise in [-amount / 2, amount / 2] with `cells` cells across the texture."""
        return (self.resized(self.rng.random((cells, cells))) - 0.5) * amount

    def mask(self, name: str) -> np.ndarray:
        return self.resized(mesh_lib.load_face_mesh().masks[name])


def _blend(colour: Field, other: Field, weight: Field) -> Field:
    weight = weight[..., None]
    return colour * (1 - weight) + other * weight


def _make_shape(
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Draws a face shape; returns vertices, ancestry weights, femininity and age in [0, 1]."""
    mesh = mesh_lib.load_face_mesh()
    ancestry = rng.dirichlet([0.35] * 3)  # african, asian, caucasian
    feminine = 0.95 if rng.random() < 0.5 else 0.05
    age = float(np.clip(rng.beta(1.1, 2.6), 0, 1))
    weight = rng.random()
    vertices = mesh.vertices.copy()
    builds = {
        "averageweight": 1 - abs(2 * weight - 1),
        "minweight": max(0.0, 1 - 2 * weight) * 0.8,
        "maxweight": max(0.0, 2 * weight - 1) * 0.7,
    }
    for gender, of_gender in (("female", feminine), ("male", 1 - feminine)):
        for years, of_years in (("young", 1 - age), ("old", age)):
            share = of_gender * of_years
            for people, of_people in zip(("african", "asian", "caucasian"), ancestry, strict=True):
                vertices += share * of_people * mesh.shape(f"macro/{people}-{gender}-{years}")
            for build, of_build in builds.items():
                vertices += share * of_build * mesh.shape(f"macro/u-{gender}-{years}-{build}")
    counts = dict(head=4, nose=6, mouth=4, chin=4, forehead=2)
    for part, count in counts.items():
        names = [n for n in mesh.shape_names(f"id/{part}/") if "fat" not in n and "incr-" not in n]
        for name in rng.choice(names, count, replace=False):
            vertices += rng.uniform(0, 0.5) * mesh.shape(name)
    # Left and right shapes come in pairs; equal weights keep the face symmetric.
    for part, count in dict(cheek=2, eyes=4, ears=2).items():
        names = [
            n
            for n in mesh.shape_names(f"id/{part}/l-")
            if "push" not in n and "shape-pointed" not in n and "wing-incr" not in n
        ]
        for name in rng.choice(names, count, replace=False):
            amount = rng.uniform(0, 0.5)
            vertices += amount * mesh.shape(name)
            vertices += amount * mesh.shape(name.replace("/l-", "/r-"))
    return vertices, ancestry, feminine, age


class _Hairline:
    """Hair coverage of the scalp as a function of the position on the base mesh."""

    def __init__(self, rng: np.random.Generator, style: str):
        front = rng.uniform(-0.06, 0.12)
        side = rng.uniform(-0.15, 0.12)
        if style in ("bob", "long"):  # paint under the gaps between the locks
            front, side = front - 0.14, side - 0.15
        self.depth = np.array([-0.6, -0.15, 0.15, 0.45, 0.72, 0.95, 1.15, 1.6])
        self.height = EYE_Y + np.array(
            [-1.15, -0.85, -0.4 + side, -0.12 + side, 0.14 + side, 0.5, 0.60 + front, 0.66 + front]
        )
        self.wave = rng.uniform(-0.05, 0.05)
        self.parting = rng.uniform(-0.35, 0.35)

    def above(self, x: Field, y: Field, z: Field) -> Field:
        """Distance above the hairline in decimetres; negative on bare skin."""
        line = np.interp(z, self.depth, self.height)
        return y - line - self.wave * np.cos(x * 6) + 0.05 * np.sin(x * 3 + self.parting)


def _paint_skin(paint: _Paint, skin, lips, hair, feminine: float) -> np.ndarray:
    rng = paint.rng
    side, y, z = paint.side, paint.y, paint.z
    colour = np.broadcast_to(skin, (*paint.x.shape, 3)).copy()
    mottle = paint.noise(256, 0.06) + paint.noise(64, 0.09) + paint.noise(512, 0.03)
    colour *= (1 + mottle)[..., None]
    cheek = np.exp(-(((side - EYE_X * 1.35) / 0.28) ** 2 + ((y - (EYE_Y - 0.52)) / 0.26) ** 2)) * (
        z > 0
    )
    nose = np.exp(-((side / 0.14) ** 2 + ((y - 6.92) / 0.14) ** 2)) * (z > 1.4)
    blush = (cheek * rng.uniform(0.1, 0.35) + nose * rng.uniform(0, 0.25))[..., None]
    colour *= 1 - blush * np.array([0.05, 0.5, 0.45])
    colour *= 1 - 0.14 * paint.mask("ears")[..., None] * np.array([0, 1, 1])
    # Shade that no light of this renderer would make: eye sockets, under the chin, lip line.
    socket = np.exp(-(((side - EYE_X) / 0.2) ** 2 + ((y - EYE_Y - 0.03) / 0.12) ** 2)) * (z > 0.6)
    colour *= 1 - 0.22 * socket[..., None] * np.array([0.8, 1, 0.9])
    nostril = np.exp(-(((side - 0.1) / 0.09) ** 2 + ((y - 6.79) / 0.035) ** 2)) * (z > 1.3)
    colour *= 1 - 0.35 * nostril[..., None]
    lid = paint.mask("eyelids")
    colour *= 1 - lid[..., None] * 0.16 * np.array([0.6, 1, 0.9])
    if feminine < 0.5 and rng.random() < 0.5:
        colour = _paint_beard(paint, colour, hair)
    mouth = np.clip(paint.mask("lips"), 0, 1)
    line = np.exp(-(((y - MOUTH_Y) / 0.02) ** 2)) * mouth
    colour = _blend(colour, lips, mouth)
    colour *= 1 - 0.35 * line[..., None]
    inside = np.clip(paint.mask("inside-mouth"), 0, 1)
    return _blend(colour, np.array([0.075, 0.010, 0.012]), inside)


def _paint_beard(paint: _Paint, colour, hair) -> np.ndarray:
    rng, side, y, z = paint.rng, paint.side, paint.y, paint.z
    edge = MOUTH_Y - 0.16 + 0.5 * np.clip((side - 0.3) / 0.5, 0, 1) ** 1.5
    beard = smooth_step(0.0, 0.3, edge - y) * smooth_step(0.2, 0.6, z)
    beard *= smooth_step(CHIN_Y - 0.25, CHIN_Y + 0.05, y)
    moustache = np.exp(-(((y - MOUTH_Y - 0.15) / 0.07) ** 2)) * smooth_step(0.38, 0.22, side)
    moustache *= z > 1.2
    weight = np.clip(beard + moustache, 0, 1) * rng.uniform(0.12, 0.65)
    weight *= np.clip(0.75 + paint.noise(512, 0.6), 0, 1)
    return _blend(colour, hair * 0.7, weight)


def _paint_brows(paint: _Paint, colour, skin, hair, feminine: float) -> np.ndarray:
    rng = paint.rng
    along = (paint.side - 0.11) / rng.uniform(0.40, 0.46)  # 0 at the inner end, 1 at the outer
    inside = np.clip(along, 0, 1)
    height = EYE_Y + rng.uniform(0.175, 0.215)
    arch = rng.uniform(0.03, 0.065) * np.sin(np.pi * np.clip(inside * 0.95 + 0.02, 0, 1))
    # The inner end stands higher than the outer: the other way round looks angry.
    centre = height + arch + rng.uniform(0.0, 0.03) - rng.uniform(0.015, 0.045) * inside
    thickness = rng.uniform(0.024, 0.034) * (1.15 - 0.6 * inside)
    thickness *= 1.2 if feminine < 0.5 else 0.9
    weight = np.exp(-(((paint.y - centre) / thickness) ** 4))
    weight *= smooth_step(-0.08, 0.12, along) * smooth_step(1.05, 0.75, along) * (paint.z > 0.4)
    weight *= rng.uniform(0.6, 0.85) * np.clip(0.9 + paint.noise(512, 0.35), 0, 1)
    brow = np.minimum(hair * 0.8, skin * 0.35)
    return _blend(colour, brow, weight)


def _paint_eyes(paint: _Paint, colour, gloss, iris) -> None:
    mesh = mesh_lib.load_face_mesh()
    for name in ("left_eye", "right_eye"):
        here = paint.is_in(name)
        centre = mesh.vertices[mesh.vertex_group == mesh_lib.GROUPS.index(name)].mean(0)
        out = paint.position[here] - centre
        out /= np.linalg.norm(out, axis=1, keepdims=True) + 1e-9
        angle = np.degrees(np.arccos(np.clip(out[:, 2], -1, 1)))[:, None]
        eye = np.where(angle < 28, iris * (0.7 + 0.02 * angle), np.array([0.66, 0.63, 0.60]))
        eye = np.where((angle > 24) & (angle < 29), iris * 0.35, eye)
        eye = np.where(angle < 12, 0.01, eye)
        colour[here] = eye
        gloss[here] = 0.8


def _paint_clothes(paint: _Paint, colour, gloss) -> tuple[np.ndarray, float]:
    rng = paint.rng
    height = NECK_Y - rng.uniform(0.02, 0.32)
    opening = rng.choice([0.0, 0.0, 0.8])
    radius = np.hypot(paint.x, paint.z - NECK_Z)
    # Past the neck everything is cloth, so the collar cannot leave bare patches on a shoulder.
    line = height + 1.6 * np.clip(radius - 0.62, 0, None) * (paint.z < 1.0 - 0.4 * opening)
    line = line - opening * np.clip(0.75 - paint.side, 0, None) * (paint.z > 0.1)
    cloth = smooth_step(-0.015, 0.015, line - paint.y) * paint.is_in("body")
    cloth *= paint.y < 6.05
    base = rng.random(3) ** 1.5 * 0.65 + 0.03
    base = base * 0.75 + base.mean() * 0.25
    shade = np.broadcast_to(base, (*paint.x.shape, 3)).copy()
    pattern = int(rng.integers(0, 4))
    if pattern == 1:
        stripe = smooth_step(-0.3, 0.3, np.sin(paint.y * rng.uniform(14, 26)))
        shade = _blend(shade, base * 0.4 + 0.25 * rng.random(3), stripe)
    elif pattern == 2:
        shade = _blend(shade, np.array([0.6, 0.6, 0.6]), smooth_step(0.2, 0.17, paint.side))
    shade *= (1 + paint.noise(256, 0.12) + paint.noise(32, 0.15))[..., None]
    seam = np.exp(-(((line - paint.y) / 0.03) ** 2)) * paint.is_in("body") * (paint.y < 6.05)
    colour[:] = _blend(colour, shade, cloth) * (1 - 0.3 * seam[..., None])
    gloss *= 1 - cloth
    return cloth, height


def _make_lights(rng: np.random.Generator) -> Lights:
    turn, rise = rng.uniform(-0.9, 0.9), rng.uniform(0.15, 0.7)
    lights = np.array(
        [
            [np.sin(turn), np.sin(rise), np.cos(turn)],
            [-np.sin(turn) * 0.9 - 0.2, 0.2, 0.6],
            [-np.sin(turn), 0.5, -0.8],
        ]
    )
    lights /= np.linalg.norm(lights, axis=1, keepdims=True)
    warm = np.array([1.0, rng.uniform(0.92, 1.0), rng.uniform(0.82, 1.0)])
    colours = np.stack(
        [
            warm * rng.uniform(0.6, 0.85),
            np.array([0.85, 0.92, 1.0]) * rng.uniform(0.18, 0.38),
            np.ones(3) * rng.uniform(0.1, 0.4),
        ]
    )
    ambient = np.array([0.95, 0.97, 1.0]) * rng.uniform(0.22, 0.34)
    return Lights(*(part.astype(np.float32) for part in (lights, colours, ambient)))


def make_background(seed: int, size: int) -> Float[np.ndarray, "r r 3"]:
    """A plain, graded or blurred-room backdrop in linear colours.

    Args:
        seed: picks the backdrop.
        size: edge of the square picture in pixels.
    """
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 3)
    low, high = (0.4 + 0.6 * rng.random((2, 3))) * rng.uniform(0.06, 0.5, (2, 1))
    row, column = np.mgrid[0:size, 0:size] / size
    grade = row * rng.uniform(0.3, 1) + column * rng.uniform(-0.5, 0.5)
    if kind == 0:
        return (low + (high - low) * grade[..., None]).astype(np.float32).clip(0, 1)
    room = np.broadcast_to(low, (8, 8, 3)).copy()
    for _ in range(5):
        i, j = rng.integers(0, 8, 2)
        height, width = rng.integers(1, 5, 2)
        tint = (0.5 + 0.5 * rng.random(3)) * rng.uniform(0.06, 0.5)
        room[i : i + height, j : j + width] = 0.5 * low + 0.5 * tint
    channels = [
        np.asarray(
            Image.fromarray(room[..., c].astype(np.float32)).resize(
                (size, size), Image.Resampling.BICUBIC
            )
        )
        for c in range(3)
    ]
    return np.stack(channels, -1).clip(0, 1).astype(np.float32)


def make_person(seed: int, texture_size: int = 512) -> Person:
    """Invents the person that belongs to a seed; takes some tenths of a second.

    Args:
        seed: non-negative; the same seed is the same person at every texture size.
        texture_size: edge of the painted texture in texels; 512 suits pictures up to 160 px.
    """
    if seed < 0:
        raise ValueError(f"seed {seed}: a person's seed is a non-negative integer; pass one")
    rng = np.random.default_rng(seed)
    mesh = mesh_lib.load_face_mesh()
    vertices, ancestry, feminine, age = _make_shape(rng)

    skin = (
        _SKIN[0] * ancestry[2] * 0.6
        + _SKIN[1] * ancestry[1]
        + _SKIN[5] * ancestry[2] * 0.4
        + _SKIN[int(rng.integers(2, 5))] * ancestry[0]
    ) * rng.uniform(0.92, 1.12)
    dark_haired = ancestry[2] < 0.5 and rng.random() < 0.85
    hair = _HAIR[rng.integers(0, 2) if dark_haired else rng.integers(0, 5)]
    if age > 0.55:
        hair = _HAIR[rng.integers(5, 7)]
    lips = skin * np.array([0.74, 0.36, 0.38]) * rng.uniform(0.85, 1.05)
    if feminine > 0.5 and rng.random() < 0.4:
        lips = np.array([0.42, 0.06, 0.09]) * rng.uniform(0.7, 1.2) * 0.6 + lips * 0.4
    styles = (
        ("crop", "medium", "full", "bob", "bob", "long", "long", "curly")
        if feminine > 0.5
        else ("shaved", "crop", "crop", "medium", "medium", "full", "curly")
    )
    style = str(rng.choice(styles))

    paint = _Paint(texture_size, rng)
    colour = _paint_skin(paint, skin, lips, hair, feminine)
    colour = _paint_brows(paint, colour, skin, hair, feminine)
    gloss = np.full(paint.x.shape, 0.045, np.float32)
    gloss += 0.10 * np.clip(paint.mask("lips"), 0, 1)
    gloss *= 1 - np.clip(paint.mask("inside-mouth"), 0, 1)

    hairline = _Hairline(rng, style)
    strands = paint.resized(rng.random((512, 96)))
    coarse = paint.resized(rng.random((48, 64)))
    hair_colour = hair * (0.50 + 0.65 * strands + 0.35 * coarse)[..., None]
    ears = np.clip(paint.mask("ears") * 1.5, 0, 1)
    fringe = hairline.above(paint.x, paint.y, paint.z) + 0.06 * (strands - 0.5)
    covered = smooth_step(-0.03, 0.16, fringe) * paint.is_in("body") * (1 - ears)
    shaved_shadow = rng.choice([0.0, 0.3, 0.5])
    if style == "shaved":
        covered = covered * shaved_shadow
    colour = _blend(colour, hair_colour, covered)
    gloss[covered > 0.5] = 0.07
    cloth, collar = _paint_clothes(paint, colour, gloss)
    chin_shade = np.exp(-(((paint.y - CHIN_Y + 0.25) / 0.25) ** 2)) * (paint.z < 1.1)
    chin_shade *= (paint.z > -0.2) * paint.is_in("body") * (1 - cloth) * (paint.y < CHIN_Y + 0.1)
    colour *= 1 - 0.4 * chin_shade[..., None]
    _paint_eyes(paint, colour, gloss, _IRIS[rng.integers(len(_IRIS))])
    for name, tint, shine in (
        ("upper_teeth", [0.70, 0.67, 0.60], 0.15),
        ("lower_teeth", [0.55, 0.52, 0.46], 0.10),
        ("tongue", [0.22, 0.05, 0.055], 0.05),
    ):
        here = paint.is_in(name)
        # Light hardly reaches the back of the mouth.
        depth = smooth_step(1.12, 1.34, paint.z[here])[:, None]
        colour[here] = np.array(tint) * (0.08 + 0.92 * depth)
        gloss[here] = shine * depth[:, 0]
    for name in mesh_lib.GROUPS:
        if "lashes" in name:
            colour[paint.is_in(name)] = [0.03, 0.022, 0.018]
            gloss[paint.is_in(name)] = 0
    texture = np.zeros((2, texture_size, texture_size, 4), np.float32)
    texture[0, ..., :3], texture[0, ..., 3] = colour, gloss
    texture[1, ..., :3], texture[1, ..., 3] = hair_colour, 0.03

    vertices += _close_mouth(vertices)
    base = mesh.vertices
    on_body = mesh.vertex_group == mesh_lib.GROUPS.index("body")
    on_hair = mesh.vertex_group == mesh_lib.GROUPS.index("hair")
    body = mesh.triangles[mesh.triangle_group == mesh_lib.GROUPS.index("body")]
    normals = raster.vertex_normals(vertices, body)
    x, y, z = base.T
    # The shell grows out of the painted hairline from nothing, so no step shows there.
    rise = smooth_step(0.0, 0.45, hairline.above(x, y, z)) * (1 - mesh.ear_weight) * on_body
    bumps = 1 + (0.22 if style == "curly" else 0.15) * np.sin(x * 9 + 1.3) * np.sin(y * 8 + z * 7)
    shell = _SHELL_THICKNESS[style] * rng.uniform(0.85, 1.15) * rise * bumps
    jacket = 0.05 * smooth_step(collar, collar - 0.2, y) * on_body
    vertices = (vertices + normals * (shell + jacket)[:, None]).astype(np.float32)

    visible, has_hair_mesh = _cut_hair(rng, style, base, on_hair)
    keep = (mesh.triangle_group != mesh_lib.GROUPS.index("hair")) | has_hair_mesh
    head_weight = smooth_step(NECK_Y - 0.35, CHIN_Y + 0.1, y)
    head_weight[on_hair] = smooth_step(NECK_Y - 1.0, NECK_Y + 0.8, y[on_hair])
    lights = _make_lights(rng)
    return Person(
        seed=seed,
        hair_style=style,
        vertices=vertices,
        triangles=np.ascontiguousarray(mesh.triangles[keep]),
        uv_triangles=np.ascontiguousarray(mesh.uv_triangles[keep]),
        layers=(mesh.triangle_group[keep] == mesh_lib.GROUPS.index("hair")).astype(np.int32),
        visible=visible,
        texture=texture,
        head_weight=head_weight.astype(np.float32),
        left_eye=np.nonzero(mesh.vertex_group == mesh_lib.GROUPS.index("left_eye"))[0],
        right_eye=np.nonzero(mesh.vertex_group == mesh_lib.GROUPS.index("right_eye"))[0],
        lights=lights,
        background_seed=int(rng.integers(1 << 30)),
        lid_droop=float(rng.uniform(0.0, 0.07)),
        framing=_make_framing(rng),
    )


def _close_mouth(vertices: np.ndarray) -> np.ndarray:
    """Offsets that lift the jaw until the lips of the neutral face touch."""
    mesh = mesh_lib.load_face_mesh()
    jaw_open = mesh.units[mesh.unit_names.index("jawOpen")]
    gap = vertices[mesh.upper_lip_edge, 1].min() - vertices[mesh.lower_lip_edge, 1].max()
    opening = -jaw_open[mesh.lower_lip_edge, 1].mean()
    return -max(0.0, (gap + 0.01) / opening) * jaw_open


def change_scene(person: Person, seed: int) -> Person:
    """The same person in other light, before another background, framed a little differently."""
    rng = np.random.default_rng(seed)
    return dataclasses.replace(
        person,
        lights=_make_lights(rng),
        background_seed=int(rng.integers(1 << 30)),
        framing=_make_framing(rng),
    )


def _make_framing(rng: np.random.Generator) -> tuple[float, float, float]:
    zoom = rng.uniform(0.97, 1.05)
    return float(zoom), float(rng.uniform(-0.02, 0.02)), float(rng.uniform(-0.015, 0.015))


def _cut_hair(
    rng: np.random.Generator, style: str, base: np.ndarray, on_hair: np.ndarray
) -> tuple[np.ndarray, bool]:
    """Opens the hair part for the face and cuts it to length; returns that and if it is worn."""
    length = {"bob": rng.uniform(6.15, 6.5), "long": rng.uniform(4.6, 5.6)}.get(style, 9.0)
    x, y, z = base.T
    opening = rng.uniform(0.62, 0.74)
    # Positive outside an ellipse around the face and everywhere behind the ears.
    face = np.hypot(x / opening, (y - 7.0) / 1.02) - 1
    outside = np.maximum(face, (0.35 - z) * 2.0)
    visible = np.ones(len(base), np.float32)
    visible[on_hair] = np.minimum(outside, (y - length) * 2.0)[on_hair]
    return visible, style in ("bob", "long")
