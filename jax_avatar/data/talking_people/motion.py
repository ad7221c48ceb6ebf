"""Motion of a talking head besides its mouth: blinks, glances, sway and small timed actions."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from jax_avatar.data.talking_people.render import Pose

ACTIONS = {
    "smile": "smiles",
    "nod": "nods",
    "shake_head": "shakes the head",
    "look_left": "looks to the left of the picture",
    "look_right": "looks to the right of the picture",
    "raise_brows": "raises the eyebrows",
    "tilt_head": "tilts the head",
}
"""Names of the timed actions and the words that describe them."""

_SWAY_SD = dict(yaw=0.08, pitch=0.05, roll=0.04)  # radians
_SHIFT_SD = (0.04, 0.02, 0.03)  # decimetres right, up, towards the camera
_PAIRED = ("Left", "Right")


@dataclasses.dataclass(frozen=True)
class Action:
    """Something the person does besides talking."""

    name: str
    start_s: float
    end_s: float
    caption: str


@dataclasses.dataclass(frozen=True, eq=False)
class Motion:
    """Curves over the frames of a clip."""

    units: dict[str, np.ndarray]  # face-unit name -> [T] float32, to be added to the mouth's
    pose: np.ndarray  # [T 6] float32: yaw, pitch, roll in radians; right, up, near in decimetres
    gaze: np.ndarray  # [T 2] float32: right, down against the head, in radians
    actions: tuple[Action, ...]

    def scaled(self, movement: float) -> "Motion":
        """The same with larger or smaller movements of the head; the eyes still find the viewer."""
        less = (1 - movement) * self.pose
        gaze = np.clip(self.gaze + 0.7 * less[:, :2], -0.5, 0.5)
        return dataclasses.replace(self, pose=self.pose - less, gaze=gaze)

    def pose_at(self, frame: int) -> Pose:
        """The head pose of one frame."""
        yaw, pitch, roll, *shift = (float(v) for v in self.pose[frame])
        return Pose(yaw, pitch, roll, tuple(shift))

    def gaze_at(self, frame: int) -> tuple[float, float]:
        """Gaze of one frame."""
        right, down = (float(v) for v in self.gaze[frame])
        return right, down


def sway(
    rng: np.random.Generator, num_frames: int, fps: int, time_s: float, deviation: float
) -> Float[np.ndarray, " T"]:
    """A slow, smooth random curve around zero.

    Args:
        rng: source of the curve.
        num_frames: its length.
        fps: frames per second.
        time_s: seconds over which it forgets where it was.
        deviation: its standard deviation in the long run.
    """
    warm_up = int(4 * time_s * fps)
    keep = np.exp(-1 / (time_s * fps))
    white = rng.normal(size=warm_up + num_frames + 8)
    walk = np.zeros_like(white)
    for i in range(1, len(walk)):
        walk[i] = keep * walk[i - 1] + np.sqrt(1 - keep**2) * white[i]
    window = np.hanning(9)[1:-1]
    smooth = np.convolve(walk, window / window.sum(), "same")
    return (deviation * smooth[warm_up : warm_up + num_frames]).astype(np.float32)


def blinks(rng: np.random.Generator, num_frames: int, fps: int) -> Float[np.ndarray, " T"]:
    """Lid closure in [0, 1]; a blink every three seconds or so."""
    time = np.arange(num_frames) / fps
    closed = np.zeros(num_frames)
    middle = rng.uniform(-0.5, 2.5)
    while middle < num_frames / fps + 0.2:
        off = time - middle
        closed = np.maximum(closed, 1 - np.where(off < 0, -off / 0.10, off / 0.17))
        middle += rng.gamma(4, 0.8)
    return np.clip(closed, 0, 1).astype(np.float32)


def glances(rng: np.random.Generator, num_frames: int, fps: int) -> Float[np.ndarray, "T 2"]:
    """Gaze in radians: mostly at the viewer, with occasional small saccades."""
    gaze = np.zeros((num_frames, 2), np.float32)
    frame = 0
    while frame < num_frames:
        end = frame + 2 + int(rng.gamma(3, 0.35) * fps)
        away = 0.25 if rng.random() < 0.75 else 1.0
        gaze[frame:end] = rng.normal(0, [0.12 * away, 0.05 * away])
        frame = end
    return gaze


def _bump(time: np.ndarray, start: float, end: float, edge: float = 0.3) -> np.ndarray:
    """Rises from 0 to 1 after `start`, falls back before `end`."""
    edge = min(edge, (end - start) / 2)
    rise = np.clip(np.minimum(time - start, end - time) / edge, 0, 1)
    return rise * rise * (3 - 2 * rise)


def plan_actions(
    rng: np.random.Generator, duration_s: float, probability: float
) -> tuple[Action, ...]:
    """Draws when which actions happen.

    Args:
        rng: source.
        duration_s: of the clip.
        probability: chance that there are one or two.
    """
    if rng.random() >= probability:
        return ()
    count = int(rng.integers(1, 3))
    names = rng.choice(list(ACTIONS), count, replace=False)
    actions = []
    for slot, name in enumerate(names):
        low, high = slot * duration_s / count, (slot + 1) * duration_s / count
        length = rng.uniform(0.8, min(1.8, high - low))
        start = rng.uniform(low, high - length)
        actions.append(Action(str(name), float(start), float(start + length), ACTIONS[str(name)]))
    return tuple(actions)


def act(
    rng: np.random.Generator,
    actions: Sequence[Action],
    time: Float[np.ndarray, " T"],
    units: dict[str, np.ndarray],
    pose: Float[np.ndarray, "T 6"],
    gaze: Float[np.ndarray, "T 2"],
) -> None:
    """Adds timed actions to curves, in place.

    Args:
        rng: varies them.
        actions: to add.
        time: of the values, in seconds.
        units: smile, cheeks and brows are among them.
        pose: as of `Motion`.
        gaze: as of `Motion`.
    """
    for action in actions:
        lasting = _bump(time, action.start_s, action.end_s).astype(np.float32)
        phase = 2 * np.pi * (time - action.start_s) * rng.uniform(1.6, 2.1)
        sign = rng.choice([-1, 1])
        match action.name:
            case "smile":
                for side in _PAIRED:
                    units[f"mouthSmile{side}"] = units[f"mouthSmile{side}"] + 0.65 * lasting
                    units[f"cheekSquint{side}"] = units[f"cheekSquint{side}"] + 0.4 * lasting
            case "nod":
                pose[:, 1] += 0.07 * lasting * (1 - np.cos(phase))
            case "shake_head":
                pose[:, 0] += 0.16 * lasting * np.sin(phase)
                gaze[:, 0] -= 0.11 * lasting * np.sin(phase)
            case "look_left" | "look_right":
                way = -1 if action.name == "look_left" else 1
                gaze[:, 0] += way * 0.38 * lasting
                pose[:, 0] += way * 0.10 * lasting
            case "raise_brows":
                for name in ("browInnerUp", "browOuterUpLeft", "browOuterUpRight"):
                    units[name] = units[name] + 0.9 * lasting
            case "tilt_head":
                pose[:, 2] += sign * 0.16 * lasting


def make_motion(
    rng: np.random.Generator, num_frames: int, fps: int, action_probability: float = 0.3
) -> Motion:
    """Draws the motion of one clip.

    Args:
        rng: source of everything that follows.
        num_frames: length of the clip.
        fps: frames per second.
        action_probability: chance that the clip has one or two timed actions.
    """
    duration_s = num_frames / fps
    if duration_s < 2.0:
        action_probability = 0.0  # no room for an action
    time = np.arange(num_frames) / fps
    blink = blinks(rng, num_frames, fps)
    brows = np.clip(sway(rng, num_frames, fps, 0.8, 0.25), 0, 1)
    smile = np.clip(0.08 + sway(rng, num_frames, fps, 2.0, 0.10), 0, 0.35)
    units = {f"eyeBlink{side}": blink for side in _PAIRED}
    units |= {"browInnerUp": 0.8 * brows} | {f"browOuterUp{side}": brows for side in _PAIRED}
    units |= {f"mouthSmile{side}": 0.5 * smile for side in _PAIRED}
    units |= {f"cheekSquint{side}": 0.5 * smile for side in _PAIRED}
    angles = [sway(rng, num_frames, fps, 1.6, sd) for sd in _SWAY_SD.values()]
    shifts = [sway(rng, num_frames, fps, 2.0, sd) for sd in _SHIFT_SD]
    pose = np.stack(angles + shifts, 1)
    gaze = glances(rng, num_frames, fps) - 0.7 * pose[:, :2]  # the eyes stay on the viewer

    actions = plan_actions(rng, duration_s, action_probability)
    act(rng, actions, time, units, pose, gaze)
    return Motion(
        units={name: np.clip(curve, 0, 1).astype(np.float32) for name, curve in units.items()},
        pose=pose.astype(np.float32),
        gaze=np.clip(gaze, -0.5, 0.5).astype(np.float32),
        actions=actions,
    )
