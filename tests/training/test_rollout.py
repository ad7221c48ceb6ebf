import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_avatar import testing
from jax_avatar.models.conditions import Conditions
from jax_avatar.models.dit import DiT
from jax_avatar.models.portrait_dit import PortraitDiT
from jax_avatar.streaming.plan import StreamPlan
from jax_avatar.streaming.sampler import SequentialStream
from jax_avatar.streaming.state import add_context
from jax_avatar.training.blockwise import gradient_of
from jax_avatar.training.rollout import concat_blocks, self_forcing
from jax_avatar.training.rollout_plan import (
    RandomDraws,
    RolloutConfig,
    RolloutPlan,
    sample_randomness,
)

BLOCKS = 3
MODEL = testing.NANO.replace(framepack=False, num_layers=2, ring_blocks=2)
SETTINGS = RolloutConfig(sigmas=(1.0, 0.9, 0.6, 0.0), shift_max=40)
GRID = (4, 4)
KEY = jax.random.key(5)


def make_clip(seed=0, blocks=BLOCKS, config=MODEL):
    keys = jax.random.split(jax.random.key(seed), 4)
    audio = (1, 1, 12 * blocks, config.audio_layers, config.audio_width)
    return Conditions(
        text=jax.random.normal(keys[0], (1, 2, config.text_width)),
        reference=jax.random.normal(keys[1], (1, 1, *GRID, 4)),
        audio=jax.random.normal(keys[2], audio),
        pose=jax.random.normal(keys[3], (1, 3, *GRID, 4)),
    )


def make_clips(count):
    clips = [make_clip(seed) for seed in range(count)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *clips)


def make_draws(settings=SETTINGS, key=KEY, blocks=BLOCKS):
    return sample_randomness(key, settings, blocks, (1, 3, *GRID, 4))


@functools.cache
def network(config=MODEL, kind=DiT):
    return testing.make_network(config, kind=kind)


def roll(conditions, draws, exit_step, settings=SETTINGS, config=MODEL, net=None, **options):
    net = net or in_forms(config)
    plan = RolloutPlan(config, settings)
    return self_forcing(net, net, conditions, draws, exit_step, plan, **options)


def norm(tree):
    return np.sqrt(
        sum(np.square(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(tree))
    )


def difference(left, right):
    return norm(jax.tree.map(lambda a, b: a - b, left, right)) / norm(right)


class InForms:
    """The network with its forms compiled one by one: all variants of a rollout share them."""

    def __init__(self, network):
        self.network = network

    def prefill(self, conditions):
        return self.run("prefill", conditions)

    def project_prompt(self, text):
        return self.run("project_prompt", text)

    def block_after(self, noisy, timestep, conditions, past, sink, position):
        layers = [past(layer) for layer in range(len(sink.key))]
        # The first block's empty past is no clip's own; vmap would compile for it once more.
        own = 0 * noisy[0, 0, 0, 0, 0]
        history = [jnp.stack(parts) + own for parts in zip(*layers, strict=True)]
        return self.run("block_after", noisy, timestep, conditions, history, sink, position)

    def run(self, name, *args):
        with jax.disable_jit(False):
            return compiled_form(self.network.without_params(), name)(self.network.params, *args)


@functools.cache
def compiled_form(network, name):
    def run(params, *args):
        if name == "block_after":
            history = args[3]

            def past(layer):
                return tuple(part[layer] for part in history)

            args = (*args[:3], past, *args[4:])
        return getattr(network.bind(params), name)(*args)

    return jax.jit(run)


def in_forms(config=MODEL, kind=DiT):
    return InForms(network(config, kind))


@pytest.fixture
def in_pieces():
    """Loops over blocks and steps run in Python, so that nothing longer than a form is compiled."""
    with jax.disable_jit():
        yield


def gradients(settings, config, exit_steps, algorithm, compiler):
    """Gradient, clips and metrics."""
    plan = RolloutPlan(config, dataclasses.replace(settings, gradient=algorithm))
    conditions, made = make_clips(2), network(config)
    draws = jax.vmap(lambda key: make_draws(settings, key))(jax.random.split(jax.random.key(3), 2))
    bind = made.bind if compiler is jax.jit else lambda p: InForms(made.with_params(p))

    @compiler
    def run(params, exit_step):
        def score(clips):
            return jnp.sin(3 * clips), {}

        return gradient_of(plan)(bind, params, conditions, draws, exit_step, plan, score)

    return [run(made.params, step) for step in exit_steps]


def assert_the_same_gradients(changes, ring_blocks, exit_steps, compiler=lambda run: run):
    settings, config = (
        dataclasses.replace(SETTINGS, **changes),
        MODEL.replace(ring_blocks=ring_blocks),
    )
    algorithms = ("blocks", "clip")
    pairs = [gradients(settings, config, exit_steps, name, compiler) for name in algorithms]
    for (blocks, made, figures), (whole, same, _) in zip(*pairs, strict=True):
        np.testing.assert_allclose(made, same, atol=1e-6)
        assert difference(blocks, whole) < 1e-5
        assert figures["replay_error"] < 1e-5
        # The prompt's projections and the audio tower are trained, too.
        attention = blocks["blocks"]["cross_attention"]["key"]["kernel"]
        assert np.abs(attention).max() > 0


NOISY = {"kv_noise": 0.3}
VARIANTS = [
    NOISY,
    {"cache": "exit_only", "kv_noise_on": "v", **NOISY},
    {"refresh": "clean", "sampler": "renoise"},
    {"refresh": "fixed", "kv_noise_sink": True, **NOISY},
    {"sampler": "renoise", "cache": "exit_only"},
    {"sampler": "renoise", "kv_noise_on": "k", **NOISY},
]


@pytest.mark.parametrize("changes", VARIANTS[:4], ids=str)
def test_one_block_at_a_time_gives_the_gradient_of_the_whole_clip(changes, in_pieces):
    assert_the_same_gradients(changes, 2, (2,))


@pytest.mark.slow
@pytest.mark.parametrize("ring_blocks", [2, 5])
@pytest.mark.parametrize("changes", [{}, *VARIANTS], ids=str)
def test_it_does_so_at_every_exit_and_with_every_window(changes, ring_blocks, in_pieces):
    assert_the_same_gradients(changes, ring_blocks, range(3))


@pytest.mark.slow
def test_it_does_so_compiled_as_one_program():
    assert_the_same_gradients(NOISY, 2, range(3), jax.jit)


HISTORIES = [{}, {"cache": "exit_only"}, {"refresh": "clean"}, {"refresh": "fixed"}]
LEVELS = {1: (1.0, 0.0), 2: (1.0, 0.8, 0.0), 4: (1.0, 0.9, 0.75, 0.5, 0.0)}


def assert_the_stream_is_the_rollout(settings, ring_blocks, kind=DiT, compiler=lambda run: run):
    """Streams what the model folder of such a student says, on the chance of the rollout."""
    blocks = ring_blocks + 1  # the window rolls
    config = MODEL.replace(ring_blocks=ring_blocks)
    clip, chance = make_clip(blocks=blocks), make_draws(settings, blocks=blocks)
    made = network(config, kind)
    plan, last = RolloutPlan(config, settings), settings.num_steps - 1
    bind = made.bind if compiler is jax.jit else lambda p: InForms(made.with_params(p))

    @compiler
    def rolled(params, clip, chance):
        return self_forcing(bind(params), bind(params), clip, chance, last, plan)

    trace = rolled(made.params, clip, chance)

    def new_noise(block, step, shape):
        key = jax.random.fold_in(jax.random.fold_in(chance.renoise_key, block + 1), step)
        return jax.random.normal(key, shape)

    plan = StreamPlan(
        **settings.sampling(),
        aas_after_blocks=0,
        noise=lambda block, shape: chance.noise[block],
        new_noise=new_noise,
        distance=lambda block, step: chance.distance[block, step],
    )
    conditions = Conditions(text=clip.text, reference=clip.reference, pose=clip.pose)
    with jax.disable_jit(False):  # a stream is compiled
        stream = SequentialStream(made, plan, conditions)
        for block in range(blocks):
            (latent,) = stream.push(clip.audio[:, :, 12 * block : 12 * block + 12])
            np.testing.assert_allclose(trace.clean[block], latent, atol=1e-5, rtol=1e-5)


def students(history, steps):
    for sampler, count in itertools.product(("euler", "renoise"), steps):
        yield RolloutConfig(sigmas=LEVELS[count], sampler=sampler, shift_max=0, **history)


@pytest.mark.parametrize(("ring_blocks", "steps"), [(3, (1, 2, 4)), (2, (2,))])
@pytest.mark.parametrize("history", HISTORIES, ids=str)
def test_the_rollout_to_the_last_step_is_the_stream(history, ring_blocks, steps, in_pieces):
    for settings in students(history, steps):
        assert_the_stream_is_the_rollout(settings, ring_blocks)


@pytest.mark.slow
@pytest.mark.parametrize("ring_blocks", [1, 2, 4])
@pytest.mark.parametrize("kind", [DiT, PortraitDiT])
@pytest.mark.parametrize("history", [*HISTORIES, {"audio_context": "clip"}], ids=str)
def test_it_is_so_for_both_networks_and_every_window(history, kind, ring_blocks, in_pieces):
    for settings in students(history, (1, 2, 4)):
        assert_the_stream_is_the_rollout(settings, ring_blocks, kind)


@pytest.mark.slow
@pytest.mark.parametrize("history", HISTORIES, ids=str)
def test_it_is_so_for_the_rollout_compiled_as_one_program(history):
    for settings in students(history, (2,)):
        assert_the_stream_is_the_rollout(settings, 3, compiler=jax.jit)


@pytest.mark.parametrize("context", ["block_reset", "clip"])
def test_a_rollout_hears_what_a_stream_hears(context, in_pieces, monkeypatch):
    settings, given = dataclasses.replace(SETTINGS, audio_context=context), []
    run = InForms.block_after

    def block_after(self, noisy, timestep, conditions, *others):
        given.append(np.asarray(conditions.audio))
        conditions = conditions.with_audio(conditions.audio[:, :, -12:])
        return run(self, noisy, timestep, conditions, *others)

    monkeypatch.setattr(InForms, "block_after", block_after)
    clip, plan, earlier = make_clip(), StreamPlan(audio_context=context), None
    roll(clip, make_draws(settings), 1, settings)
    for block in range(BLOCKS):
        features = clip.audio[:, :, 12 * block : 12 * block + 12]
        heard, earlier = add_context(plan, features, earlier)
        for audio in given[2 * block : 2 * block + 2]:
            np.testing.assert_array_equal(audio, heard)


def test_without_pass_b_the_window_is_history_enough(in_pieces):
    """Four blocks in two slots: the third overwrites the first, and the fourth sees no other."""
    config = MODEL.replace(ring_blocks=3)
    clip, chance = make_clip(blocks=4), make_draws(blocks=4)
    whole, short = (
        roll(clip, chance, 1, config=config, net=in_forms(), keeps_history=keeps)
        for keeps in (True, False)
    )
    assert (len(whole.history.key), len(short.history.key)) == (4, 2)
    np.testing.assert_allclose(short.clean, whole.clean, atol=1e-6)


@pytest.mark.parametrize("cache", ["per_step", "exit_only"])
def test_history_is_read_layer_by_layer(cache):
    """The window of all layers is a large part of the memory; a copy of it would be, too."""
    settings, made = dataclasses.replace(SETTINGS, cache=cache), network()
    clip, draws = make_clip(), make_draws()

    @jax.make_jaxpr
    def run(params):
        return roll(clip, draws, 2, settings, net=made.bind(params)).clean

    history = (3 * GRID[0] * GRID[1] // 4, MODEL.num_heads, MODEL.head_dim)  # of one block, layer
    sizes = [
        read.aval.size // np.prod(history)
        for equation in equations(run(made.params).jaxpr)
        if equation.primitive.name in ("dynamic_slice", "gather")
        for read in equation.outvars
        if read.aval.shape[-3:] == history
    ]
    assert set(sizes) == {1}  # block that is seen


def equations(jaxpr):
    """Of a program and of all programs within."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values())):
            if isinstance(value, jax.extend.core.ClosedJaxpr | jax.extend.core.Jaxpr):
                yield from equations(getattr(value, "jaxpr", value))


def test_later_audio_changes_no_earlier_block(in_pieces):
    clip, chance = make_clip(), make_draws()
    before = roll(clip, chance, 2).clean
    other = clip.with_audio(clip.audio.at[:, :, 24:].set(clip.audio[:, :, :12]))
    after = roll(other, chance, 2).clean
    np.testing.assert_array_equal(after[:2], before[:2])
    assert np.abs(after[2] - before[2]).max() > 1e-4


def test_only_the_exit_step_is_differentiated(in_pieces):
    """At the last of three steps, weights that only earlier steps or blocks used get nothing."""
    clip, chance = make_clip(), make_draws()
    settings = dataclasses.replace(SETTINGS, gradient="clip")

    def last_block(scale):
        # The audio of earlier blocks acts on the last one through history alone.
        heard = clip.with_audio(clip.audio.at[:, :, :24, :, 0].add(scale))
        return jnp.sum(jnp.square(roll(heard, chance, 2, settings).clean[2]))

    value, slope = jax.jvp(last_block, (0.0,), (1.0,))
    assert slope == 0 and abs(last_block(3.0) - value) > 1e-5


def test_every_mode_of_history_is_another_clip(in_pieces):
    changes = [{}, {"cache": "exit_only"}, {"refresh": "clean"}, {"kv_noise": 0.3}]
    clips = []
    for change in changes:
        settings = dataclasses.replace(SETTINGS, **change)
        clips.append(roll(make_clip(), make_draws(), 2, settings).clean)
    for other in clips[1:]:
        np.testing.assert_allclose(other[0], clips[0][0], atol=1e-6)  # it has no past
        assert np.abs(other[2] - clips[0][2]).max() > 1e-4


class Exact(InForms):
    """`velocity = noise - clean` of what the block was last noised with."""

    def __init__(self, clean, draws, steps, *, renoises):
        super().__init__(network())
        self.clean, self.draws, self.renoises = clean, draws, renoises
        self.places = itertools.product(range(len(clean)), range(steps))  # in the order of calls

    def block_after(self, *args):
        _, kv = super().block_after(*args)
        g, step = next(self.places)
        is_new = self.renoises and step > 0
        noise = self.draws.new_noise(g, step - 1) if is_new else self.draws.noise[g]
        return noise - self.clean[g], kv


@pytest.mark.parametrize("sampler", ["euler", "renoise"])
def test_an_exact_velocity_leads_to_the_clean_clip(sampler, in_pieces):
    """By any steps to any exit."""
    settings = dataclasses.replace(SETTINGS, sampler=sampler)
    draws = make_draws(settings)
    clean = jax.random.normal(jax.random.key(8), draws.noise.shape)
    for exit_step in range(3):
        net = Exact(clean, draws, exit_step + 1, renoises=sampler == "renoise")
        trace = roll(make_clip(), draws, exit_step, settings, net=net)
        np.testing.assert_allclose(trace.clean, clean, atol=1e-5)


def test_chance_depends_on_the_key_and_stays_in_its_ranges():
    many = jax.vmap(lambda key: sample_randomness(key, SETTINGS, 2, (1, 1, 2, 2, 1)))
    drawn = many(jax.random.split(jax.random.key(0), 400))
    assert isinstance(drawn, RandomDraws)
    assert (drawn.distance.min(), drawn.distance.max()) == (4, 30)
    assert (drawn.first_frame.min(), drawn.first_frame.max()) == (0, 40)
    per_clip = sample_randomness(
        jax.random.key(0),
        dataclasses.replace(SETTINGS, sink_distance_per="clip"),
        2,
        (1, 1, 2, 2, 1),
    )
    assert len(np.unique(per_clip.distance)) == 1


def test_blocks_join_in_time():
    blocks = jnp.arange(6.0).reshape(2, 1, 3, 1, 1, 1)
    np.testing.assert_array_equal(concat_blocks(blocks).ravel(), np.arange(6))


def test_settings_nobody_knows_are_named():
    with pytest.raises(ValueError, match=r"rollout\.refresh 'noisy' must be one of none, clean"):
        RolloutConfig(refresh="noisy")
    with pytest.raises(
        ValueError, match=r"rollout\.audio_context 'all' must be one of block_reset"
    ):
        RolloutConfig(audio_context="all")
