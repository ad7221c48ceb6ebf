"""Closed-form part of the anchored VAE: the linear code of motion, the mean person.

windows of curves --by group--> code of 48 numbers
depth, head weight -----------> mean maps
flow minus the rigid head's, in the portrait's frame --least squares--> flow of expressions
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.ndimage import gaussian_filter

from jax_avatar.data.talking_people.head_motion import GAZE, LIDS, POSE, mirrored
from jax_avatar.data.talking_people.moved_portraits import MovedPortrait
from jax_avatar.models.vae import rigid_head
from jax_avatar.models.vae.anchored import FLOW, GROUP, AnchoredVAEConfig
from jax_avatar.models.vae.rigid_head import HeadShape
from jax_avatar.models.vae.warp import grid, packed, read

__all__ = ["fit_basis", "fit_code"]

_LEAST_STD = 0.02  # of a component, lest what hardly moves in few people becomes huge in others
_HEAD_GAIN = 3.0  # on the latents of the head's pose
_FEW = 0.05  # share of the people below which a cell of the mean maps is filled in


def fit_basis(config: AnchoredVAEConfig, people: Sequence[MovedPortrait]) -> dict[str, np.ndarray]:
    """Parameters of `MotionBasis`, fitted to people and their mirror images.

    Args:
        config: of the VAE.
        people: some hundred.
    """
    windows = np.concatenate([person.motion for person in people])
    basis = fit_code(config, np.concatenate([windows, mirrored(windows)]))
    depth, head_weight = _mean_maps(people)
    camera = np.mean([person.camera for person in people], 0) * np.float32([0, 1, 1, 1])
    basis |= dict(depth=depth, head_weight=head_weight, camera=camera)
    basis = {name: np.asarray(value, np.float32) for name, value in basis.items()}
    rows = jax.jit(partial(_rows, config))
    left, right = 0.0, 0.0
    for person in people:
        for is_flipped in (False, True):
            x, y = rows(basis, *_frames(person, is_flipped))
            x, y = np.asarray(x), np.asarray(y).reshape(len(x), -1)
            left, right = left + x.T @ x, right + x.T @ y
    ridge = 0.02 * len(people) * np.eye(len(left))
    flow = np.linalg.solve(left + ridge, right).reshape(-1, FLOW, FLOW, 3)
    return basis | {"flow": flow.astype(np.float32)}


def fit_code(
    config: AnchoredVAEConfig, windows: Float[np.ndarray, "n 4 c"], whitening: float = 0.7
) -> dict[str, np.ndarray]:
    """The linear code of windows: of each group of curves its own components.

    Components by variance over all curves would drop the slopes of the head within a window,
    which are small, and heads would jump from latent to latent. So pose and gaze keep level and
    slope of each curve, lids their mean in every frame, and the mouth takes the rest. The head's
    are larger: it moves slowly, and noise as large as all that it does would hide what is new in a
    latent, so that a generated head would tremble.

    Args:
        config: for the order of the curves and the size of a latent.
        windows: scaled curves.
        whitening: 0 keeps the spread of the components relative to each other, 1 makes all alike.

    Returns:
        `mean`, `analysis` and `synthesis`; latents have a mean square of one over all, those of
        the head's pose one of `_HEAD_GAIN` squared times what they had.
    """
    curves, z = len(config.curves), config.latent_size
    mean = windows.mean((0, 1), keepdims=True)
    centred = (windows - mean).astype(np.float64)
    directions = []

    def add(shape: Float[np.ndarray, " 4"], names: Sequence[str]) -> None:
        window = np.zeros((GROUP, curves))
        window[:, [config.curves.index(name) for name in names]] = shape[:, None]
        directions.append(window.ravel() / np.linalg.norm(window))

    for shape in (np.ones(GROUP), np.arange(GROUP) - 1.5):
        for name in (*POSE, *GAZE):
            add(shape, [name])
    for frame in np.eye(GROUP):
        add(frame, LIDS)
    rest = [i for i, name in enumerate(config.curves) if name not in (*POSE, *GAZE, *LIDS)]
    flat = centred[:, :, rest].reshape(len(windows), -1)
    _, vectors = np.linalg.eigh(flat.T @ flat)
    for vector in vectors[:, ::-1][:, : z - len(directions)].T:
        window = np.zeros((GROUP, curves))
        window[:, rest] = vector.reshape(GROUP, -1)
        directions.append(window.ravel())
    vectors = np.stack(directions[:z])
    std = np.sqrt(np.mean((centred.reshape(len(windows), -1) @ vectors.T) ** 2, 0))
    std = np.maximum(std, _LEAST_STD)
    scale = std**whitening
    scale *= np.sqrt(((std / scale) ** 2).mean())
    is_head = [curve for curve, name in enumerate(config.curves) if name in POSE]
    moves_head = vectors.reshape(z, GROUP, curves)[:, :, is_head].any((1, 2))
    scale = np.where(moves_head, scale / _HEAD_GAIN, scale)
    return dict(
        mean=np.tile(mean.ravel(), GROUP).astype(np.float32),
        analysis=(vectors.T / scale).astype(np.float32),
        synthesis=(vectors.T * scale).T.astype(np.float32),
    )


def _mean_maps(people: Sequence[MovedPortrait]) -> tuple[np.ndarray, np.ndarray]:
    """Depth and head weight where people are, carried on smoothly to where hardly anybody is."""
    sums = np.zeros((3, FLOW, FLOW))
    for person in people:
        step = person.portrait_surface.shape[0] // FLOW
        is_person = person.portrait_surface[step // 2 :: step, step // 2 :: step] > 127
        maps = np.stack([person.depth, person.head_weight, np.ones((FLOW, FLOW))]) * is_person
        sums += maps + maps[:, :, ::-1]
    enough = sums[2] >= _FEW * 2 * len(people)
    means = sums[:2] / np.maximum(sums[2], 1)
    filled = means * enough
    known = enough.astype(float)
    for sigma in (1, 2, 4, 8, 16, 32):
        soft = gaussian_filter(known, sigma)
        near = (known < 0.5) & (soft > 0.02)
        for one in filled:
            one[near] = (gaussian_filter(one * known, sigma) / np.maximum(soft, 1e-6))[near]
        known = np.maximum(known, near)
    depth, weight = (gaussian_filter(one, 0.7) for one in filled)
    return depth, weight.clip(0, 1)


def _frames(person: MovedPortrait, is_flipped: bool) -> tuple[np.ndarray, ...]:
    """Windows, positions in them, flow, whether it shows there and whether a person is there."""
    flow = person.flow.astype(np.float32)
    step = person.surface.shape[1] // FLOW
    surface = person.surface[:, step // 2 :: step, step // 2 :: step] > 127
    maps = np.concatenate([flow, person.seen[..., None], surface[..., None]], -1)
    motion = person.motion
    if is_flipped:
        maps = maps[:, :, ::-1] * np.float32([-1, 1, 1, 1])
        motion = mirrored(motion)
    return motion, person.offset.astype(np.int32), maps.astype(np.float32)


def _rows(
    config: AnchoredVAEConfig, basis: dict[str, Array], motion: Array, offset: Array, maps: Array
) -> tuple[Array, Array]:
    """Features of frames, and what they should explain: flow in the portrait's frame, visible."""
    flat = motion.reshape(len(motion), -1)
    latent = (flat - basis["mean"][None]) @ basis["analysis"]
    # What the code loses, the flow need not explain.
    windows = (latent @ basis["synthesis"] + basis["mean"][None]).reshape(motion.shape)
    curves = windows[jnp.arange(len(windows)), offset]
    shape = (len(curves), FLOW, FLOW)
    here = jnp.broadcast_to(grid(FLOW, FLOW)[None], (*shape, 2))
    depth, weight = (
        jnp.broadcast_to(basis[name][None, ..., None], (*shape, 1))
        for name in ("depth", "head_weight")
    )
    head = HeadShape(depth, weight, basis["camera"][:3], basis["camera"][3])
    at = rigid_head.moved(config.pose(curves), here, depth, weight, head)
    found = jax.vmap(lambda m, at: read(packed(m[None]), at[None])[0])(maps, at)
    flow, seen, surface = found[..., :2], found[..., 2:3], found[..., 3:]
    flow = jnp.where(surface > 0.9, at + flow - here, 0.0)
    return config.features(curves), jnp.concatenate([flow, seen], -1)
