"""A portrait of an invented person and frames of the same person moving, with the exact flow.

    seed -> person, scene, portrait's expression -> portrait
         -> speech, motion -> favoured frames ----> frames, flow, what the portrait shows of them

Closed lids, wide mouths and turned heads are rare in speech and hard to draw, so frames that have
them are drawn more often. Half of the portraits are neutral; the others are turned and smile,
some with teeth, as people have themselves photographed.
"""

import dataclasses
import functools
import os
import pathlib

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw

from jax_avatar.data.talking_people import clips, head_motion, motion, speech, tracks
from jax_avatar.data.talking_people import mesh as mesh_lib
from jax_avatar.data.talking_people.head_motion import GAZE
from jax_avatar.data.talking_people.person import (
    Person,
    change_scene,
    make_background,
    make_person,
)
from jax_avatar.data.talking_people.render import (
    Pose,
    paint,
    posed_vertices,
    project,
    unit_weights,
)
from jax_avatar.data.talking_people.utterances import is_held_out
from jax_avatar.portraits.framing import Framing

FLOW_SIDE = 64
"""Cells of the flow's grid in either direction."""
WINDOW = 4
"""Frames of a latent."""

_TRACK_S = 10
_TALKS = 48
_TURNED = np.array([0.1, 0.08, 0.1])  # yaw, pitch, roll of a large turn


@dataclasses.dataclass(frozen=True)
class MovedPortraitsConfig:
    """Pictures of a set.

    Attributes:
        size: edge of the pictures in pixels.
        count: frames of each portrait.
        fps: frames per second of the motion.
        movement: least and greatest size of the head's movements.
        is_plain: neutral portraits in the renderer's own scenes, frames one after the other with
            their sound, a voice that is never trained on; for tests.
        texture_size: of the people.
    """

    size: int = 128
    count: int = 12
    fps: int = 25
    movement: tuple[float, float] = (0.3, 1.2)
    is_plain: bool = False
    texture_size: int = 384

    def __post_init__(self):
        object.__setattr__(self, "movement", tuple(self.movement))
        if self.size % FLOW_SIDE:
            raise ValueError(f"size {self.size}: expected a multiple of {FLOW_SIDE} pixels.")
        if self.is_plain and self.count % WINDOW:
            raise ValueError(f"count {self.count}: expected whole windows of {WINDOW} frames.")
        if not WINDOW <= self.count <= _TRACK_S * self.fps - WINDOW:
            raise ValueError(
                f"count {self.count}: expected {WINDOW} to {_TRACK_S * self.fps - WINDOW} frames."
            )


@dataclasses.dataclass(frozen=True, eq=False)
class MovedPortrait:
    """One portrait, `k` frames, and the truth behind them; `s` pixels, a grid of 64 x 64 cells."""

    portrait: np.ndarray  # [s s 3] uint8
    portrait_surface: np.ndarray  # [s s] uint8, 255 where the person is
    depth: np.ndarray  # [64 64] float16, of the portrait, see `Camera.depth`
    head_weight: np.ndarray  # [64 64] float16, 1 where the surface turns with the head
    camera: np.ndarray  # [4] float32: `Camera.lever`, `Camera.focal`
    frames: np.ndarray  # [k s s 3] uint8
    surface: np.ndarray  # [k s s] uint8
    flow: np.ndarray  # [k 64 64 2] float16, in widths: where in the portrait the surface lies
    seen: np.ndarray  # [k 64 64] uint8, 1 where the portrait shows what is there
    boxes: np.ndarray  # [k 3 4] float32, in widths: left, top, right, bottom of mouth and eyes
    lip_gap: np.ndarray  # [k] float32
    motion: np.ndarray  # [k 4 c] float32, curves of the frame's window, divided by their scale
    offset: np.ndarray  # [k] int8, position of the frame in its window
    wave: np.ndarray  # [n] float32, 16 kHz; `frames` begin a frame after it; empty if not plain


def make_moved_portrait(seed: int, config: MovedPortraitsConfig) -> MovedPortrait:
    """Renders the set of one person, always the same for the same arguments."""
    rng = np.random.default_rng([seed, 14])
    scene = _Scene(rng, make_person(seed, config.texture_size), config)
    starts, chosen = _choose(rng, scene.units, scene.move.pose, config)
    vertices = posed_vertices(scene.person, unit_weights(scene.looks), scene.pose, scene.gaze)
    points = head_motion.eyes_and_mouth(scene.person, vertices)
    if not config.is_plain:
        points = points + rng.normal(0, 0.006, points.shape)  # as a detector of landmarks errs
    camera = head_motion.Camera(scene.person, scene.pose, Framing.of(points))
    portrait = _Drawing(scene.person, vertices, camera.framing, scene.background)
    drawn = [
        _Drawing(scene.person, scene.vertices_at(i), camera.framing, scene.background)
        for i in chosen.tolist()
    ]
    flow, seen = zip(*(frame.flow_to(portrait) for frame in drawn), strict=True)
    motion = [[scene.curves_at(i + j, camera) for j in range(WINDOW)] for i in starts.tolist()]
    values = np.stack([camera.depth(vertices), scene.person.head_weight], 1)
    depth, head_weight = portrait.on_grid(values)
    return MovedPortrait(
        portrait=portrait.image,
        portrait_surface=portrait.surface,
        depth=depth.astype(np.float16),
        head_weight=head_weight.astype(np.float16),
        camera=np.array([*camera.lever, camera.focal], np.float32),
        frames=np.stack([frame.image for frame in drawn]),
        surface=np.stack([frame.surface for frame in drawn]),
        flow=np.stack(flow).astype(np.float16),
        seen=np.stack(seen).astype(np.uint8),
        boxes=np.stack([frame.boxes for frame in drawn]).astype(np.float32),
        lip_gap=np.array([frame.lip_gap for frame in drawn], np.float32),
        motion=np.array(motion, np.float32),
        offset=(chosen - starts).astype(np.int8),
        wave=scene.wave,
    )


def load_moved_portrait(
    folder: str | os.PathLike, seed: int, config: MovedPortraitsConfig
) -> MovedPortrait:
    """`make_moved_portrait`, kept in a folder; rendered where it is not there yet.

    Raises:
        ValueError: the folder holds portraits of other settings.
    """
    path = pathlib.Path(folder) / f"{seed:06}.npz"
    if not path.exists():
        made = make_moved_portrait(seed, config)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(unfinished, **vars(made))
        unfinished.rename(path)
    with np.load(path, allow_pickle=False) as file:
        found = {name: file[name] for name in file.files}
    expected = (config.count, config.size, config.size, 3)
    fields = {field.name for field in dataclasses.fields(MovedPortrait)}
    if set(found) != fields or found["frames"].shape != expected:
        raise ValueError(
            f"{path} is of other settings, or of another version: expected frames of {expected} "
            f"and {', '.join(sorted(fields))}; remove the folder, or name another one."
        )
    return MovedPortrait(**found)


class _Scene:
    """A person before a backdrop, how the portrait looks, and what happens after it."""

    def __init__(self, rng: np.random.Generator, person: Person, config: MovedPortraitsConfig):
        person = change_scene(person, int(rng.integers(1 << 31)))
        is_busy = not config.is_plain and rng.random() < 0.6
        if not config.is_plain and rng.random() < 0.5:
            person = _blotched(rng, person)
        self.person, size = person, config.size
        self.background = (
            _clutter(rng, size) if is_busy else make_background(person.background_seed, size)
        )
        self.looks, self._angles = ({}, np.zeros(6)) if config.is_plain else _portrait_state(rng)
        self.units, self.move, self.wave = (
            _spoken(rng, config) if config.is_plain else _track(rng, self.looks, config)
        )
        self.pose = self._pose(self._angles)
        self.gaze = (-0.7 * float(self._angles[0]), -0.7 * float(self._angles[1]))
        names = mesh_lib.load_face_mesh().unit_names
        self._kept = [names.index(name) for name in head_motion.UNITS]

    @staticmethod
    def _pose(values: np.ndarray) -> Pose:
        yaw, pitch, roll, *shift = (float(v) for v in values)
        return Pose(yaw, pitch, roll, tuple(shift))

    def vertices_at(self, i: int) -> Float[np.ndarray, "v 3"]:
        """Posed vertices of a frame."""
        right, down = self.move.gaze_at(i)
        gaze = (right + self.gaze[0], down + self.gaze[1])
        return posed_vertices(self.person, self.units[i], self._pose_at(i), gaze)

    def _pose_at(self, i: int) -> Pose:
        return self._pose(self._angles + self.move.pose[i])

    def curves_at(self, i: int, camera: head_motion.Camera) -> Float[np.ndarray, " c"]:
        """Scaled curves of a frame."""
        head = camera.head(self._pose_at(i))
        own = np.concatenate([self.units[i, self._kept], head, self.move.gaze[i]])
        return own / head_motion.SCALE


class _Drawing:
    """One framed picture, and what lies under its samples."""

    def __init__(self, person: Person, vertices, framing: Framing, background):
        mesh = mesh_lib.load_face_mesh()
        self.person, self.fine = person, 2 * len(background)
        xy, self.inverse_z = project(person, vertices, 1)
        self.xy = framing(xy).astype(np.float32)
        self.image, self.hits = paint(
            person, vertices, self.xy * np.float32(self.fine), self.inverse_z, background
        )
        covered = (self.hits[0] >= 0).reshape(len(background), 2, -1, 2).mean((1, 3))
        self.surface = np.round(255 * covered).astype(np.uint8)
        parts = (mesh.lips, person.left_eye, person.right_eye)
        self.boxes = np.stack([np.r_[self.xy[i].min(0), self.xy[i].max(0)] for i in parts])
        gap = self.xy[mesh.lower_lip_edge, 1].min() - self.xy[mesh.upper_lip_edge, 1].max()
        rest = framing(project(person, person.vertices[[mesh.crown, mesh.chin]], 1)[0])
        self.lip_gap = max(0.0, float(gap / (rest[1, 1] - rest[0, 1])))

    def _cells(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Corners and their weights under the middle of each cell, and where there is nothing."""
        step = self.fine // FLOW_SIDE
        t, k0, k1 = (h[step // 2 :: step, step // 2 :: step] for h in self.hits)
        corner = self.person.triangles[np.maximum(t, 0)]
        return corner, np.stack([k0, k1, 1 - k0 - k1], -1), t < 0

    def on_grid(self, values: Float[np.ndarray, "v c"]) -> Float[np.ndarray, "c 64 64"]:
        """Values of vertices on the flow's grid, 0 where there is nothing."""
        corner, weight, is_bare = self._cells()
        found = (values[corner] * weight[..., None]).sum(-2)
        return np.moveaxis(np.where(is_bare[..., None], 0, found), -1, 0)

    @functools.cached_property
    def distance(self) -> Float[np.ndarray, "n n"]:
        """From the camera to the surface under every sample; infinite where there is none."""
        t, k0, k1 = self.hits
        weight = np.stack([k0, k1, 1 - k0 - k1], -1)
        found = (weight / self.inverse_z[self.person.triangles[np.maximum(t, 0)]]).sum(-1)
        return np.where(t < 0, np.inf, found)

    def flow_to(self, portrait: "_Drawing") -> tuple[np.ndarray, np.ndarray]:
        """Place of each cell's surface in the portrait, and whether it shows there."""
        fine, step = self.fine, self.fine // FLOW_SIDE
        corner, weight, is_bare = self._cells()
        at = (np.arange(FLOW_SIDE) * step + step // 2 + 0.5) / fine
        here = np.stack(np.meshgrid(at, at), -1)
        there = (portrait.xy[corner] * weight[..., None]).sum(-2)
        distance = (weight / portrait.inverse_z[corner]).sum(-1)
        x, y = np.clip(there * fine, 1, fine - 2).astype(int).transpose(2, 0, 1)
        near = [portrait.distance[y + i, x + j] for i in (-1, 0, 1) for j in (-1, 0, 1)]
        seen = (distance < np.max(near, 0) + 0.05) & (np.abs(there - 0.5) < 0.5).all(-1)
        seen[is_bare] = portrait.hits[0][step // 2 :: step, step // 2 :: step][is_bare] < 0
        return np.where(is_bare[..., None], 0, there - here), seen


@functools.lru_cache(maxsize=_TALKS)
def _mouth(number: int, fps: int) -> dict[str, np.ndarray]:
    """Mouth of one of a few dozen talks, which all people share."""
    rng = np.random.default_rng([number, 0])
    return clips.make_talk(rng, speech.TRAINING_VOICES, _TRACK_S * fps, fps).mouth


def _track(
    rng: np.random.Generator, looks: dict[str, float], config: MovedPortraitsConfig
) -> tuple[np.ndarray, motion.Motion, np.ndarray]:
    """Face units [T q] and motion of some seconds of talking, without sound."""
    frames = _TRACK_S * config.fps
    mouth = _mouth(int(rng.integers(_TALKS)), config.fps)
    move = motion.make_motion(rng, frames, config.fps, action_probability=0.6)
    move = move.scaled(float(rng.uniform(*config.movement)))
    larger = rng.uniform(0.8, 1.3)
    mouth = {name: larger * curve for name, curve in mouth.items()}
    # Some of a portrait's smile stays; its teeth do not.
    stay = {k: np.float32(0.6 * v) for k, v in looks.items() if "Smile" in k or "cheek" in k}
    curves = {name: move.units.get(name, 0) + stay.get(name, 0) for name in {*move.units, *stay}}
    return clips.combine_units(mouth, curves), move, np.zeros(0, np.float32)


def _spoken(
    rng: np.random.Generator, config: MovedPortraitsConfig
) -> tuple[np.ndarray, motion.Motion, np.ndarray]:
    """Units, motion and sound of the held-out voice; the motion goes with what is said."""
    movement = float(rng.uniform(*config.movement))
    settings = tracks.TrackConfig(float(_TRACK_S), config.fps, movement, quiet=0.0)
    track = tracks.track_from(rng, _HeldOutVoice(), settings)
    move = motion.Motion({}, track.pose[3:], track.curves[3:, head_motion.index(*GAZE)], ())
    return track.units[3:], move, track.wave


class _HeldOutVoice:
    """Sentences that nothing was trained on, spoken when they are asked for."""

    @staticmethod
    def draw_voice(rng: np.random.Generator) -> str:
        """The one there is."""
        del rng
        return f"flite/{speech.HELD_OUT_VOICE}"

    @staticmethod
    def draw(rng: np.random.Generator, voice: str) -> speech.Utterance:
        """A sentence."""
        text = speech.sentence(rng)
        while not is_held_out(text):
            text = speech.sentence(rng)
        return speech.synthesise(text, voice.removeprefix("flite/"))


def _choose(
    rng: np.random.Generator, units: np.ndarray, pose: np.ndarray, config: MovedPortraitsConfig
) -> tuple[np.ndarray, np.ndarray]:
    """First frames of the windows, and the frames that are drawn."""
    if config.is_plain:
        # Frame 0 is a latent of its own, as in every clip.
        chosen = 1 + np.arange(config.count)
        return chosen - np.arange(config.count) % WINDOW, chosen
    last = len(units) - WINDOW
    names = mesh_lib.load_face_mesh().unit_names
    is_closed = units[:, names.index("eyeBlinkLeft")] > 0.4
    is_wide = units[:, names.index("jawOpen")] > 0.5
    is_turned = np.abs(pose[:, :3] / _TURNED).max(1) > 1
    rare = 1 + 6.0 * is_closed + 3.0 * is_wide + 2.0 * is_turned
    chosen = np.sort(rng.choice(len(rare), config.count, replace=False, p=rare / rare.sum()))
    return np.clip(chosen - rng.integers(WINDOW, size=len(chosen)), 0, last), chosen


def _portrait_state(rng: np.random.Generator) -> tuple[dict[str, float], np.ndarray]:
    """Face units and pose of a portrait."""
    if rng.random() < 0.5:
        return {}, np.zeros(6)
    pose = np.r_[rng.normal(0, [0.12, 0.06, 0.05]), 0, 0, 0]
    smile = float(rng.uniform(0, 0.7))
    units = {f"mouthSmile{side}": smile for side in ("Left", "Right")}
    units |= {f"cheekSquint{side}": 0.5 * smile for side in ("Left", "Right")}
    if rng.random() < 0.5:  # teeth
        units |= {f"mouthUpperUp{side}": float(rng.uniform(0, 0.6)) for side in ("Left", "Right")}
        units["jawOpen"] = float(rng.uniform(0, 0.2))
    return units, pose


def _blotched(rng: np.random.Generator, person: Person) -> Person:
    """The same person with blotches that no skin has, lest skin be learned by heart."""
    texture = person.texture.copy()
    for cells in (8, 32, 128):
        noise = rng.normal(0, 0.6, (cells, cells, 1)) + rng.normal(0, 0.3, (cells, cells, 3))
        large = [
            np.asarray(Image.fromarray(c.astype(np.float32)).resize(texture.shape[1:3]))
            for c in np.moveaxis(noise, -1, 0)
        ]
        texture[..., :3] *= np.exp(0.25 * rng.random() * np.stack(large, -1))
    return dataclasses.replace(person, texture=texture)


def _clutter(rng: np.random.Generator, size: int) -> Float[np.ndarray, "r r 3"]:
    """A busy backdrop in linear colours: noise of all scales, and shapes with sharp edges."""
    scale = 0.6 * rng.random()
    picture = np.full((size, size, 3), rng.random(3) * 0.6)
    for cells in (2, 4, 8, 16, 32):
        noise = Image.fromarray((rng.random((cells, cells, 3)) * 255).astype(np.uint8))
        noise = np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC)) / 255 - 0.5
        picture = picture + scale * noise / cells**0.5
    image = Image.fromarray((picture.clip(0, 1) * 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(0, 9))):
        x, y = rng.random(2) * size
        w, h = rng.random(2) ** 2 * size * 0.4
        shape = draw.rectangle if rng.random() < 0.5 else draw.ellipse
        shape((x - w, y - h, x + w, y + h), fill=tuple(int(c) for c in rng.integers(0, 256, 3)))
    return (np.asarray(image, np.float32) / 255) ** np.float32(2.2)
