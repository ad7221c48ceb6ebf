"""Head, brow, lid and gaze motion that follows speech, and idle motion in silence.

prosody --stress---------> nods, brows, small turns
        --phrases, pauses-> posture, breath, blinks, gaze
random curves ---------------> a share of everything that the sound does not determine

All curves are sums of smooth bumps and of smoothed noise, so they do not jitter at any frame rate.
"""

import dataclasses

import numpy as np
from jaxtyping import Float

from jax_avatar.data.talking_people.motion import Action, Motion, act, plan_actions
from jax_avatar.data.talking_people.prosody import Prosody

__all__ = ["Style", "blink_times", "draw_style", "make_speaking_motion", "wander"]

_SIDES = ("Left", "Right")
_CLOSING_S, _CLOSED_S, _OPENING_S = 0.08, 0.03, 0.16
_SACCADE_S = 0.12
_FOLLOW = 0.7  # share of the head's turn that the eyes make up for


@dataclasses.dataclass(frozen=True)
class Style:
    """Sizes and rates of one speaker's motion.

    Attributes:
        nod: radians of a nod on a stressed syllable.
        turn: radians of the turn and tilt that goes with it.
        brow: lift of the brows on a strong stress.
        silent: size of the head's movement in silence, over that in speech.
        blink_s: mean time between blinks.
        away: chance that the gaze leaves at the start of a phrase.
    """

    nod: float
    turn: float
    brow: float
    silent: float
    blink_s: float
    away: float


def draw_style(rng: np.random.Generator) -> Style:
    """Draws the style of a speaker."""
    nod, turn, brow = rng.lognormal(0, 0.3, 3)
    return Style(
        nod=0.05 * nod,
        turn=0.018 * turn,
        brow=0.45 * brow,
        silent=float(rng.uniform(0.4, 0.65)),
        blink_s=float(np.clip(rng.normal(3.4, 0.3), 2.8, 4.0)),
        away=float(rng.uniform(0.3, 0.6)),
    )


def make_speaking_motion(
    rng: np.random.Generator,
    prosody: Prosody,
    num_frames: int,
    fps: int,
    *,
    style: Style,
    movement: float = 1.0,
    actions: float = 0.0,
) -> Motion:
    """Draws the motion of a speaker without the mouth's share.

    Args:
        rng: source of the random shares.
        prosody: of the sound; frame 0 is at its start.
        num_frames: length of the motion.
        fps: frames per second.
        style: of the person.
        movement: scale of the head's movements, timed actions excepted.
        actions: chance that there are one or two timed actions.

    Returns:
        The motion; its units are to be added to the mouth's.
    """
    time = np.arange(num_frames) / fps
    pose = _pose(rng, prosody, time, style)
    gaze, leaps = _gaze(rng, prosody, time, style)
    closed = blinks(blink_times(rng, prosody, num_frames / fps, style, leaps), rng, time)
    lift = _brows(rng, prosody, time, style)
    smile = _soft(0.05 + wander(rng, time, 1.5, 0.07), 0.05)
    units = {f"eyeBlink{side}": closed for side in _SIDES}
    units |= {"browInnerUp": 0.8 * lift} | {f"browOuterUp{side}": lift for side in _SIDES}
    units |= {f"mouthSmile{side}": 0.5 * smile for side in _SIDES}
    units |= {f"cheekSquint{side}": 0.5 * smile for side in _SIDES}
    pose *= movement
    gaze -= _FOLLOW * pose[:, :2]  # the eyes stay on the viewer
    planned: tuple[Action, ...] = plan_actions(rng, num_frames / fps, actions)
    act(rng, planned, time, units, pose, gaze)
    return Motion(
        units={name: np.clip(curve, 0, 1).astype(np.float32) for name, curve in units.items()},
        pose=pose.astype(np.float32),
        gaze=np.clip(gaze, -0.5, 0.5).astype(np.float32),
        actions=planned,
    )


def wander(
    rng: np.random.Generator, time: Float[np.ndarray, " T"], time_s: float, deviation: float
) -> Float[np.ndarray, " T"]:
    """Smooth random curve around zero with a Gaussian correlation.

    Args:
        rng: source of the curve.
        time: of the values, evenly spaced.
        time_s: time over which it forgets where it was.
        deviation: its standard deviation in the long run.
    """
    step = time_s / 8
    reach = 3 * time_s
    knots = np.arange(time[0] - reach, time[-1] + reach + step, step)
    white = rng.normal(size=len(knots))
    weight = np.exp(-(((time[:, None] - knots[None]) / time_s) ** 2))
    return deviation * (weight @ white) / np.sqrt((weight**2).sum(1))


def _bump(time: np.ndarray, middles: np.ndarray, sizes: np.ndarray, width_s: float) -> np.ndarray:
    """Sum of bell-shaped bumps."""
    return np.exp(-0.5 * ((time[:, None] - middles[None]) / width_s) ** 2) @ sizes


def _rise(time: np.ndarray, start: float, length_s: float) -> np.ndarray:
    """From 0 to 1 with the least jerk."""
    x = np.clip((time - start) / length_s, 0, 1)
    return x**3 * (10 - 15 * x + 6 * x**2)


def _steps(
    time: np.ndarray, starts: np.ndarray, targets: np.ndarray, length_s: float
) -> np.ndarray:
    """From target to target `[n k]`, each reached `length_s` after its start."""
    curve = np.zeros((len(time), targets.shape[1]))
    before = np.zeros(targets.shape[1])
    for start, target in zip(starts, targets, strict=True):
        curve += _rise(time, start, length_s)[:, None] * (target - before)
        before = target
    return curve


def _soft(x: np.ndarray, edge: float) -> np.ndarray:
    """The positive part, without a kink."""
    return 0.5 * (x + np.sqrt(x**2 + edge**2))


def _speaking(prosody: Prosody, time: np.ndarray) -> np.ndarray:
    """1 while something is said, 0 in silence, with slow changes."""
    loud = np.zeros(len(time))
    for start, end in prosody.phrases:
        loud = np.maximum(loud, _rise(time, start - 0.4, 0.6) * (1 - _rise(time, end - 0.1, 0.8)))
    return loud


def _pose(
    rng: np.random.Generator, prosody: Prosody, time: np.ndarray, style: Style
) -> Float[np.ndarray, "T 6"]:
    """Yaw, pitch, roll in radians; right, up, near in decimetres."""
    speaking = _speaking(prosody, time)
    lively = style.silent + (1 - style.silent) * speaking
    deviations = ((0.045, 0.03), (0.025, 0.016), (0.024, 0.012))
    turn = np.stack(
        [
            wander(rng, time, 1.6, slow) * lively
            + wander(rng, time, 0.55, fast) * lively * speaking
            for slow, fast in deviations
        ],
        1,
    )
    turn += _postures(rng, prosody, time)
    turn += _nods(rng, prosody, time, style)
    turn += _melody(rng, prosody, time)
    breath = _breath(rng, prosody, time)
    turn[:, 1] -= 0.004 * breath
    right = 0.18 * turn[:, 0] + wander(rng, time, 2.0, 0.03) * lively
    up = 0.025 * breath + wander(rng, time, 2.2, 0.015) * lively
    near = 0.03 * speaking + wander(rng, time, 2.2, 0.03) * lively
    near += _bump(time, prosody.vowels.mean(1), 0.03 * prosody.stress, 0.2)
    return np.concatenate([turn, np.stack([right, up, near], 1)], 1)


def _postures(
    rng: np.random.Generator, prosody: Prosody, time: np.ndarray
) -> Float[np.ndarray, "T 3"]:
    """Another posture for every phrase, and back to rest where it is quiet for long."""
    starts, targets = [], []
    later = [*prosody.phrases[1:, 0], np.inf]
    for (start, end), following in zip(prosody.phrases, later, strict=True):
        starts.append(start - 0.25 + rng.normal(0, 0.08))
        targets.append(rng.normal(0, (0.05, 0.02, 0.03)))
        if following - end > 1.2:
            starts.append(end + rng.uniform(0.1, 0.4))
            targets.append(0.3 * targets[-1])
    return _steps(time, np.array(starts), np.array(targets).reshape(-1, 3), 0.75)


def _nods(
    rng: np.random.Generator, prosody: Prosody, time: np.ndarray, style: Style
) -> Float[np.ndarray, "T 3"]:
    """Down on a stressed syllable, a little up before it; some turn and tilt."""
    stressed = prosody.stress > 0
    middles, stress = prosody.vowels[stressed].mean(1), prosody.stress[stressed]
    size = style.nod * stress * rng.lognormal(0, 0.25, len(stress))
    lowest = middles + 0.06 + rng.normal(0, 0.02, len(stress))
    pitch = _bump(time, lowest, size, 0.13) - _bump(time, lowest - 0.33, 0.4 * size, 0.14)
    side = style.turn * stress * rng.normal(0, 1, (2, len(stress)))
    yaw, roll = (_bump(time, middles + 0.08, one, 0.18) for one in side)
    return np.stack([yaw, pitch, roll], 1)


def _melody(
    rng: np.random.Generator, prosody: Prosody, time: np.ndarray
) -> Float[np.ndarray, "T 3"]:
    """Phrases begin with the head up and end with it down; questions end with it up, tilted."""
    turn = np.zeros((len(time), 3))
    for (start, end), question in zip(prosody.phrases, prosody.questions, strict=True):
        inside = _rise(time, start - 0.3, 0.45) * (1 - _rise(time, end, 0.7))
        fall = np.clip((time - start) / max(end - start, 0.3), 0, 1.3) - 0.5
        turn[:, 1] += rng.uniform(0.01, 0.035) * inside * fall
        if question:
            last = np.array([end])
            turn[:, 1] -= _bump(time, last, rng.uniform(0.02, 0.05, 1), 0.22)
            turn[:, 2] += _bump(time, last, rng.choice([-0.03, 0.03], 1), 0.3)
    return turn


def _breath(rng: np.random.Generator, prosody: Prosody, time: np.ndarray) -> np.ndarray:
    """About -1 to 1; quick breaths before phrases, slow ones in silence."""
    phase = 2 * np.pi * rng.uniform(0.2, 0.3) * time + rng.uniform(0, 6.28)
    slow = np.sin(phase + wander(rng, time, 3.0, 0.5)) * (1 - 0.6 * _speaking(prosody, time))
    starts = [
        start
        for start, before in zip(prosody.phrases[:, 0], [-9, *prosody.phrases[:-1, 1]], strict=True)
        if start - before > 0.4
    ]
    return slow + _bump(time, np.array(starts) - 0.1, np.full(len(starts), 0.9), 0.22)


def _brows(
    rng: np.random.Generator, prosody: Prosody, time: np.ndarray, style: Style
) -> np.ndarray:
    strong = prosody.stress > 0.5
    middles, stress = prosody.vowels[strong].mean(1), prosody.stress[strong]
    size = style.brow * (stress - 0.3) / 0.7 * rng.lognormal(0, 0.3, len(stress))
    lift = wander(rng, time, 1.2, 0.07) + _bump(time, middles - 0.02, size, 0.18)
    ends = prosody.phrases[prosody.questions > 0, 1]
    lift = lift + _bump(time, ends - 0.1, rng.uniform(0.25, 0.6, len(ends)), 0.3)
    return _soft(lift, 0.08)


def _gaze(
    rng: np.random.Generator, prosody: Prosody, time: np.ndarray, style: Style
) -> tuple[Float[np.ndarray, "T 2"], list[float]]:
    """Gaze in radians right and down, as for a head that looks ahead; times of large leaps."""
    moves: list[tuple[float, np.ndarray, bool]] = []
    now = 0.0
    while now < time[-1]:  # small glances around the viewer's face
        moves.append((now, rng.normal(0, (0.035, 0.02)), False))
        now += 0.4 + rng.gamma(2.5, 0.5)
    for i, (start, end) in enumerate(prosody.phrases):
        quiet = start - prosody.phrases[i - 1, 1] if i else 1.0
        chance = style.away if quiet > 0.4 else 0.5 * style.away  # a short one is a hesitation
        if end - start < 0.7 or rng.random() > chance:
            continue
        leave = start - rng.uniform(0.0, 0.25)
        back = start + (end - start) * rng.uniform(0.55, 1.0)
        back = min(back, leave + rng.uniform(0.7, 2.2))
        moves = [move for move in moves if not leave - 0.15 < move[0] < back + 0.15]
        moves.append((leave, _aversion(rng), True))
        moves.append((back, rng.normal(0, (0.03, 0.02)), True))
    silence = _silences(prosody, float(time[-1]))
    for start, end in silence:  # glances in long silences
        now = start + rng.gamma(2, 1.2)
        while now < end - 0.8:
            back = min(end - 0.2, now + rng.uniform(0.5, 1.6))
            moves = [move for move in moves if not now - 0.15 < move[0] < back + 0.15]
            moves.append((now, 0.8 * _aversion(rng), True))
            moves.append((back, rng.normal(0, (0.03, 0.02)), True))
            now = back + 1.0 + rng.gamma(2, 1.2)
    moves.sort(key=lambda move: move[0])
    starts = np.array([start for start, _, _ in moves])
    targets = np.stack([target for _, target, _ in moves])
    curve = _steps(time, starts, targets, _SACCADE_S)
    drift = np.stack([wander(rng, time, 0.5, 0.006), wander(rng, time, 0.5, 0.004)], 1)
    return curve + drift, [start for start, _, is_large in moves if is_large]


def _aversion(rng: np.random.Generator) -> np.ndarray:
    """Direction of the gaze in thought: to a side, and up rather than down."""
    right = rng.choice([-1, 1]) * rng.uniform(0.1, 0.35)
    return np.array([right, rng.normal(-0.03, 0.08)])


def _silences(prosody: Prosody, end_s: float) -> list[tuple[float, float]]:
    edges = [0.0, *prosody.phrases.ravel(), end_s]
    pairs = zip(edges[::2], edges[1::2], strict=True)
    return [(start, end) for start, end in pairs if end - start > 1.5]


def blink_times(
    rng: np.random.Generator,
    prosody: Prosody,
    duration_s: float,
    style: Style,
    leaps: list[float] | None = None,
) -> list[float]:
    """Times at which the lids are closed, each near the end of a phrase or word if there is one.

    Args:
        rng: source of the times.
        prosody: of the sound.
        duration_s: of the motion.
        style: of the person.
        leaps: times of large eye movements, which blinks often accompany.
    """
    phrase_ends = prosody.phrases[:, 1] + 0.08
    words = np.concatenate([prosody.word_ends, prosody.vowels[prosody.stress > 0.5, 1] + 0.05])
    leaps = np.asarray(leaps or (), float) + 0.05
    found: list[float] = []
    at = rng.uniform(-1, 2.5)
    while at < duration_s + 0.3:
        middle = at
        for events, reach, chance in (
            (phrase_ends, 0.9, 0.8),
            (leaps, 0.5, 0.6),
            (words, 0.4, 0.8),
        ):
            near = events[np.abs(events - at) < reach]
            if len(near) and rng.random() < chance:
                middle = float(near[np.argmin(np.abs(near - at))] + rng.normal(0, 0.05))
                break
        if not found or middle - found[-1] > 0.45:
            found.append(middle)
            if rng.random() < 0.05:
                found.append(middle + 0.4)
        at += max(0.5, rng.gamma(5, style.blink_s / 5))
    return found


def blinks(
    middles: list[float], rng: np.random.Generator, time: Float[np.ndarray, " T"]
) -> Float[np.ndarray, " T"]:
    """Closure of the lids: they fall within some 80 ms, and open half as fast.

    Args:
        middles: times at which the lids are closed.
        rng: varies length and depth.
        time: of the values.
    """
    closed = np.zeros(len(time))
    for middle in middles:
        longer = rng.uniform(0.9, 1.25)
        depth = 1.0 if rng.random() < 0.85 else rng.uniform(0.6, 0.9)
        down = _rise(time, middle - (_CLOSING_S + _CLOSED_S / 2) * longer, _CLOSING_S * longer)
        up = 1 - _rise(time, middle + _CLOSED_S / 2 * longer, _OPENING_S * longer)
        closed = np.maximum(closed, depth * down * up)
    return closed
