"""A new prompt takes effect at a block border, the same on every layout."""

import jax
import numpy as np
import pytest

from jax_avatar.layout import make_mesh, parse_layout
from jax_avatar.streaming.pipeline import PipelinedStream
from jax_avatar.streaming.plan import StreamPlan
from jax_avatar.streaming.sampler import SequentialStream
from jax_avatar.testing import NANO, make_audio, make_conditions, make_network

BLOCKS = 8
CONFIG = NANO.replace(framepack=False)
NETWORK = make_network(CONFIG)
CONDITIONS = make_conditions(CONFIG)
AUDIO = make_audio(BLOCKS, CONFIG)
TEXTS = 3 * jax.random.normal(jax.random.key(8), (3, *CONDITIONS.text.shape))


def run(stream, changes):
    """Latents of a stream whose prompt changes before some blocks."""
    latents = []
    for block, audio in enumerate(AUDIO):
        if block in changes:
            stream.set_text(TEXTS[changes[block]])
        latents += stream.push(audio)
    return np.concatenate([np.asarray(x) for x in latents + stream.finish()])


def sequential(aas=4):
    plan = StreamPlan(aas_after_blocks=aas)
    return SequentialStream(NETWORK, plan, CONDITIONS)


@pytest.fixture(scope="module")
def one_device():
    return sequential()


# Before the sink's renewal, at it, after it, and twice within the depth of the pipeline.
@pytest.mark.parametrize("changes", [{2: 0, 6: 1}, {4: 0}, {3: 0, 4: 1, 5: 2}])
def test_every_block_keeps_one_prompt_through_all_slices(one_device, changes):
    """Mixed prompts within a block, or a change one block off, would part the layouts."""
    one_device.reset()
    expected = run(one_device, changes)
    mesh, _ = make_mesh(parse_layout("5", 4))
    piped = PipelinedStream(NETWORK, StreamPlan(aas_after_blocks=4), CONDITIONS, mesh)
    np.testing.assert_allclose(run(piped, changes), expected, atol=1e-5)


def test_a_prompt_changes_its_block_and_no_earlier_one(one_device):
    one_device.reset()
    plain = run(one_device, {})
    one_device.reset()
    changed = run(one_device, {3: 0})
    np.testing.assert_array_equal(plain[:3], changed[:3])
    assert np.abs(plain[3] - changed[3]).max() > 1e-4


def test_the_first_prompt_is_a_change_before_block_0(one_device):
    told = make_conditions(CONFIG).with_text(TEXTS[1])
    one_device.reset()
    changed = run(one_device, {0: 1})
    one_device.reset(told)
    np.testing.assert_array_equal(run(one_device, {}), changed)
    one_device.reset(CONDITIONS)
