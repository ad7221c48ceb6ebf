from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_avatar.models.cache import block_position, empty_cache
from jax_avatar.models.dit import DiT
from jax_avatar.models.network import Network
from jax_avatar.testing import GRID, NANO, make_audio, make_conditions, make_latents, make_network

NETWORK = make_network()
PARAMS = NETWORK.params
CONDITIONS = make_conditions()
FRAMES = NANO.frames_per_block


@jax.jit
def stream_block(params, latent, timestep, audio, cache, sink, position):
    dit = NETWORK.bind(params)
    conditions = CONDITIONS.with_audio(audio)
    return dit.stream_block(latent, timestep, conditions, cache, sink, position)


@jax.jit
def prefill(params, reference):
    return NETWORK.bind(params).prefill(CONDITIONS.with_reference(reference))


def causal(latents, timestep, audio, reference_frame=None):
    @jax.jit
    def run(params):
        conditions = of_clip(latents.shape[1] // FRAMES, audio)
        return NETWORK.bind(params).block_causal(
            latents, timestep, conditions, reference_frame=reference_frame
        )

    return run(PARAMS)


def of_clip(blocks, audio, **changes):
    """Conditions of some blocks, each with the same pose."""
    pose = jnp.tile(CONDITIONS.pose, (1, blocks, 1, 1, 1))
    return replace(CONDITIONS, pose=pose, audio=audio, **changes)


def clip_audio(blocks):
    return jnp.concatenate([jnp.asarray(audio) for audio in make_audio(blocks)], axis=2)


def stream(blocks, latents, timestep, audio, distance, first_block=0):
    sink, cache = prefill(PARAMS, CONDITIONS.reference), empty_cache(NANO, 1, *GRID)
    velocities = []
    for block in range(blocks):
        frames = slice(block * FRAMES, (block + 1) * FRAMES)
        position = block_position(NANO, first_block + block, distance)
        features = audio[:, :, 4 * frames.start : 4 * frames.stop]
        velocity, cache = stream_block(
            PARAMS, latents[:, frames], timestep[:, frames], features, cache, sink, position
        )
        velocities.append(np.asarray(velocity))
    return np.concatenate(velocities, axis=1)


def test_streaming_equals_the_training_form():
    """Same timesteps, reference not yet rolling: the two forms must agree."""
    latents, timestep = make_latents(12), jnp.full((1, 12), 600.0)
    audio = clip_audio(4)
    whole = causal(latents, timestep, audio)
    np.testing.assert_allclose(stream(4, latents, timestep, audio, 21), whole, atol=2e-5)


def test_a_rolled_window_equals_one_recomputed_from_its_blocks():
    """After the ring has wrapped, only the last four blocks matter, in any slot order."""
    audio, timestep = clip_audio(7), jnp.full((1, 21), 300.0)
    latents = make_latents(21)
    rolled = stream(7, latents, timestep, audio, 16)[:, -FRAMES:]
    # In one layer keys do not depend on older blocks, so a fresh window gives the same.
    one_layer = NANO.replace(num_layers=1)
    network = make_network(one_layer)

    def last_block(first):
        sink = network.bind().prefill(CONDITIONS)
        cache = empty_cache(one_layer, 1, *GRID)
        step = jax.jit(network.bind().stream_block)
        for block in range(first, 7):
            frames = slice(block * FRAMES, (block + 1) * FRAMES)
            position = block_position(one_layer, block, 16)
            if first:  # slots in use from a later start: valid ones must still be a prefix
                position = position.__class__(
                    position.frame, position.reference, block - first, block - first + 1
                )
            velocity, cache = step(
                latents[:, frames],
                timestep[:, frames],
                CONDITIONS.with_audio(audio[:, :, 4 * frames.start : 4 * frames.stop]),
                cache,
                sink,
                position,
            )
        return velocity

    np.testing.assert_allclose(last_block(0), last_block(3), atol=2e-5)
    assert np.abs(rolled).max() > 0.1


def test_a_block_sees_earlier_blocks_but_not_later_ones():
    latents, timestep = make_latents(9), jnp.full((1, 9), 500.0)
    audio = clip_audio(3)
    before = np.asarray(causal(latents, timestep, audio))
    changed = latents.at[:, 3:6].add(1.0)
    after = np.asarray(causal(changed, timestep, audio))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert np.abs(before[:, 6:] - after[:, 6:]).max() > 1e-3


def test_later_audio_never_changes_earlier_frames():
    latents, timestep = make_latents(9), jnp.full((1, 9), 500.0)
    audio = clip_audio(3)
    before = np.asarray(causal(latents, timestep, audio))
    after = np.asarray(causal(latents, timestep, audio.at[:, :, 24:].add(1.0)))
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert np.abs(before[:, 6:] - after[:, 6:]).max() > 1e-4


@pytest.mark.parametrize("shift", [0, 10**7])
def test_hour_100_equals_minute_1(shift):
    """Positions are integers and angles float64: shifting everything changes nothing."""
    config = NANO.replace(framepack=False)  # packed motion frames stay behind by design
    network = make_network(config)
    dit = network.bind()
    latents, audio = make_latents(18), clip_audio(6)

    @jax.jit
    def step(latent, features, cache, sink, position):
        timestep = jnp.full((1, FRAMES), 400.0)
        conditions = CONDITIONS.with_audio(features)
        return dit.stream_block(latent, timestep, conditions, cache, sink, position)

    def run(first_frame):
        sink = dit.prefill(replace(CONDITIONS, motion=None))
        cache, out = empty_cache(config, 1, *GRID), []
        for block in range(6):
            frames = slice(block * FRAMES, (block + 1) * FRAMES)
            position = block_position(config, block, 16, first_frame=first_frame)
            features = audio[:, :, 4 * frames.start : 4 * frames.stop]
            velocity, cache = step(latents[:, frames], features, cache, sink, position)
            out.append(np.asarray(velocity))
        return np.stack(out)

    np.testing.assert_allclose(run(shift), run(3), atol=1e-5)


def test_the_reference_rolls_ahead_of_the_block():
    position = block_position(NANO, 100, 16)
    first = block_position(NANO, 0, 16)
    turned = block_position(NANO, 316 // 3, 1)  # frame 315, reference 316
    np.testing.assert_allclose(position.reference.cos, turned.reference.cos, atol=1e-6)
    assert np.abs(np.asarray(first.reference.cos) - position.reference.cos).max() > 1e-3


def test_speakers_reach_only_their_mask():
    latents, timestep = make_latents(FRAMES), jnp.full((1, FRAMES), 500.0)
    sink = prefill(PARAMS, CONDITIONS.reference)
    audio = jnp.asarray(make_audio(1, speakers=2)[0])
    left = jnp.zeros((1, 2, FRAMES, 4, 4)).at[:, 0, :, :, :2].set(1).at[:, 1, :, :, 2:].set(1)
    one_layer = NANO.replace(num_layers=1)
    network = make_network(one_layer)
    dit = network.bind()
    sink = dit.prefill(CONDITIONS)

    @jax.jit
    def run(audio):
        cache, position = empty_cache(one_layer, 1, *GRID), block_position(one_layer, 0, 30)
        conditions = replace(CONDITIONS, audio=audio, speaker_mask=left)
        return dit.stream_block(latents, timestep, conditions, cache, sink, position)[0]

    # One layer, audio injected after it: the second speaker's words stay on the right.
    before, after = run(audio), run(audio.at[:, 1].add(1.0))
    np.testing.assert_array_equal(before[..., :4, :], after[..., :4, :])
    assert np.abs(before[..., 4:, :] - after[..., 4:, :]).max() > 1e-4


def test_several_speakers_need_a_mask():
    sink = prefill(PARAMS, CONDITIONS.reference)
    with pytest.raises(ValueError, match=r"2 speakers.*speaker_mask"):
        NETWORK.bind().stream_block(
            make_latents(FRAMES),
            jnp.zeros((1, FRAMES)),
            CONDITIONS.with_audio(jnp.asarray(make_audio(1, speakers=2)[0])),
            empty_cache(NANO, 1, *GRID),
            sink,
            block_position(NANO, 0, 30),
        )


def test_wrong_audio_length_and_prompt_are_named():
    dit = NETWORK.bind()
    with pytest.raises(ValueError, match="need 12"):
        dit.stream_block(
            make_latents(FRAMES),
            jnp.zeros((1, FRAMES)),
            CONDITIONS.with_audio(jnp.zeros((1, 1, 8, 2, 6))),
            empty_cache(NANO, 1, *GRID),
            prefill(PARAMS, CONDITIONS.reference),
            block_position(NANO, 0, 30),
        )
    with pytest.raises(ValueError, match="at most 3 rows of 4"):
        dit.prefill(CONDITIONS.with_text(jnp.zeros((1, 5, 4))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "head size"),
        ({"audio_inject_layers": (1, 0)}, "ascending"),
        ({"audio_inject_layers": (7,)}, "within"),
        ({"width": 26, "num_heads": 1}, "multiple of 4"),
        ({"freq_width": 9}, "even"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        NANO.replace(**change)


def test_gradients_reach_every_parameter():
    latents, timestep = make_latents(6), jnp.full((1, 6), 500.0)
    audio = clip_audio(2)

    @jax.jit
    @jax.grad
    def gradient(params):
        out = NETWORK.bind(params).block_causal(latents, timestep, of_clip(2, audio))
        return jnp.sum(out**2)

    leaves = jax.tree_util.tree_leaves_with_path(gradient(PARAMS))
    silent = [jax.tree_util.keystr(path) for path, leaf in leaves if not np.abs(leaf).max() > 0]
    # A key's bias shifts all scores alike only before the norm; nothing else may be silent.
    assert not silent


def abstract(**changes):
    """A transformer of shapes."""
    config = NANO.replace(**{"framepack": False, "adapter_rank": 2, **changes})
    return Network.abstract(DiT, config)


SIZES = {
    "width": 32, "ffn_width": 40, "num_layers": 3, "freq_width": 10, "text_width": 5,
    "latent_channels": 5, "pose_channels": 5, "audio_width": 7, "audio_layers": 3,
    "num_audio_tokens": 3, "audio_inject_layers": (0, 1), "framepack": True, "adapter_rank": 3,
    "param_dtype": jnp.bfloat16,
}  # fmt: skip


def test_every_size_is_in_the_weights():
    plain = str(abstract().params)
    assert [
        name for name, value in SIZES.items() if str(abstract(**{name: value}).params) == plain
    ] == []


SWITCHES = {
    "num_heads": 4, "eps": 1e-3, "dtype": jnp.bfloat16, "unroll": 2, "rematerialise": True,
    "audio_history": 4, "adapter_scaling": 0.5, "rope_theta": 100.0, "half_rotary": True,
    "reference_frame": 20,
}  # fmt: skip


def test_every_switch_is_in_the_program():
    latents, audio = make_latents(6), clip_audio(2)

    def program(**changes):
        network = abstract(**changes)

        def run(params):
            conditions = of_clip(2, audio, motion=None)
            timestep = jnp.full((1, 6), 500.0)
            return network.bind(params).block_causal(latents, timestep, conditions)

        traced = jax.make_jaxpr(run)(network.params)
        return str(traced), [np.asarray(part, np.float64).sum() for part in traced.consts]

    plain = program()
    assert not [name for name, value in SWITCHES.items() if program(**{name: value}) == plain]


def test_pose_starts_at_zero_if_told():
    def pose(**changes):
        config = NANO.replace(framepack=False, num_layers=1, **changes)
        params = jax.jit(lambda: Network.of(DiT(config, rngs=nnx.Rngs(0))).params["pose"])()
        return np.abs(np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(params)])).max()

    assert pose(zero_init=True) == 0 < pose(zero_init=False)
