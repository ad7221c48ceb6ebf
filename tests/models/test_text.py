import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_avatar.models.config import UMT5Config, umt5_xxl
from jax_avatar.models.network import Network, flatten
from jax_avatar.models.tap import record
from jax_avatar.models.text import UMT5Encoder, padded_length, position_buckets

CONFIG = UMT5Config(
    vocab_size=50, width=12, ffn_width=20, num_heads=2, head_dim=8, num_layers=2, max_distance=40
)
NETWORK = Network.of(UMT5Encoder(CONFIG, rngs=nnx.Rngs(0)))
PARAMS = NETWORK.params
IDS = np.random.default_rng(0).integers(1, 50, (2, 24)).astype(np.int32)


@jax.jit
def encode(params, ids, mask):
    return NETWORK.bind(params)(ids, mask)


def states(ids, lengths):
    mask = (np.arange(ids.shape[1]) < np.array(lengths)[:, None]).astype(np.int32)
    return np.asarray(encode(PARAMS, ids, mask))


def test_what_stands_in_the_padding_changes_no_token():
    other = IDS.copy()
    other[0, 9:], other[1, 20:] = 3, 4
    ours, theirs = states(IDS, (9, 20)), states(other, (9, 20))
    np.testing.assert_array_equal(ours[0, :9], theirs[0, :9])
    np.testing.assert_array_equal(ours[1, :20], theirs[1, :20])
    assert np.abs(states(IDS, (10, 20))[0, :9] - ours[0, :9]).max() > 1e-3


def test_more_padding_changes_no_token():
    padded = np.pad(IDS, ((0, 0), (0, 40)))
    np.testing.assert_allclose(states(padded, (9, 20))[1, :20], states(IDS, (9, 20))[1, :20],
                               atol=1e-5)  # fmt: skip


def test_order_matters_in_both_directions():
    swapped = IDS.copy()
    swapped[:, [3, 15]] = swapped[:, [15, 3]]
    difference = np.abs(states(swapped, (24, 24)) - states(IDS, (24, 24))).max(-1)
    assert (difference > 1e-4).all()


def test_taps_see_what_the_scan_computes():
    encoder, mask = NETWORK.bind(), jnp.ones((2, 24), jnp.int32)
    with record() as taps:
        out = encoder(jnp.asarray(IDS), mask)
    np.testing.assert_allclose(out, states(IDS, (24, 24)), atol=1e-5)
    assert list(taps) == ["block0_out", "block1_out"]
    np.testing.assert_allclose(encoder.norm(taps["block1_out"]), out, atol=1e-6)


def test_bfloat16_computes_in_bfloat16_and_stays_close():
    config = CONFIG.replace(dtype="bfloat16", param_dtype="bfloat16")
    network = Network.abstract(UMT5Encoder, config)
    target = network.params
    assert {leaf.dtype for leaf in flatten(target).values()} == {jnp.dtype("bfloat16")}
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    half = network.bind(params)(jnp.asarray(IDS), jnp.ones((2, 24), jnp.int32))
    assert half.dtype == jnp.bfloat16
    error = np.abs(np.asarray(half, np.float32) - states(IDS, (24, 24)))
    assert error.mean() < 0.02 and error.max() < 0.15


def test_published_thresholds_of_the_buckets():
    distance = np.arange(600)
    before, after = (position_buckets(d, 32, 128) for d in (-distance, distance))
    first = [int(np.argmax(before == bucket)) for bucket in range(16)]
    assert first == [*range(8), 8, 12, 16, 23, 32, 46, 64, 91]
    assert before.max() == 15 and (np.diff(before) >= 0).all()
    np.testing.assert_array_equal(after[1:], before[1:] + 16)
    assert after[0] == 0


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(4, 3), (8, 20), (64, 100)])
def test_every_bucket_of_other_sizes_is_reached_by_the_largest_distance(num_buckets, max_distance):
    buckets = position_buckets(np.arange(-max_distance, max_distance), num_buckets, max_distance)
    # Keys after the query are at distance 1 at least: bucket 0 of their half stays empty.
    assert set(buckets) == set(range(num_buckets)) - {num_buckets // 2}


def test_padded_lengths_are_few():
    lengths = [padded_length(n) for n in range(1, 513)]
    assert set(lengths) == {64, 128, 256, 512}
    assert all(length >= n for n, length in enumerate(lengths, 1))
    assert padded_length(600) == 600


def test_the_published_size():
    target = Network.abstract(UMT5Encoder, umt5_xxl()).params
    leaves = flatten(target).values()
    assert sum(leaf.size for leaf in leaves) == 5_680_910_336
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) == 11_361_820_672


@pytest.mark.parametrize(
    ("change", "message"), [({"num_buckets": 6}, "multiple of 4"), ({"max_distance": 8}, "above 8")]
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        CONFIG.replace(**change)
