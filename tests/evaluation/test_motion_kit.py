from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jax_avatar.data.latents import LatentClips
from jax_avatar.evaluation.in_training import MotionEvaluation
from jax_avatar.evaluation.motion_kit import MotionClips
from jax_avatar.evaluation.motion_scores import curves_of
from jax_avatar.streaming.batch import BatchStream
from jax_avatar.testing import save_model
from jax_avatar.weights.folder import load_model


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("model"), vae="anchored", sigmas=[1.0, 0.6, 0.0])
    return BatchStream(load_model(folder))


def encoded(count, latents=14):
    """Clips of random motion, at 16 frames per second."""
    rng = np.random.default_rng(0)
    clips = LatentClips(
        latent=rng.normal(size=(count, latents, 2, 2, 4)).astype(np.float16),
        reference=np.zeros((count, 1, 2, 2, 4), np.float16),
        features=rng.normal(size=(count, 4 * latents, 2, 6)).astype(np.float16),
        mouth=np.zeros((count, latents, 2, 2), bool),
        lip_gap=np.zeros((count, 4 * latents), np.float32),
        person=np.arange(count),
    )
    object.__setattr__(clips, "fps", 16)
    return clips


@pytest.fixture(scope="module")
def clips(stream):
    return MotionClips(encoded(8), stream.model.vae.bind(), count=4, seconds=3.2, seeds=2)


def test_every_seed_of_a_clip_hears_the_same_and_draws_its_own(stream, clips):
    assert clips.truth.shape == clips.others.shape == (4, 48, 10)  # 12 latents, whole blocks
    np.testing.assert_array_equal(clips.features[:4], clips.features[4:])
    latents = stream.latents(clips.reference, clips.features)
    made = clips.make(stream)
    assert made.shape == (2, 4, 48, 10)
    np.testing.assert_allclose(made[1, 2], curves_of(clips.vae, latents[6:7])[0], atol=1e-5)
    assert np.abs(made[0] - made[1]).max() > 0.1
    one = stream.latents(clips.reference[:1], clips.features[:1])
    assert one.shape == (1, 12, 2, 2, 4)


def test_the_averaged_weights_are_scored_while_training(stream, clips):
    params = stream.model.dit.params
    louder = params | {"head": jax.tree.map(lambda leaf: 3 * leaf, params["head"])}
    evaluate = MotionEvaluation(stream, clips, lambda weights: weights)
    state = SimpleNamespace(ema=params, params=louder)
    evaluate.check(state)
    found = evaluate(state, 3)
    assert {"lip_r", "blinks", "seeds_head", "distance_mouth"} < set(found)
    assert found == evaluate(SimpleNamespace(ema=params, params=params), 4)
    assert found != evaluate(SimpleNamespace(ema=louder, params=params), 5)


def test_sets_that_are_too_small_are_refused(stream):
    with pytest.raises(ValueError, match=r"has 7 clips of 3\.0 s or more, 8 are needed"):
        MotionClips(encoded(7), stream.model.vae.bind(), count=4, seconds=3.2)
