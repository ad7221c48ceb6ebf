import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jax_avatar.models.attention import attend, block_causal_mask, choose_kernel


def heads(*shape, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    b, n, s, m, e = shape
    shapes = ((b, n, m, e), (b, s, m, e), (b, s, m, e))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("length", [None, 200, 301])
def test_splash_attention_equals_the_plain_one(length):
    query, key, value = heads(2, 130, 301, 2, 128)
    plain = attend(query, key, value, key_length=length, kernel="xla")
    splash = jax.jit(lambda *qkv: attend(*qkv, key_length=length, kernel="splash"))
    assert "pallas" in str(jax.make_jaxpr(splash)(query, key, value))
    np.testing.assert_allclose(splash(query, key, value), plain, atol=2e-5)


def test_what_lies_behind_the_filled_slots_changes_nothing():
    query, key, value = heads(1, 128, 256, 1, 128)
    run = jax.jit(lambda k, v: attend(query, k, v, key_length=jnp.int32(77), kernel="splash"))
    changed = run(key.at[:, 77:].set(1e4), value.at[:, 77:].set(1e4))
    np.testing.assert_array_equal(run(key, value), changed)


def test_heads_stay_on_their_devices():
    query, key, value = heads(1, 128, 256, 4, 128)
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    mesh = Mesh(
        np.array(jax.devices()[:4]).reshape(2, 2), ("stage", "model"), axis_types=axis_types
    )
    split = jax.sharding.NamedSharding(mesh, PartitionSpec(None, None, "model"))

    def on_slice(query, key, value):
        return attend(query, key, value, key_length=jnp.int32(100), kernel="splash")

    whole = PartitionSpec()
    mapped = jax.jit(
        jax.shard_map(
            on_slice,
            mesh=mesh,
            in_specs=(whole, whole, whole),
            out_specs=whole,
            axis_names={"stage"},
            check_vma=False,
        )
    )
    placed = [jax.device_put(x, split) for x in (query, key, value)]
    assert "all-gather" not in mapped.lower(*placed).compile().as_text()
    np.testing.assert_allclose(mapped(*placed), on_slice(query, key, value), atol=2e-5)


def shapes(keys=512, size=128, dtype=jnp.bfloat16):
    make = lambda rows: jnp.zeros((1, rows, 2, size), dtype)  # noqa: E731
    return make(256), make(keys)


@pytest.mark.parametrize(
    ("asked", "arguments", "has_mask", "chosen"),
    [
        ("auto", {}, False, "xla"),  # the tests' backend is a CPU
        ("xla", {}, False, "xla"),
        ("cudnn", {}, False, "cudnn"),
        ("cudnn", {}, True, "cudnn"),
        ("cudnn", {"dtype": jnp.float32}, False, "xla"),
        ("cudnn", {"size": 256}, False, "xla"),
        ("cudnn", {"keys": 5}, False, "xla"),
        ("splash", {}, False, "splash"),
        ("splash", {"dtype": jnp.float32}, False, "splash"),
        ("splash", {"size": 64}, False, "xla"),
        ("splash", {"keys": 5}, False, "xla"),
        ("splash", {}, True, "chunked"),
    ],
)
def test_what_a_kernel_cannot_do_is_done_without_it(asked, arguments, has_mask, chosen):
    assert choose_kernel(asked, *shapes(**arguments), has_mask=has_mask) == chosen


@pytest.mark.parametrize(("backend", "chosen"), [("gpu", "cudnn"), ("tpu", "splash")])
def test_the_backend_decides_if_nobody_does(monkeypatch, backend, chosen):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert choose_kernel("auto", *shapes()) == chosen


def test_masks_work_whatever_kernel_is_asked_for():
    query, key, value = heads(1, 140, 140, 1, 128)
    mask = block_causal_mask(120, 20, 30)
    plain = attend(query, key, value, mask=mask, kernel="xla")
    seen = attend(query, key, value, mask=mask, kernel="splash")
    np.testing.assert_allclose(seen, plain, atol=2e-5)


@pytest.mark.parametrize("seen", ["all", "filled", "past"])
def test_a_few_queries_at_a_time_see_what_all_would(seen):
    """150 queries, no whole number of chunks; the gradient, too."""
    query, key, value = heads(2, 150, 150, 2, 8)
    told = {"filled": {"key_length": 77}, "past": {"mask": block_causal_mask(120, 30, 40)}}

    @jax.jit
    def both(*qkv):
        def run(kernel):
            return lambda *qkv: jnp.sin(attend(*qkv, kernel=kernel, **told.get(seen, {}))).sum()

        return [jax.value_and_grad(run(k), (0, 1, 2))(*qkv) for k in ("xla", "chunked")]

    plain, chunked = (jax.tree.leaves(part) for part in both(query, key, value))
    for left, right in zip(chunked, plain, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=2e-5)


def test_an_unknown_kernel_is_named():
    with pytest.raises(ValueError, match="attention 'flash' is unknown; choose one of auto, xla"):
        choose_kernel("flash", *shapes())
