import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conversion.rules import (
    Ignore,
    Rule,
    check,
    conv,
    convert,
    export,
    keep,
    patch,
    squeeze,
    transpose,
)

TABLE = [
    Ignore("blocks.{i}.rope.freqs", "recomputed"),
    Rule("patch.weight", "patch/kernel", patch(1, 2, 2)),
    Rule("blocks.{i}.q.weight", "blocks/query/kernel", transpose),
    Rule("blocks.{i}.q.bias", "blocks/query/bias"),
    Rule("levels.{i}.conv.weight", "levels/{i}/conv/kernel", conv),
    Rule("levels.{i}.gamma", "levels/{i}/scale", squeeze(trailing=3)),
    Rule("modulation", "modulation", squeeze(leading=1)),
]
SHAPES = {
    "patch.weight": (6, 5, 1, 2, 2),
    **{f"blocks.{i}.q.weight": (6, 4) for i in range(3)},
    **{f"blocks.{i}.q.bias": (6,) for i in range(3)},
    **{f"blocks.{i}.rope.freqs": (7,) for i in range(3)},
    **{f"levels.{i}.conv.weight": (2 + i, 3, 1, 4, 5) for i in range(2)},
    **{f"levels.{i}.gamma": (3, 1, 1, 1) for i in range(2)},
    "modulation": (1, 6, 4),
}
TARGET = {
    "patch/kernel": (20, 6),
    "blocks/query/kernel": (3, 4, 6),
    "blocks/query/bias": (3, 6),
    "levels/0/conv/kernel": (1, 4, 5, 3, 2),
    "levels/1/conv/kernel": (1, 4, 5, 3, 3),
    "levels/0/scale": (3,),
    "levels/1/scale": (3,),
    "modulation": (6, 4),
}


def source():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def target(dtype=jnp.float32):
    return {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in TARGET.items()}


def test_every_tensor_lands_in_its_slot():
    weights = source()
    params, report = convert(weights, TABLE, target())
    np.testing.assert_array_equal(params["blocks/query/kernel"][2], weights["blocks.2.q.weight"].T)
    np.testing.assert_array_equal(
        params["levels/1/conv/kernel"][0, 3, 4], weights["levels.1.conv.weight"][:, :, 0, 3, 4].T
    )
    assert report.used["blocks.2.q.weight"] == "blocks/query/kernel[2]"
    assert report.ignored == {f"blocks.{i}.rope.freqs": "recomputed" for i in range(3)}
    assert set(report.used) | set(report.ignored) == set(weights)


def test_a_patch_kernel_multiplies_patches_with_the_channel_fastest():
    weights = source()
    kernel = convert(weights, TABLE, target())[0]["patch/kernel"]
    pixels = np.random.default_rng(1).normal(size=(1, 2, 2, 5))
    expected = np.einsum("thwc,octhw->o", pixels, weights["patch.weight"])
    np.testing.assert_allclose(pixels.reshape(-1) @ kernel, expected, rtol=1e-5, atol=1e-6)


def test_export_is_the_inverse():
    weights = source()
    params, report = convert(weights, TABLE, target())
    back = export(params, TABLE)
    assert set(back) == set(report.used)
    for name, array in back.items():
        np.testing.assert_array_equal(array, weights[name], err_msg=name)


def test_parameters_take_the_type_of_the_network():
    params, _ = convert(source(), TABLE, target(jnp.bfloat16))
    assert {array.dtype for array in params.values()} == {jnp.dtype(jnp.bfloat16)}


def test_a_planted_extra_tensor_is_named():
    weights = source() | {"blocks.0.surprise": np.zeros(3, np.float32)}
    with pytest.raises(
        ValueError, match=r"unused source tensors[^\n]*\n  blocks\.0\.surprise \(3,\): no rule"
    ):
        convert(weights, TABLE, target())


def test_a_layer_beyond_the_stack_is_named():
    weights = source() | {"blocks.3.q.bias": np.zeros(6, np.float32)}
    with pytest.raises(ValueError, match=r"blocks\.3\.q\.bias \(6,\): .*outside the stack \(3,\)"):
        convert(weights, TABLE, target())


def test_one_missing_slot_of_a_stacked_leaf_is_named():
    weights = source()
    del weights["blocks.1.q.weight"]
    with pytest.raises(ValueError, match=r"query/kernel\[1\] .*: no blocks\.1\.q\.weight"):
        convert(weights, TABLE, target())


@pytest.mark.parametrize("name", ["levels.0.gamma", "patch.weight", "blocks.2.q.weight"])
def test_a_mis_shaped_tensor_is_named(name):
    weights = source()
    weights[name] = np.concatenate([weights[name], weights[name]], axis=-1)
    with pytest.raises(ValueError, match="shapes that do not fit") as error:
        convert(weights, TABLE, target())
    assert name in str(error.value)
    assert "unfilled" not in str(error.value)


def test_a_transposed_square_looking_error_is_still_a_shape_error():
    weights = source()
    weights["blocks.0.q.weight"] = weights["blocks.0.q.weight"].T
    with pytest.raises(ValueError, match=r"\(4, 6\) becomes \(6, 4\)"):
        convert(weights, TABLE, target())


def test_all_problems_come_in_one_error():
    weights = source() | {"surprise": np.zeros(3, np.float32)}
    del weights["modulation"]
    weights["levels.1.gamma"] = np.zeros((4, 1, 1, 1), np.float32)
    with pytest.raises(ValueError) as error:
        convert(weights, TABLE, target() | {"orphan": jax.ShapeDtypeStruct((2,), jnp.float32)})
    for part in ("surprise", "no modulation", "levels.1.gamma", "orphan (2,): no rule leads to it"):
        assert part in str(error.value)


def test_two_sources_for_one_slot_are_refused():
    table = [*TABLE, Rule("other_modulation", "modulation", keep)]
    weights = source() | {"other_modulation": np.zeros((6, 4), np.float32)}
    with pytest.raises(ValueError, match="filled twice"):
        convert(weights, table, target())


def test_names_and_shapes_can_be_checked_without_data():
    report = check(SHAPES, TABLE, target())
    assert report == convert(source(), TABLE, target())[1]
    with pytest.raises(ValueError, match="no modulation"):
        check(
            {name: shape for name, shape in SHAPES.items() if name != "modulation"}, TABLE, target()
        )


def test_nothing_is_read_before_the_names_fit():
    class Lazy(dict):
        shapes = SHAPES | {"surprise": (1,)}

        def __getitem__(self, name):
            raise AssertionError(f"read {name}")

    with pytest.raises(ValueError, match="surprise"):
        convert(Lazy(), TABLE, target())


def test_a_parameter_without_a_rule_cannot_be_exported_silently():
    with pytest.raises(ValueError, match="orphan"):
        export({"orphan": np.zeros(2)}, TABLE)
