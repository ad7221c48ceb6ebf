"""Plans without weights: what they weigh is what a stream holds."""

import dataclasses

import jax
import numpy as np
import pytest

from jax_avatar.layout import Layout, make_mesh, parse_layout
from jax_avatar.planning import stream as planning
from jax_avatar.planning.hardware import HARDWARE, find_hardware, has_tpu_compiler, stand_ins
from jax_avatar.planning.programs import (
    Program,
    abstract_model,
    compile_program,
    count_step_flops,
    step_program,
)
from jax_avatar.planning.report import plan_as_text
from jax_avatar.planning.stream import plan_stream, step_flops
from jax_avatar.streaming.pipeline import PipelinedStream
from jax_avatar.streaming.plan import StreamPlan
from jax_avatar.streaming.sampler import SequentialStream
from jax_avatar.testing import ANCHORED, GRID, NANO, make_conditions, make_network

SIZE = (64, 64)
NANO_FOLDER = {
    "name": "nano",
    "kinds": {"dit": "wan_s2v", "vae": "wan"},
    "dit": dataclasses.asdict(NANO),
    "vae": {
        "dim": 4,
        "z_dim": 4,
        "num_res_blocks": 1,
        "latent_mean": (0.0,) * 4,
        "latent_std": (1.0,) * 4,
    },
    "stream": {
        "fps": 16,
        "size": SIZE,
        "sigmas": (1.0, 0.9, 0.75, 0.5, 0.0),
        "motion": "still",
    },
}


@pytest.fixture(scope="module")
def nano():
    return abstract_model(NANO_FOLDER)


@pytest.fixture(scope="module")
def large():
    from configs.wan_s2v_14b import get_config

    return abstract_model(get_config().to_dict())


@pytest.mark.parametrize("mesh", ["1", "4x2", "2+1"])
def test_a_plan_weighs_what_a_stream_holds(nano, mesh):
    layout, plan = parse_layout(mesh, 4), StreamPlan.from_settings(nano.settings, 0)
    devices, _ = make_mesh(layout)
    arguments = (make_network(), plan, make_conditions())
    stream = (
        SequentialStream(*arguments)
        if layout.is_sequential
        else PipelinedStream(*arguments, devices)
    )
    held = {"weights": stream.params, "windows": stream.state.windows, "sink": stream.state.sink}
    planned = step_program(nano, GRID, layout, jax.devices(), attention=NANO.attention).held

    def places(tree):
        return jax.tree.map(lambda x: (x.dtype, x.sharding.shard_shape(x.shape)), tree)

    assert places(planned) == places(held)


@pytest.mark.parametrize(
    "mesh", ["1", *(pytest.param(m, marks=pytest.mark.slow) for m in ("5", "4x2"))]
)
def test_figures_add_up_and_name_their_source(nano, mesh):
    needs = plan_stream(nano, SIZE, parse_layout(mesh, 4), find_hardware("h200"))
    assert needs.fits and needs.compiled_for == "cpu"
    layout = parse_layout(mesh, 4)
    assert sum(device.count for device in needs.devices) == layout.num_devices
    for device in needs.devices:
        assert device.total == sum(figure.value for figure in device.bytes.values())
        assert device.bytes["temporaries"].source == "compiled"
        assert {figure.source for figure in device.bytes.values()} == {"compiled", "computed"}
    assert needs.figures["fps"].value > 0 and needs.figures["fps"].source == "computed"
    text = plan_as_text(needs, HARDWARE["h200"])
    assert "compiled, cpu" in text and text.endswith("fits")


@pytest.mark.parametrize(
    ("mesh", "longer"), [("1", ("first_frame_s", "block_period_s")), ("1+1", ("first_frame_s",))]
)
def test_the_refresh_of_history_is_one_more_evaluation_and_one_window(
    nano, mesh, longer, monkeypatch
):
    monkeypatch.setattr(planning, "count_step_flops", lambda *sizes: 1.0)
    layout = parse_layout(mesh, 4)

    def plan(**changes):
        model = dataclasses.replace(nano, settings=dataclasses.replace(nano.settings, **changes))
        needs = plan_stream(model, SIZE, layout, HARDWARE["h200"], parts=())
        figures = {name: figure.value for name, figure in needs.figures.items()}
        return figures, needs.devices[0].bytes["windows"].value

    (plain, windows), (clean, window) = plan(), plan(refresh="clean")
    assert windows == 4 * window
    for name in longer:
        assert clean[name] == pytest.approx(plain[name] + plain["step_s"])


def test_wider_slices_hold_less_each(nano):
    def held(mesh):
        needs = plan_stream(nano, SIZE, parse_layout(mesh, 4), HARDWARE["v5p"], parts=())
        return {name: figure.value for name, figure in needs.devices[0].bytes.items()}

    one, two = held("2+1"), held("2x2+1")  # within the eight devices of the tests
    assert two["windows"] == one["windows"] / 2
    assert one["weights"] / 2 < two["weights"] < one["weights"]


def test_decoding_latent_by_latent_holds_less_for_the_same_arithmetic(nano):
    settings = dataclasses.replace(nano.settings, decode_latents=1)
    layout = parse_layout("5", 4)

    def plan(model):
        needs = plan_stream(model, SIZE, layout, HARDWARE["h200"], parts=("decode",))
        return needs.devices[-1].bytes["temporaries"].value, needs.figures

    (whole, by_block), (piece, by_latent) = map(
        plan, (nano, dataclasses.replace(nano, settings=settings))
    )
    assert piece < whole / 2
    flop = [f["decode_flop_counted"].value for f in (by_block, by_latent)]
    np.testing.assert_allclose(*flop, rtol=0.05)


def test_latents_of_one_size_make_plans_for_pictures_of_all(monkeypatch):
    monkeypatch.setattr(planning, "count_step_flops", lambda *sizes: 1.0)
    model = abstract_model(
        NANO_FOLDER
        | {"kinds": {"dit": "wan_s2v", "vae": "anchored"}, "vae": ANCHORED.to_dict()}
        | {"dit": dataclasses.asdict(NANO.replace(framepack=False))}
    )

    def held(side):
        needs = plan_stream(model, (side, side), parse_layout("1", 4), HARDWARE["cpu"], parts=())
        return {name: figure.value for name, figure in needs.devices[0].bytes.items()}

    small, large = held(128), held(256)
    assert small.pop("VAE state") < large.pop("VAE state") and small == large
    with pytest.raises(ValueError, match=r"192\*128 pixels: this VAE makes squares"):
        plan_stream(model, (192, 128), parse_layout("1", 4), HARDWARE["cpu"], parts=())


def test_xla_counts_what_the_layers_have(nano):
    """Where every layer injects audio nothing is estimated: the count is that of all layers."""
    config = nano.dit.config.replace(num_layers=4, audio_inject_layers=(0, 1, 2, 3), unroll=4)
    model = abstract_model(NANO_FOLDER | {"dit": dataclasses.asdict(config)})
    program = step_program(model, GRID, Layout(1, 1, False, 1), jax.devices(), attention="xla")
    whole = program.function.lower(*program.arguments).cost_analysis()["flops"]
    np.testing.assert_allclose(count_step_flops(model, GRID), whole, rtol=1e-3)


def test_the_formula_agrees_with_xla_on_the_published_size(large):
    counted = count_step_flops(large, (48, 88))
    np.testing.assert_allclose(step_flops(large.dit.config, 48, 88), counted, rtol=0.01)


def test_one_device_of_80_gb_is_too_small_and_what_to_change_is_said(large):
    needs = plan_stream(large, (384, 704), parse_layout("1", 4), HARDWARE["h100"], parts=())
    assert not needs.fits
    assert any(text.startswith("--mesh 4x1+1 --dtype bf16") for text in needs.advice)
    assert any("--mesh 5" in text and "frames per second" in text for text in needs.advice)
    needs = plan_stream(large, (384, 704), parse_layout("5", 4), HARDWARE["h100"], parts=())
    assert needs.fits and not needs.advice
    assert needs.figures["fps"].value > 25


def test_a_byte_per_weight_halves_the_large_linears(large):
    def weights(dtype):
        needs = plan_stream(
            large, (384, 704), parse_layout("5", 4), HARDWARE["h200"], dtype=dtype, parts=()
        )
        return needs.devices[0].bytes["weights"].value

    assert 0.5 < weights("int8") / weights("bf16") < 0.55


def test_what_the_compiler_refuses_does_not_fit(nano, monkeypatch):
    refusal = planning.Compiled(0, 0, 0, 0.0, 0.0, "Used 40G of 16G hbm.")
    monkeypatch.setattr(planning, "compile_program", lambda *_, **__: refusal)
    needs = plan_stream(nano, SIZE, parse_layout("5", 4), HARDWARE["h200"])
    assert not needs.fits
    assert "the compiler refuses: Used 40G of 16G hbm." in plan_as_text(needs, HARDWARE["h200"])


class Refusing:
    """A function whose compiler says no."""

    def __init__(self, reason):
        self.reason = reason

    def __call__(self):
        raise NotImplementedError

    def trace(self):
        return self

    def lower(self, lowering_platforms):
        return self

    def compile(self, compiler_options):
        raise jax.errors.JaxRuntimeError(self.reason)


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("RESOURCE_EXHAUSTED: x. Used 40G of 16G hbm. Exceeded by 24G. Use less.", "Used 40G of"),
        ("INTERNAL: device assignment should include all slice devices", "such as 4x2 or 4x4"),
    ],
)
def test_a_refusal_is_an_answer(reason, said):
    made = compile_program(Program("no", Refusing(reason), (), "cpu", {}))
    assert said in made.refused and made.temporaries == 0


def test_other_failures_of_the_compiler_are_not_hidden():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: a bug"):
        compile_program(Program("no", Refusing("INTERNAL: a bug"), (), "cpu", {}))


def test_without_the_tpu_compiler_cpus_stand_in(nano, monkeypatch):
    monkeypatch.setattr("jax_avatar.planning.hardware.has_tpu_compiler", lambda: False)
    needs = plan_stream(nano, SIZE, parse_layout("5", 4), HARDWARE["v5p"], parts=("step",))
    assert needs.compiled_for == "cpu"
    text = plan_as_text(needs, HARDWARE["v5p"])
    assert 'pip install -e ".[plan]"' in text and "temporaries are missing: decode" in text


def test_unknown_hardware_and_incomplete_configs_are_named():
    with pytest.raises(ValueError, match=r"--hardware v4 is unknown; known are h100.*v7x, cpu"):
        find_hardware("v4")
    with pytest.raises(ValueError, match=r"lacks \['vae'\]"):
        abstract_model({key: value for key, value in NANO_FOLDER.items() if key != "vae"})
    with pytest.raises(ValueError, match="dit is of kind 'wan', known are"):
        abstract_model(NANO_FOLDER | {"kinds": {"dit": "wan", "vae": "wan"}})


@pytest.mark.slow
@pytest.mark.skipif(not has_tpu_compiler(), reason='needs libtpu: pip install -e ".[plan]"')
@pytest.mark.parametrize(("hardware", "mesh"), [("v5p", "4"), ("v6e", "4x2")])
def test_the_14b_tick_compiles_for_tpus(large, hardware, mesh):
    """A minute or two each: `pytest -n 0 -m slow tests/planning`."""
    layout = parse_layout(mesh, 4)
    devices, name = stand_ins(HARDWARE[hardware], lambda devices: make_mesh(layout, devices))
    assert name.startswith(f"tpu {hardware}:")
    made = compile_program(step_program(large, (48, 88), layout, devices, attention="splash"))
    assert not made.refused
    # A window is 11.7 GiB: none is copied, and no attention scores are held (7.2 GiB).
    assert made.temporaries < 4 * 2**30
