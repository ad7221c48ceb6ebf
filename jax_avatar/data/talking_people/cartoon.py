"""Flat cartoon heads moved by the same face units: a second style, for tests out of the domain."""

import colorsys
import dataclasses

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw

from jax_avatar.data.talking_people import mesh as mesh_lib
from jax_avatar.data.talking_people.render import FRONTAL, Pose, Rendering

_SUPERSAMPLING = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Cartoon:
    """Looks of one figure; lengths are fractions of the picture."""

    skin: tuple[float, float, float]
    hair: tuple[float, float, float]
    cloth: tuple[float, float, float]
    iris: tuple[float, float, float]
    lip: tuple[float, float, float]
    background: tuple[float, float, float]
    backdrop: tuple[tuple[float, float, float, tuple[float, float, float]], ...]  # x, y, radius
    face_width: float
    face_height: float
    eye_size: float
    mouth_width: float
    hair_style: int
    has_glasses: bool


def make_cartoon(seed: int) -> Cartoon:
    """Invents the figure that belongs to a seed."""
    rng = np.random.default_rng(seed)

    def hsv(hue: float, saturation: float, value: float) -> tuple[float, float, float]:
        return colorsys.hsv_to_rgb(hue % 1, saturation, value)

    skin = hsv(rng.uniform(0.03, 0.10), rng.uniform(0.2, 0.55), rng.uniform(0.5, 0.98))
    natural = rng.random() < 0.8
    return Cartoon(
        skin=skin,
        hair=hsv(
            rng.uniform(0, 0.12) if natural else rng.random(),
            rng.uniform(0.2, 0.8),
            rng.uniform(0.1, 0.8),
        ),
        cloth=hsv(rng.random(), rng.uniform(0.3, 0.9), rng.uniform(0.3, 0.95)),
        iris=hsv(rng.random(), 0.6, rng.uniform(0.25, 0.6)),
        lip=(0.86 * skin[0], 0.48 * skin[1], 0.5 * skin[2]),
        background=hsv(rng.random(), rng.uniform(0.1, 0.5), rng.uniform(0.3, 0.95)),
        backdrop=tuple(
            (*rng.random(2), rng.uniform(0.05, 0.2), hsv(rng.random(), 0.3, 0.8))
            for _ in range(int(rng.integers(0, 5)))
        ),
        face_width=float(rng.uniform(0.25, 0.31)),
        face_height=float(rng.uniform(0.34, 0.38)),
        eye_size=float(rng.uniform(0.050, 0.065)),
        mouth_width=float(rng.uniform(0.10, 0.13)),
        hair_style=int(rng.integers(0, 4)),
        has_glasses=bool(rng.random() < 0.2),
    )


class _Canvas:
    """Smooth closed shapes on an oversampled picture; coordinates are fractions of it."""

    def __init__(self, size: int, colour):
        self.edge = size * _SUPERSAMPLING
        self.image = Image.new("RGB", (self.edge, self.edge), _rgb(colour))
        self.draw = ImageDraw.Draw(self.image)

    def blob(self, points, colour) -> None:
        self.draw.polygon(
            [tuple(p) for p in _smooth_outline(points) * self.edge], fill=_rgb(colour)
        )

    def ellipse(self, x, y, width, height, colour) -> None:
        box = np.array([x - width, y - height, x + width, y + height]) * self.edge
        self.draw.ellipse(tuple(box), fill=_rgb(colour))

    def line(self, points, colour, width: float) -> None:
        stroke = max(1, round(width * self.edge))
        scaled = [tuple(p) for p in np.asarray(points) * self.edge]
        self.draw.line(scaled, fill=_rgb(colour), width=stroke, joint="curve")


def _rgb(colour) -> tuple[int, int, int]:
    return tuple(int(255 * min(max(c, 0), 1)) for c in colour)


def _smooth_outline(points) -> np.ndarray:
    """Catmull-Rom curve through the points, closed."""
    p1 = np.asarray(points, float)
    p0, p2, p3 = np.roll(p1, 1, 0), np.roll(p1, -1, 0), np.roll(p1, -2, 0)
    t = np.linspace(0, 1, 10, endpoint=False)[None, :, None]
    p0, p1, p2, p3 = (p[:, None] for p in (p0, p1, p2, p3))
    curve = 0.5 * (
        2 * p1
        + (p2 - p0) * t
        + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2
        + (3 * p1 - p0 - 3 * p2 + p3) * t**3
    )
    return curve.reshape(-1, 2)


def draw(
    figure: Cartoon,
    units: Float[np.ndarray, " q"],
    pose: Pose = FRONTAL,
    gaze: tuple[float, float] = (0.0, 0.0),
    size: int = 96,
) -> Rendering:
    """Draws one frame; the arguments mean what they mean for `render.render`."""
    weight = dict(zip(mesh_lib.load_face_mesh().unit_names, map(float, units), strict=True))
    canvas = _Canvas(size, figure.background)
    for x, y, radius, colour in figure.backdrop:
        canvas.ellipse(x, y, radius, radius, colour)
    cx = 0.5 + 0.04 * pose.shift[0]
    cy = 0.49 - 0.04 * pose.shift[1]
    w, h = figure.face_width, figure.face_height
    cos, sin = np.cos(-pose.roll), np.sin(-pose.roll)

    def place(points) -> np.ndarray:
        """Face coordinates, in half widths and half heights, to the picture."""
        x, y = np.asarray(points, float).T * [[w], [h]]
        y = y - h  # turn about the chin
        return np.stack([cx + cos * x - sin * y, cy + h + sin * x + cos * y], 1)

    turn, nod = 0.5 * pose.yaw, 0.4 * pose.pitch  # parallax of the features, in half widths
    skin = np.array(figure.skin)
    hair = np.array(figure.hair)
    if figure.hair_style == 3:
        back = [(-1.25, -0.4), (0, -1.25), (1.25, -0.4), (1.3, 1.1), (-1.3, 1.1)]
        canvas.blob(place(back), hair * 0.75)
    neck = [(cx - 0.09, cy), (cx + 0.09, cy), (cx + 0.1, 1.1), (cx - 0.1, 1.1)]
    canvas.blob(neck, skin * 0.8)
    shoulders = [(cx - 0.12, 0.93), (cx, 0.97), (cx + 0.12, 0.93), (cx + 0.6, 1.2), (cx - 0.6, 1.2)]
    canvas.blob(shoulders, figure.cloth)
    for side in (-1, 1):
        (ear,) = place([(side * 1.0 - 0.3 * turn, 0.05)])
        canvas.ellipse(*ear, 0.03, 0.05, skin * 0.85)
    jaw = 0.22 * weight["jawOpen"]
    face = [(-1, -0.2), (-0.85, -0.8), (0, -1.02), (0.85, -0.8), (1, -0.2), (0.88, 0.5)]
    face += [(0.45, 0.92 + jaw), (0, 1.0 + jaw), (-0.45, 0.92 + jaw), (-0.88, 0.5)]
    canvas.blob(place([(x + 0.3 * turn * (y > -0.5), y) for x, y in face]), skin)

    # Mouth: an outer outline of lip, an inner one of dark, a strip of teeth.
    pucker = min(1.0, weight["mouthPucker"] + 0.6 * weight["mouthFunnel"])
    spread = weight["mouthStretchLeft"] + weight["mouthSmileLeft"]
    press = weight["mouthPressLeft"] + weight["mouthRollLower"]
    half = figure.mouth_width / w * (1 - 0.4 * pucker) * (1 + 0.25 * spread)
    up = 0.045 * (1 - 0.6 * min(press, 1)) * (1 + 0.6 * pucker) + 0.03 * weight["mouthUpperUpLeft"]
    low = 1.4 * up
    opening = 0.36 * weight["jawOpen"] + 0.04 * weight["mouthLowerDownLeft"]
    opening = max(0.0, opening - 0.03 * press)
    mx, my, corner = 1.3 * turn, 0.52 + nod, -0.07 * weight["mouthSmileLeft"]

    def lips(width: float, top: float, bottom: float) -> list[tuple[float, float]]:
        outline = [(-1, corner), (-0.45, -top), (0, -0.8 * top), (0.45, -top), (1, corner)]
        outline += [(0.55, bottom), (0, 1.1 * bottom), (-0.55, bottom)]
        return [(mx + width * x, my + y) for x, y in outline]

    outer = place(lips(half, up, opening + low))
    canvas.blob(outer, figure.lip)
    if opening > 0.01:
        canvas.blob(place(lips(0.82 * half, 0.004, opening)), (0.22, 0.03, 0.05))
        canvas.blob(place(lips(0.66 * half, 0.002, min(0.07, 0.6 * opening))), (0.95, 0.94, 0.9))
    else:
        ends = [(mx - 0.9 * half, my + corner), (mx, my), (mx + 0.9 * half, my + corner)]
        canvas.line(place(ends), np.array(figure.lip) * 0.5, 0.006)

    bridge = [(turn, -0.05 + nod), (1.5 * turn + 0.1, 0.22 + nod), (1.3 * turn - 0.06, 0.26 + nod)]
    canvas.line(place(bridge), skin * 0.72, 0.010)
    blink = weight["eyeBlinkLeft"]
    for side in (-1, 1):
        ((ex, ey),) = place([(side * 0.44 + turn, -0.14 + nod)])
        eye = figure.eye_size
        lid = eye * 0.75 * (1 - blink)
        if lid > 0.008:
            canvas.ellipse(ex, ey, eye, lid, (0.97, 0.97, 0.96))
            gx, gy = ex + 0.05 * gaze[0], ey + 0.05 * gaze[1]
            canvas.ellipse(gx, gy, 0.5 * eye, min(0.5 * eye, lid), figure.iris)
            canvas.ellipse(gx, gy, 0.26 * eye, min(0.26 * eye, lid), (0.03, 0.03, 0.04))
        lash = [(ex - eye, ey), (ex - 0.4 * eye, ey - lid), (ex + 0.4 * eye, ey - lid)]
        canvas.line([*lash, (ex + eye, ey)], (0.1, 0.07, 0.06), 0.012)
        by = ey - 1.35 * eye - 0.03 * weight["browInnerUp"]
        brow = [(ex - eye, by + 0.008), (ex, by - 0.010), (ex + eye, by + 0.008)]
        canvas.line(brow, hair * 0.7, 0.016)
        if figure.has_glasses:
            frame = [
                (ex + 1.4 * eye * np.cos(a), ey + 1.4 * eye * np.sin(a))
                for a in np.linspace(0, 2 * np.pi, 25)
            ]
            canvas.line(frame, (0.1, 0.1, 0.1), 0.010)
    if figure.hair_style > 0:
        fringe = (-0.6, -0.45, -0.55)[figure.hair_style - 1]
        cap = [(-1.08, -0.15), (-1.02, -0.85), (-0.3, -1.22), (0.5, -1.2), (1.05, -0.8)]
        cap += [(1.08, -0.15), (0.8, -0.5), (0.3, fringe), (-0.5, fringe - 0.06), (-0.82, -0.5)]
        canvas.blob(place(cap), hair)

    image = canvas.image.resize((size, size), Image.Resampling.BOX)
    low_corner, high_corner = outer.min(0) * size, outer.max(0) * size
    return Rendering(
        image=np.asarray(image),
        lip_gap=0.5 * opening if opening > 0.01 else 0.0,
        mouth_box=np.concatenate([low_corner, high_corner]).astype(np.float32),
    )
