"""Benchmarks of one program on one device: what they print, and what they draw."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import against_torch, device, dit_step, vae_decode, yardstick_torch
from jax_avatar.models.attention import attend
from jax_avatar.models.config import WanVAEConfig, wan_s2v_14b
from jax_avatar.planning.hardware import HARDWARE, find_hardware, recognise
from jax_avatar.planning.stream import compute_bound, decode_flops, step_flops

KEYS = {
    "benchmark", "framework", "config", "size", "dtype", "weights", "parameters", "shapes",
    "attention", "compile_s", "step", "hardware", "bound_ms", "share_of_peak", "memory",
    "device", "commit", "versions", "load_1min",
}  # fmt: skip


def check(record, printed):
    """Whether a record is one line, complete, and timed."""
    assert printed.count("\n") == 1 and json.loads(printed) == record
    assert set(record) >= KEYS and "peak_gib" in record["memory"]
    assert 0 < record["step"]["median_ms"] <= record["step"]["p95_ms"]


@pytest.mark.parametrize("weights", ["", pytest.param("fp8", marks=pytest.mark.slow)])
def test_a_step_is_one_line_and_names_its_kernels(capsys, weights):
    record = dit_step.main(["--tiny", "--repeats", "2", "--weights", weights])
    check(record, capsys.readouterr().out)
    assert record["weights"] == (weights or "float32")
    assert record["attention"] == dict(asked="auto", window="xla", prompt="xla", audio="xla")
    assert record["tflop_per_s"] > 0 and record["share_of_peak"] is None


@pytest.mark.slow
def test_the_decoding_of_a_block_is_one_line(capsys):
    record = vae_decode.main(["--tiny", "--repeats", "2"])
    check(record, capsys.readouterr().out)
    assert record["shapes"]["pixels"] == [1, 12, 64, 64, 3]


def test_the_14b_is_refused_on_a_cpu_before_memory_is_taken():
    with pytest.raises(ValueError, match="--tiny"):
        dit_step.main([])


def test_sizes_are_made_to_fit_as_in_a_stream():
    assert device.latent_grid("384*704") == (48, 88)
    assert device.latent_grid("720*400") == (88, 48)
    assert device.latent_grid("400*720") == (48, 88)
    assert device.latent_grid("96*112", 16) == (12, 14)
    for size in ("96*", "ax64", "32*96"):
        with pytest.raises(ValueError, match="--size"):
            device.latent_grid(size)


def test_random_weights_have_the_types_that_are_stored(monkeypatch):
    monkeypatch.setattr(device, "_COMPILED", 8)
    monkeypatch.setattr(device, "_LARGE", 64)
    shapes = {
        "a": {"kernel": ((3, 16, 16), jnp.int8), "kernel_scale": ((3, 16), jnp.float32)},
        "b": {"kernel": ((3, 16, 16), jnp.float8_e4m3fn)},
        "c": {"kernel": ((3, 16, 16), jnp.bfloat16), "bias": ((4,), jnp.bfloat16)},
        "d": {"scale": ((5,), jnp.float32)},
    }
    shapes = {k: {n: jax.ShapeDtypeStruct(*x) for n, x in v.items()} for k, v in shapes.items()}
    drawn = device.random_params(shapes)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), drawn) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    values = {k: np.asarray(v.get("kernel", 0), np.float32) for k, v in drawn.items()}
    assert 30 < values["a"].std() < 50 and 30 < values["b"].std() < 50
    assert 0.017 < values["c"].std() < 0.023
    # Layers differ, and a rounded kernel has the spread of the others.
    assert not np.array_equal(values["c"][0], values["c"][1])
    whole = values["a"] * np.asarray(drawn["a"]["kernel_scale"])[:, None]
    assert 0.015 < whole.std() < 0.025


def test_devices_are_known_by_the_names_they_report():
    assert recognise("NVIDIA H200").name == "h200" and recognise("cpu") is None
    assert recognise("TPU v5 lite").name == "v5e" and recognise("TPU v5").name == "v5p"
    assert {recognise(kind).name for kind in ("NVIDIA H800", "TPU v6 lite")} <= set(HARDWARE)


def test_the_share_of_the_peak_is_that_of_the_bound():
    h200 = find_hardware("h200")
    config = wan_s2v_14b()
    bf16 = compute_bound(config, 48, 88, h200, "bf16")
    assert bf16 == pytest.approx(step_flops(config, 48, 88) / h200.peak("bf16"))
    # Attention stays in bf16.
    assert bf16 / 2 < compute_bound(config, 48, 88, h200, "fp8") < bf16
    result = device.share_of_peak("NVIDIA H200", [0.1, 0.2, 0.4], lambda hardware: 0.1)
    assert result == {"hardware": "h200", "bound_ms": 100.0, "share_of_peak": 0.5}


def test_the_decoders_arithmetic_is_known_for_the_published_size_only():
    config = WanVAEConfig()
    assert decode_flops(config, 50, 90, 2) == pytest.approx(2 * 9.76e12)
    assert decode_flops(config.replace(dtype=jnp.bfloat16), 50, 90, 2) == pytest.approx(2 * 9.76e12)
    assert decode_flops(WanVAEConfig(dim=8), 50, 90, 2) is None


@pytest.mark.parametrize(
    "dtype, atol", [(jnp.float32, 1e-5), pytest.param(jnp.bfloat16, 2e-2, marks=pytest.mark.slow)]
)
def test_plain_attention_is_that_of_jax(dtype, atol):
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = (10, 40, 40)
    query, key, value = (
        jax.random.normal(k, (2, n, 3, 8), dtype) for k, n in zip(keys, sizes, strict=True)
    )
    mask = jnp.arange(40)[None] <= 3 * jnp.arange(10)[:, None]
    for seen, length in ((None, 17), (mask, 30)):
        got = attend(query, key, value, mask=seen, key_length=length, kernel="xla")
        lengths = None if length is None else jnp.full(2, length, jnp.int32)
        expected = jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=None if seen is None else seen[None, None],
            key_value_seq_lengths=lengths,
        )
        np.testing.assert_allclose(
            np.asarray(got, np.float32), np.asarray(expected, np.float32), atol=atol
        )


def test_without_pytorch_the_yardstick_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match="torch"):
        yardstick_torch.main(["--tiny"])


def test_ratios_are_taken_within_rounds(monkeypatch):
    # Ours takes 1, 2, 4 s in rounds in which PyTorch takes twice as long.
    seconds = {"ours": iter([1.0, 2.0, 4.0]), "torch": iter([2.0, 4.0, 8.0])}

    def measure(name, repeats):
        return [next(seconds[name])] * repeats if repeats == 3 else []

    monkeypatch.setattr(against_torch, "measure", measure)
    monkeypatch.setattr(against_torch, "_PAUSE", 0)
    result = against_torch.compare("ours", "torch", rounds=3, repeats=3)
    assert result["ratio"] == 2.0 and result["ratio_by_round"] == [2.0, 2.0, 2.0]


def test_different_numbers_are_not_timed():
    with pytest.raises(ValueError, match="differ by"):
        against_torch.agreement_of("x", np.zeros(3), np.full(3, 0.1), 1.0)
    with pytest.raises(ValueError, match="PyTorch \\(4,\\)"):
        against_torch.agreement_of("x", np.zeros(3), np.zeros(4), 1.0)


@pytest.mark.parametrize("pair", ["step", "decode"])
def test_the_yardstick_computes_the_same(pair):
    torch = pytest.importorskip("torch")
    config, grid, vae, vae_grid = against_torch.SIZES[True]
    if pair == "step":
        _, _, agreement = against_torch.step_pair(torch, config, grid)
    else:
        _, _, agreement = against_torch.decode_pair(torch, vae, vae_grid)
    assert agreement["max_error"] < 1e-4 < 1e-2 < agreement["largest"]


@pytest.mark.parametrize("network", ["dit", "vae"])
def test_the_yardstick_speaks_the_same_words(capsys, network):
    pytest.importorskip("torch")
    record = yardstick_torch.main(["--tiny", "--repeats", "2", "--network", network])
    check(record, capsys.readouterr().out)
    ours = dit_step if network == "dit" else vae_decode
    assert set(record["shapes"]) == set(ours.main(["--tiny", "--repeats", "1"])["shapes"])
