"""The head as a rigid body in front of a camera: where points of a portrait go when it turns.

Lengths are picture widths at the depth of the bridge of the nose, axes right, down and towards
the camera. A point keeps what `weight` says of the head's turn about the neck: 1 on the face,
0 on the shoulders, which only follow the head's shift.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_avatar.models.vae.warp import Places, grid, packed, read

BRIDGE = (0.5, 0.562)
"""Place of the bridge of the nose in a framed portrait."""

_CENTRE = (0.5, 0.5)
_STEPS = 4  # of the inversion


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HeadShape:
    """Geometry of a portrait, as maps over it."""

    depth: Any  # b h w 1, how much nearer than the bridge of the nose
    weight: Any  # b h w 1, share of the head's turn
    lever: Any  # 3, from the neck's pivot to the bridge: right, down, nearer
    focal: Any  # scalar, distance of the camera from the bridge


def turn(pose: Float[Array, "f 6"]) -> Float[Array, "f 3 3"]:
    """Matrices of yaw, pitch and roll in the picture's axes: nod, then turn, then tilt."""
    (cy, cp, cr), (sy, sp, sr) = jnp.cos(pose[:, :3]).T, jnp.sin(pose[:, :3]).T
    rows = [
        [cr * cy, -(cr * sy * sp - sr * cp), cr * sy * cp + sr * sp],
        [-sr * cy, sr * sy * sp + cr * cp, -(sr * sy * cp - cr * sp)],
        [-sy, -cy * sp, cy * cp],
    ]
    return jnp.stack([jnp.stack(row, -1) for row in rows], -2)


def moved(
    pose: Float[Array, "f 6"],
    at: Float[Array, "f h w 2"],
    depth: Float[Array, "f h w 1"],
    weight: Float[Array, "f h w 1"],
    head: HeadShape,
) -> Float[Array, "f h w 2"]:
    """Positions in frames of points of the portrait.

    Args:
        pose: yaw, pitch, roll in radians, against the portrait; how far the bridge of the nose
            goes right and down, and how much it grows, as shares of the picture and of itself.
        at: places in the portrait.
        depth: there.
        weight: there.
        head: for lever and focal length.
    """
    focal, centre = head.focal, jnp.asarray(_CENTRE).reshape(1, 1, 1, 2)
    nose = jnp.asarray([[BRIDGE[0] - _CENTRE[0], BRIDGE[1] - _CENTRE[1], 0.0]])
    point = jnp.concatenate([(at - centre) * (1 - depth / focal), depth], -1)
    near = focal * pose[:, 5] / (1 + pose[:, 5])
    place = (nose[:, :2] + pose[:, 3:5]) * (1 - near[:, None] / focal)
    shift = jnp.concatenate([place, near[:, None]], -1) - nose
    matrix = turn(pose)
    middle = nose.reshape(1, 1, 1, 3)
    turned = jnp.einsum("fij,fhwj->fhwi", matrix, point - middle) + middle
    # The shoulders do without the part of the shift that the turn about the neck makes.
    swing = jnp.einsum("fij,j->fi", matrix, head.lever) - head.lever[None]
    shift, swing = shift[:, None, None], swing[:, None, None]
    point = weight * turned + (1 - weight) * (point - swing) + shift
    return centre + point[..., :2] * focal / (focal - point[..., 2:])


def source(pose: Float[Array, "f 6"], head: HeadShape) -> Places:
    """Positions in the portrait of the surface that frames show: the inverse of `moved`.

    Args:
        pose: of `f = b * T` frames, those of a portrait one after the other.
        head: of b portraits.

    Returns:
        Places on the grid of the head's maps, by fixed-point steps.
    """
    h, w = head.depth.shape[1:3]
    maps = packed(jnp.concatenate([head.depth, head.weight], -1))
    here = jnp.broadcast_to(grid(h, w)[None], (len(pose), h, w, 2))
    at = here
    for _ in range(_STEPS):
        depth, weight = jnp.split(read(maps, at), 2, -1)
        at = here - (moved(pose, at, depth, weight, head) - at)
    return at
