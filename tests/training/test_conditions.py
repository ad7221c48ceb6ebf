"""What critic and teacher are asked, and how strongly adapters act."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_avatar import testing
from jax_avatar.models.conditions import Conditions
from jax_avatar.training.distill_state import ClipBatch, DistillConfig
from jax_avatar.training.scores import score_gradient

MODEL = testing.NANO.replace(framepack=False)
KEY = jax.random.key(4)


@dataclasses.dataclass
class Network:
    """A score network that calls a function of its own."""

    velocity: Callable

    def bidirectional(self, noisy, timestep, conditions):
        return self.velocity(noisy, timestep, conditions)


def gradient_in(critic, teacher, clips, batch, settings):
    networks = Network(critic), Network(teacher)
    return score_gradient(*networks, clips, batch, KEY, settings, frames_per_block=3)


def asked_of(clips, batch):
    """All that networks are asked: which one, the noisy clip, its level, and its conditions."""
    names, questions = [], []

    def velocity(name, noisy, timestep, given):
        names.append(name)
        questions.append((noisy, timestep, given.text, given.reference, given.audio))
        return jnp.zeros_like(noisy)

    networks = [functools.partial(velocity, name) for name in ("critic", "teacher")]
    settings = DistillConfig(guidance_scale=4.0, latents=3)

    @jax.jit
    def ask(clips, batch):
        gradient_in(*networks, clips, batch, settings)
        return questions

    return names, ask(clips, batch)


def test_the_teacher_is_guided_away_from_silence_and_the_negative_prompt():
    """The portrait stays; all are asked for the same noisy clip, at one level."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal((2, *shape)).astype(np.float32)

    clips, pose = normal(3, 4, 4, 4), normal(1, 4, 4, 4)
    text, null_text, reference, features = (
        normal(3, 4), normal(3, 4), normal(1, 4, 4, 4), normal(1, 12, 2, 6),
    )  # fmt: skip
    conditions = Conditions(
        text=text, null_text=null_text, reference=reference, audio=features, pose=pose
    )
    asked, questions = asked_of(clips, ClipBatch(conditions, np.arange(2)))
    assert asked == ["critic", "teacher", "teacher"]
    own, null = (text, reference, features), (null_text, reference, np.zeros_like(features))
    for (noisy, timestep, *heard), expected in zip(questions, (own, own, null), strict=True):
        np.testing.assert_array_equal(noisy, questions[0][0])
        np.testing.assert_array_equal(timestep, questions[0][1])
        assert (np.asarray(timestep) == np.asarray(timestep)[:, :1]).all()
        for value, right in zip(heard, expected, strict=True):
            np.testing.assert_array_equal(value, right)


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


CLIPS = normal(8, 3, 4, 4, 4)
BATCH = ClipBatch(
    Conditions(
        text=normal(8, 3, 4),
        null_text=normal(8, 3, 4, seed=1),
        reference=normal(8, 1, 4, 4, 4),
        audio=normal(8, 1, 12, 2, 6),
        pose=normal(8, 1, 4, 4, 4, seed=1),
    ),
    np.arange(8),
)


def velocity_of(noisy, given):
    """A teacher in which prompt and speech act together, not one beside the other."""
    text, speech = (jnp.sin(x.reshape(8, -1).sum(1)) for x in (given.text, given.audio))
    return noisy * (1 + text + speech + text * speech)[:, None, None, None, None]


def slope_of(*, critic=velocity_of, asked=None, **settings):
    """Gradient in the clips with the toy teacher, and the noise level of every clip."""

    def velocity(name, function, noisy, timestep, given):
        if asked is not None:
            jax.debug.callback(lambda: asked.append(name))
        return function(noisy, given)

    networks = [
        functools.partial(velocity, name, function)
        for name, function in (("critic", critic), ("teacher", velocity_of))
    ]
    config = DistillConfig(latents=3, **settings)
    ask = jax.jit(lambda clips, batch: gradient_in(*networks, clips, batch, config))
    slope, metrics = ask(CLIPS, BATCH)
    jax.effects_barrier()
    return np.asarray(slope), np.asarray(metrics["scores"]["sigma"])


APART = {"guidance_scale": 5.0, "text_guidance_scale": 2.0}


def test_a_critic_that_is_the_teacher_guided_apart_leaves_no_gradient():
    def guided(noisy, given):
        silent = given.with_audio(jnp.zeros_like(given.audio))
        null = silent.with_text(BATCH.conditions.null_text)
        full, silent, null = (velocity_of(noisy, each) for each in (given, silent, null))
        return null + 2 * (silent - null) + 5 * (full - silent)

    assert np.abs(slope_of(critic=guided, **APART)[0]).max() < 1e-6
    for other in ({"guidance_scale": 5.0}, {**APART, "text_guidance_scale": 1.0}):
        assert np.abs(slope_of(critic=guided, **other)[0]).max() > 1e-3


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_equal_scales_apart_are_the_standard_form(scale):
    together, _ = slope_of(guidance_scale=scale)
    apart, _ = slope_of(guidance_scale=scale, text_guidance_scale=scale)
    np.testing.assert_allclose(apart, together, atol=1e-6)
    assert np.any(together) == (scale != 1)


@pytest.mark.parametrize(
    ("settings", "forwards"),
    [
        ({"guidance_scale": 1.0}, 1),
        ({"guidance_scale": 1.0, "text_guidance_scale": 1.0}, 1),
        ({"guidance_scale": 4.0}, 2),
        ({"guidance_scale": 4.0, "text_guidance_scale": 1.0}, 2),
        (APART, 3),
        ({**APART, "guidance_bounds": (0.0, 0.9)}, 3),
        # The draws of this key leave this band empty.
        ({**APART, "guidance_bounds": (0.0, 0.021)}, 1),
    ],
)
def test_the_teacher_is_not_asked_for_what_is_not_guided(settings, forwards):
    asked = []
    slope_of(asked=asked, **settings)
    assert asked.count("teacher") == forwards and asked.count("critic") == 1


def test_only_levels_within_the_band_are_guided():
    plain, sigma = slope_of(guidance_scale=1.0)
    guided, _ = slope_of(**APART)
    low, high = np.sort(sigma)[[2, 5]].tolist()
    banded, _ = slope_of(**APART, guidance_bounds=(low, high))
    is_in = (low <= sigma) & (sigma <= high)
    assert 0 < is_in.sum() < len(sigma)
    np.testing.assert_array_equal(banded[~is_in], plain[~is_in])
    np.testing.assert_allclose(banded[is_in], guided[is_in], atol=1e-6)
    assert np.abs(guided - plain)[is_in].max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_guidance_scale": -1.0}, r"text_guidance_scale -1\.0 must not be negative"),
        (
            {"guidance_bounds": (0.5, 0.5)},
            r"bounds \(0\.5, 0\.5\) must rise within 0\.\.1",
        ),
        ({"guidance_bounds": (0.0, 1.5)}, r"guidance_bounds .* must rise within 0\.\.1"),
        ({"guidance_bounds": (0.0, 0.3), "sigma_bounds": (0.4, 0.98)}, r"meet task\.sigma_bounds"),
    ],
)
def test_guidance_that_cannot_be_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig(**settings)


def test_adapters_are_scaled_by_alpha_over_rank():
    adapted = DistillConfig(adapter_rank=128, adapter_alpha=64.0).adapted(MODEL)
    assert (adapted.adapter_rank, adapted.adapter_scaling) == (128, 0.5)
