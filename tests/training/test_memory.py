"""Algorithm 2 needs the history of a further block and no more; Algorithm 1 its layers, too."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import pytest

from jax_avatar.models.conditions import Conditions
from jax_avatar.models.config import DiTConfig
from jax_avatar.models.dit import DiT
from jax_avatar.models.lora import adapter_leaves, with_adapter
from jax_avatar.models.network import Network, unflatten
from jax_avatar.planning.programs import STAND_IN_OPTIONS
from jax_avatar.training.blockwise import gradient_of
from jax_avatar.training.rollout_plan import RolloutConfig, RolloutPlan, sample_randomness

GRID, BLOCKS = (16, 16), (3, 5, 7)
MODEL = DiTConfig(
    width=256, ffn_width=512, num_heads=4, num_layers=8, text_width=16, text_len=8,
    latent_channels=4, pose_channels=4, audio_width=16, audio_layers=2, ring_blocks=2,
    framepack=False, rematerialise=True, adapter_rank=4,
)  # fmt: skip
PLAIN = dataclasses.replace(MODEL, adapter_rank=0)
TOKENS = 3 * 8 * 8
ROWS = 4 * MODEL.num_layers * TOKENS * MODEL.width  # bytes: a block's input to every layer
HISTORY = 2 * ROWS  # its keys and values


def temporaries(algorithm, blocks):
    """Bytes, as compiled."""
    settings = RolloutConfig(sigmas=(1.0, 0.8, 0.0), cache="exit_only", gradient=algorithm)
    network, base = Network.abstract(DiT, MODEL), Network.abstract(DiT, PLAIN).params
    adapter = unflatten(adapter_leaves(base, MODEL.adapter_rank))
    plan = RolloutPlan(MODEL, settings)

    def run(base, adapter, key):
        keys = jax.random.split(key, 1)
        clips = Conditions(
            text=jnp.ones((1, 1, 2, MODEL.text_width)),
            reference=jnp.ones((1, 1, 1, *GRID, 4)),
            audio=jnp.ones((1, 1, 1, 12 * blocks, MODEL.audio_layers, MODEL.audio_width)),
            pose=jnp.ones((1, 1, 3, *GRID, 4)),
        )
        block = (1, 3, *GRID, 4)
        draws = jax.vmap(lambda key: sample_randomness(key, settings, blocks, block))(keys)
        return gradient_of(plan)(
            lambda adapter: network.bind(with_adapter(base, adapter)),
            adapter,
            clips,
            draws,
            1,
            plan,
            lambda x: (jnp.sin(3 * x), {}),
        )

    lowered = jax.jit(run).lower(base, adapter, jax.eval_shape(lambda: jax.random.key(0)))
    compiled = lowered.compile(compiler_options=STAND_IN_OPTIONS)
    return compiled.memory_analysis().temp_size_in_bytes


def growth(algorithm):
    """Bytes per further block, between each number of blocks and the next."""
    sizes = [temporaries(algorithm, blocks) for blocks in BLOCKS]
    return [
        (b - a) / (m - n) for (a, n), (b, m) in itertools.pairwise(zip(sizes, BLOCKS, strict=True))
    ]


@pytest.mark.slow
def test_a_further_block_costs_its_history_only():
    assert max(growth("blocks")) <= 1.2 * HISTORY


@pytest.mark.slow
def test_differentiating_the_clip_costs_its_layers_too():
    assert min(growth("clip")) >= HISTORY + ROWS
