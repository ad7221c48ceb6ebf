"""Fast search for NaN and infinity in weights, on the host and on devices."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jax_avatar.weights.whole_file import BrokenFile

__all__ = ["all_finite", "check_finite"]

_PIECE = 1 << 18  # numbers that fit a processor's cache
# Bits that are all ones in NaN and, where the type has it, infinity.
_SPECIAL_BITS = {
    np.dtype(np.float16): (np.uint16, 0x7C00),
    np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7F80),
    np.dtype(ml_dtypes.float8_e4m3fn): (np.uint8, 0x7F),
    np.dtype(ml_dtypes.float8_e5m2): (np.uint8, 0x7C),
}


def all_finite(array: np.ndarray) -> bool:
    """True if an array on the host holds neither NaN nor infinity; integers never do."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return True
    flat = np.ascontiguousarray(array).reshape(-1)
    if array.dtype not in _SPECIAL_BITS:
        with np.errstate(over="ignore", invalid="ignore"):
            # One NaN or infinity makes the sum one; a sum of finite numbers may overflow, too.
            return bool(np.isfinite(flat.sum()) or np.isfinite(flat).all())
    integer, bits = _SPECIAL_BITS[array.dtype]
    bits, flat = integer(bits), flat.view(integer)
    pieces = (flat[start : start + _PIECE] for start in range(0, flat.size, _PIECE))
    return not any(bool(((piece & bits) == bits).any()) for piece in pieces)


def check_finite(place: object, leaves: Mapping[str, np.ndarray | jax.Array]) -> None:
    """Finds NaN and infinity in weights, those on devices without fetching them.

    Args:
        place: where they were read, for the message.
        leaves: name -> array.

    Raises:
        BrokenFile: a weight is not finite; the message names place and tensor.
    """
    placed = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, jax.Array)}
    wrong = [n for n, leaf in leaves.items() if n not in placed and not all_finite(leaf)]
    placed = {n: x for n, x in placed.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    if placed:
        good = _are_finite(tuple(placed.values()))
        wrong += [
            name for name, is_good in zip(placed, np.asarray(good), strict=True) if not is_good
        ]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise BrokenFile(
            f"{place}: tensor {wrong[0]}{more} holds NaN or infinity; the file is damaged, or was "
            "written by a training that diverged: copy or convert it again, or train on from an "
            "earlier checkpoint."
        )


@jax.jit
def _are_finite(arrays: tuple[jax.Array, ...]) -> jax.Array:
    return jnp.stack([jnp.isfinite(array.astype(jnp.float32)).all() for array in arrays])
