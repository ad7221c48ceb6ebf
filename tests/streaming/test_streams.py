"""The pipelined stream equals the plain loop, on every layout."""

import functools

import jax
import numpy as np
import pytest

from jax_avatar.layout import make_mesh, parse_layout
from jax_avatar.models.conditions import Conditions
from jax_avatar.streaming.pipeline import PipelinedStream, Register, slice_inputs
from jax_avatar.streaming.plan import StreamPlan, stream_layout
from jax_avatar.streaming.sampler import SequentialStream
from jax_avatar.testing import NANO, make_audio, make_conditions, make_network
from jax_avatar.weights.settings import StreamSettings

BLOCKS = 9  # the window of four blocks wraps twice, the sink is renewed, the pipe fills and drains
CONFIG = NANO.replace(framepack=False)
NETWORK = make_network(CONFIG)
CONDITIONS = make_conditions(CONFIG)
AUDIO = make_audio(BLOCKS, CONFIG)


def run(stream, blocks=BLOCKS):
    latents = [latent for audio in AUDIO[:blocks] for latent in stream.push(audio)]
    return np.concatenate([np.asarray(x) for x in latents + stream.finish()])


@functools.cache
def sequential(aas):
    plan = StreamPlan(aas_after_blocks=aas)
    return run(SequentialStream(NETWORK, plan, CONDITIONS))


def pipelined(mesh, aas):
    mesh, _ = make_mesh(parse_layout(mesh, 4))
    plan = StreamPlan(aas_after_blocks=aas)
    return PipelinedStream(NETWORK, plan, CONDITIONS, mesh)


@pytest.mark.parametrize(
    ("mesh", "aas"),
    [
        ("5", 4),
        ("5", 1),
        ("5", 0),
        ("4", 4),
        ("3", 4),
        ("3", 1),
        ("2", 4),
        ("4x2", 4),
        ("2x2+1", 1),
        ("1+1", 4),
    ],
)
def test_every_layout_makes_the_same_latents(mesh, aas):
    np.testing.assert_allclose(run(pipelined(mesh, aas)), sequential(aas), atol=1e-5)


def run_student(mesh, settings):
    """A stream of two steps if nothing else is said, which are compiled in half the time."""
    plan = StreamPlan(**{"sigmas": (1.0, 0.6, 0.0), **settings})
    arguments = (NETWORK, plan, CONDITIONS)
    if mesh == "1":
        return run(SequentialStream(*arguments))
    return run(PipelinedStream(*arguments, make_mesh(parse_layout(mesh, plan.num_steps))[0]))


@pytest.mark.parametrize(
    ("mesh", "settings"),
    [
        # The noise of the last step does not matter.
        ("3", {"sampler": "renoise", "sigmas": (1.0, 0.8, 0.5, 0.0)}),
        ("1+1", {"refresh": "fixed", "sampler": "renoise"}),
        *(
            pytest.param(mesh, settings, marks=pytest.mark.slow)
            for mesh, settings in [
                ("1+1", {"cache": "exit_only"}),
                ("1+1", {"refresh": "clean"}),
                ("1x2+1", {"refresh": "clean", "sampler": "renoise"}),
                ("2x2+1", {"sampler": "renoise"}),
            ]
        ),
    ],
)
def test_every_layout_of_a_student_does_so(mesh, settings):
    np.testing.assert_allclose(run_student(mesh, settings), run_student("1", settings), atol=1e-5)


@pytest.mark.parametrize("layout", ["2", "2+1", "2x2+1"])
@pytest.mark.parametrize(
    "history", [{"cache": "exit_only"}, {"refresh": "clean"}, {"refresh": "fixed"}], ids=str
)
def test_blocks_that_follow_one_another_are_not_spread_over_slices(history, layout):
    """Refused by the settings, before anything is read, and by the stream that is built anyway."""
    settings = StreamSettings(fps=16, size=(64, 64), sigmas=(1.0, 0.6, 0.0), **history)
    message = r"TPP.*Pass --mesh 1, or 1\+1"
    with pytest.raises(ValueError, match=message):
        stream_layout(settings, layout)
    mesh, _ = make_mesh(parse_layout(layout, 2))
    with pytest.raises(ValueError, match=message):
        plan = StreamPlan.from_settings(settings, 0)
        PipelinedStream(NETWORK, plan, CONDITIONS, mesh)
    assert stream_layout(settings, "1+1").stages == stream_layout(settings, "1").stages == 1


def test_new_noise_is_another_for_every_block_and_evaluation():
    plan, shape = StreamPlan(sampler="renoise", seed=3), (1, 2, 4, 4, 4)
    start, anew = plan.make_noise(shape, "float32"), plan.make_new_noise(shape, "float32")
    drawn = [start(0), start(1), *(anew(block, step) for block in (0, 1, 2) for step in range(4))]
    alike = np.corrcoef([np.ravel(noise) for noise in drawn])
    assert np.abs(alike - np.eye(len(drawn))).max() < 0.4  # 128 values
    other = StreamPlan(seed=4).make_new_noise(shape, "float32")
    assert np.abs(anew(1, 2) - other(1, 2)).max() > 0.1
    np.testing.assert_array_equal(anew(1, 2), plan.make_new_noise(shape, "float32")(1, 2))


@pytest.mark.parametrize("mesh", ["", "1"])
def test_a_block_hears_the_end_of_the_one_before_if_it_was_trained_so(mesh, monkeypatch):
    """Nothing is denoised: what comes to the devices is what counts."""
    plan, given = StreamPlan(audio_context="clip", aas_after_blocks=0), []
    if mesh:
        layout = make_mesh(parse_layout(mesh, 4))[0]
        stream = PipelinedStream(NETWORK, plan, CONDITIONS, layout)

        def tick(params, noise, incoming, windows, sink, conditions, inputs):
            given.append(np.asarray(inputs.audio)[0])
            return incoming, incoming, windows

        monkeypatch.setattr(stream, "tick", tick)
    else:
        stream = SequentialStream(NETWORK, plan, CONDITIONS)

        def step(params, x, conditions, window, *others):
            given.append(np.asarray(conditions.audio))
            return x, window

        monkeypatch.setattr(stream, "step", step)
    for start in range(2):
        given.clear()
        stream.reset()
        for audio in AUDIO[start : start + 3]:
            stream.push(audio)
        heard = given if mesh else given[::4]
        first = AUDIO[start]
        before = [np.repeat(first[:, :, :1], 8, axis=2), first, AUDIO[start + 1]]
        for audio, own, past in zip(heard, AUDIO[start : start + 3], before, strict=True):
            np.testing.assert_array_equal(audio[:, :, -12:], own)
            np.testing.assert_array_equal(audio[:, :, :-12], past[:, :, -8:])


@pytest.mark.slow
def test_half_precision_survives_the_pipeline():
    config = CONFIG.replace(dtype="bfloat16")
    arguments = (make_network(config), StreamPlan(aas_after_blocks=1), CONDITIONS)
    piped = run(PipelinedStream(*arguments, make_mesh(parse_layout("3", 4))[0]), 3)
    plain = run(SequentialStream(*arguments), 3)
    assert piped.dtype == plain.dtype == jax.numpy.bfloat16
    np.testing.assert_allclose(piped.astype(float), plain.astype(float), atol=0.1)


def test_a_stream_can_start_again():
    stream = pipelined("5", 1)
    first = run(stream, 3)
    stream.reset()
    np.testing.assert_array_equal(run(stream, 3), first)


def test_every_block_passes_every_slice_in_order():
    """On the host alone: blocks come with gaps between, then the last ones leave."""
    slices, entering = 3, [0, 1, None, None, 2, None, 3]
    register, seen, left = Register.empty(slices), [], []
    for block in [*entering, *[None] * slices]:
        register, leaving = register.advance(block)
        seen.append(register.blocks)
        left.append(leaving)
        # Without a block, a slice works in the place of the one that it gets next.
        for k, (block, place) in enumerate(zip(register.blocks, register.places, strict=True)):
            come = [blocks[k] for blocks in seen if blocks[k] is not None]
            assert place == (len(come) if block is None else block)
    assert register.is_drained
    assert [block for block in left if block is not None] == [0, 1, 2, 3]
    for tick, block in enumerate(entering):
        if block is not None:
            assert [seen[tick + k][k] for k in range(slices)] == [block] * slices
            assert left[tick + slices - 1] == block


def test_renewing_the_sink_changes_the_stream_from_that_block_on():
    kept, after_one, after_four = sequential(0), sequential(1), sequential(4)
    np.testing.assert_array_equal(kept[:1], after_one[:1])
    np.testing.assert_array_equal(kept[:4], after_four[:4])
    assert np.abs(kept[1] - after_one[1]).max() > 1e-4
    assert np.abs(kept[4] - after_four[4]).max() > 1e-4


def test_only_the_latent_moves_between_slices():
    """One collective permute per tick, of the latent's size, and no other communication."""
    stream = pipelined("5", 4)
    state = stream.state
    inputs = slice_inputs(stream.plan, CONFIG, (0,) * 4, {0: AUDIO[0]}, stream.new_noise)
    text = stream.tick.lower(
        stream.params, stream.noise(0), state.incoming, state.windows, state.sink,
        Conditions(pose=stream.conditions.pose), inputs,
    ).compile().as_text()  # fmt: skip
    permutes = [line for line in text.splitlines() if " collective-permute(" in line]
    assert len(permutes) == 1
    shape = ",".join(map(str, state.incoming.shape[1:]))
    assert f"f32[{shape}]" in permutes[0] or f"f32[1,{shape}]" in permutes[0]
    for other in ("all-reduce", "all-gather", "all-to-all"):
        assert f" {other}(" not in text


def test_every_slice_has_its_own_weights_windows_and_sink():
    stream = pipelined("5", 4)
    for leaf in jax.tree.leaves((stream.state.windows, stream.state.sink)):
        assert leaf.shape[0] == 4
        assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {1}
    for leaf in jax.tree.leaves(stream.params):
        assert len(leaf.addressable_shards) == 4 and leaf.is_fully_replicated


def test_a_slice_of_two_devices_holds_half_of_the_heads_on_each():
    stream = pipelined("4x2", 4)
    key = stream.state.windows[0].key
    assert {shard.data.shape[4] for shard in key.addressable_shards} == {CONFIG.num_heads // 2}
    kernel = stream.params["blocks"]["ffn_in"]["kernel"]
    halves = {shard.data.shape[-1] for shard in kernel.addressable_shards}
    assert halves == {CONFIG.ffn_width // 2}


def test_devices_that_do_not_divide_the_heads_are_refused():
    mesh, _ = make_mesh(parse_layout("2x3", 4))
    with pytest.raises(ValueError, match="do not divide 2 heads"):
        PipelinedStream(NETWORK, StreamPlan(), CONDITIONS, mesh)


@pytest.mark.slow
def test_seeds_make_streams():
    def first(seed):
        plan = StreamPlan(seed=seed)
        return run(SequentialStream(NETWORK, plan, CONDITIONS), 1)

    np.testing.assert_array_equal(first(1), first(1))
    assert np.abs(first(1) - first(2)).max() > 0.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sink_distance": (5, 4)}, "the smaller first"),
        ({"aas_after_blocks": -1}, "give 4"),
        ({"seed": -1}, "within 0"),
        ({"audio_context": "all"}, "one of block_reset, clip"),
    ],
)
def test_impossible_plans_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        StreamPlan(**fields)
