"""Reading pictures between their pixels, and changes of size, as the anchored VAE needs them.

Places are in fractions of the picture, x right and y down; pixel `i` of `n` has its middle at
`(i + 0.5) / n`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Map = Float[Array, "b h w c"]
Places = Float[Array, "b h w 2"]


def grid(height: int, width: int) -> Float[Array, "h w 2"]:
    """Places of the middles of all pixels."""
    x, y = (jnp.arange(width) + 0.5) / width, (jnp.arange(height) + 0.5) / height
    return jnp.stack(jnp.meshgrid(x, y), -1)


def fold(x: Map, n: int) -> Float[Array, "b h2 w2 c2"]:
    """Blocks of n x n pixels -> channels."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // n, n, w // n, n, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // n, w // n, n * n * c)


def unfold(x: Map, n: int) -> Float[Array, "b h2 w2 c2"]:
    """The inverse of `fold`."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, n, n, c // (n * n))
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * n, w * n, c // (n * n))


def _neighbours(x: Array, axis: int) -> tuple[Array, Array]:
    """Each value's neighbour before and behind it; at the border itself."""
    index, last = jnp.arange(x.shape[axis]), x.shape[axis] - 1
    return (
        jnp.take(x, jnp.maximum(index - 1, 0), axis),
        jnp.take(x, jnp.minimum(index + 1, last), axis),
    )


def doubled(x: Map) -> Float[Array, "b h2 w2 c"]:
    """Twice the size, bilinear."""
    for axis in (1, 2):
        before, behind = _neighbours(x, axis)
        both = jnp.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * behind], axis + 1)
        x = both.reshape(*x.shape[:axis], 2 * x.shape[axis], *x.shape[axis + 1 :])
    return x


def enlarged(x: Map, side: int) -> Float[Array, "b h2 w2 c"]:
    """To `side` pixels, bilinear; by doubling as far as that goes."""
    while 2 * x.shape[1] <= side:
        x = doubled(x)
    if x.shape[1] != side:
        x = jax.image.resize(x, (x.shape[0], side, side, x.shape[3]), "linear")
    return x


def shrunk(x: Map, side: int) -> Float[Array, "b h2 w2 c"]:
    """To `side` pixels, by the mean over what each of them covers."""
    if x.shape[1] == side:
        return x
    if x.shape[1] % side:
        return jax.image.resize(x, (x.shape[0], side, side, x.shape[3]), "linear", antialias=True)
    n = x.shape[1] // side
    return x.reshape(len(x), side, n, side, n, x.shape[3]).mean((2, 4))


def widened(x: Map, pixels: int) -> Map:
    """The largest value within so many pixels."""
    window = (1, 2 * pixels + 1, 2 * pixels + 1, 1)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, (1, 1, 1, 1), "SAME")


def filled(picture: Map, known: Float[Array, "b h w 1"]) -> Map:
    """The picture where it is known, elsewhere a smooth continuation of what is around.

    By means over ever larger squares, then back, each finer one where it is known.

    Source: "pull-push", Gortler et al., "The Lumigraph", SIGGRAPH 1996, section 3.4.
    """
    side = picture.shape[1]
    if side <= 2:
        total = jnp.maximum(known.sum((1, 2), keepdims=True), 1e-6)
        return jnp.broadcast_to((picture * known).sum((1, 2), keepdims=True) / total, picture.shape)
    share = shrunk(known, side // 2)
    mean = shrunk(picture * known, side // 2) / jnp.maximum(share, 1e-6)
    around = doubled(filled(mean, jnp.minimum(4 * share, 1)))
    return known * picture + (1 - known) * around


def sharpened(x: Map, amount: float = 0.6) -> Map:
    """Makes up for what bilinear reads between the pixels blur."""
    blurred = x
    for axis in (1, 2):
        before, behind = _neighbours(blurred, axis)
        blurred = 0.25 * before + 0.5 * blurred + 0.25 * behind
    return x + amount * (x - blurred)


def packed(picture: Map) -> Float[Array, "b h w c4"]:
    """Every pixel with its right, lower and lower right neighbour: one read per warped pixel."""
    _, right = _neighbours(picture, 2)
    both = jnp.concatenate([picture, right], -1)
    _, below = _neighbours(both, 1)
    return jnp.concatenate([both, below], -1)


def read(
    pack: Float[Array, "b h w c4"], at: Float[Array, "f h2 w2 2"]
) -> Float[Array, "f h2 w2 c"]:
    """Bilinear values of `packed` pictures.

    Args:
        pack: result of `packed`, b square pictures.
        at: where to read, for `f = b * T` frames, those of a picture one after the other.
    """
    b, side = pack.shape[:2]
    x, y = jnp.split(jnp.clip(at * side - 0.5, 0, side - 1.001), 2, -1)
    x0, y0 = jnp.floor(x), jnp.floor(y)
    fx, fy = x - x0, y - y0
    index = (y0 * side + x0).astype(jnp.int32).reshape(b, -1)
    rows = jax.vmap(lambda p, i: p.at[i].get(mode="promise_in_bounds"))(
        pack.reshape(b, side * side, -1), index
    ).reshape(*at.shape[:3], -1)
    a, r, d, e = jnp.split(rows, 4, -1)
    return (a * (1 - fx) + r * fx) * (1 - fy) + (d * (1 - fx) + e * fx) * fy
