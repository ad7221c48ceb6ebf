"""What critic and teacher are asked, and how strongly adapters act."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_avatar.training import distillation
from jax_avatar.training.distill_state import DistillConfig, Told
from jax_avatar.training.distillation import Distiller
from jax_avatar.training.rollout import Generator, RolloutConfig
from jax_avatar.training.run.step import LoopConfig
from tests import nano

MODEL = nano.CONFIG.replace(framepack=False)
KEY = jax.random.key(4)


def asked_of(clips, told, monkeypatch):
    """All that networks are asked: which one, the noisy clip, its level, what it is told."""
    names, questions = [], []

    class Network:
        def __init__(self, graphdef, params):
            self.name = params

        def bidirectional(self, noisy, timestep, given):
            names.append(self.name)
            questions.append((noisy, timestep, given.text, given.reference, given.audio))
            return jnp.zeros_like(noisy)

    monkeypatch.setattr(distillation, "merge", Network)
    settings, loop = DistillConfig(guidance_scale=4.0, latents=3), LoopConfig(1, warmup_steps=0)
    made = Distiller(Generator(None, MODEL, RolloutConfig()), None, settings, loop)

    @jax.jit
    def ask(clips, told):
        made.generator_slope("critic", "teacher", clips, told, KEY)
        return questions

    return names, ask(clips, told)


def test_the_teacher_is_guided_away_from_silence_and_the_negative_prompt(monkeypatch):
    """The portrait stays; all are asked for the same noisy clip, at one level."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal((2, *shape)).astype(np.float32)

    clips, pose = normal(3, 4, 4, 4), normal(1, 4, 4, 4)
    text, null_text, reference, features = (
        normal(3, 4), normal(3, 4), normal(1, 4, 4, 4), normal(1, 12, 2, 6),
    )  # fmt: skip
    told = Told(text, null_text, reference, features, pose, np.arange(2))
    asked, questions = asked_of(clips, told, monkeypatch)
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
TOLD = Told(
    normal(8, 3, 4), normal(8, 3, 4, seed=1), normal(8, 1, 4, 4, 4), normal(8, 1, 12, 2, 6),
    normal(8, 1, 4, 4, 4, seed=1), np.arange(8),
)  # fmt: skip


def velocity_of(noisy, told):
    """A teacher in which prompt and speech act together, not one beside the other."""
    text, speech = (jnp.sin(x.reshape(8, -1).sum(1)) for x in (told.text, told.features))
    return noisy * (1 + text + speech + text * speech)[:, None, None, None, None]


def slope_of(monkeypatch, *, critic=velocity_of, asked=None, **settings):
    """Gradient in the clips with the toy teacher, and the noise level of every clip."""

    class Network:
        def __init__(self, graphdef, params):
            self.name = params

        def bidirectional(self, noisy, timestep, given):
            if asked is not None:
                jax.debug.callback(lambda: asked.append(self.name))
            told = dataclasses.replace(TOLD, text=given.text, features=given.audio)
            return (critic if self.name == "critic" else velocity_of)(noisy, told)

    monkeypatch.setattr(distillation, "merge", Network)
    config, loop = DistillConfig(latents=3, **settings), LoopConfig(1, warmup_steps=0)
    made = Distiller(Generator(None, MODEL, RolloutConfig()), None, config, loop)
    ask = jax.jit(lambda clips, told: made.generator_slope("critic", "teacher", clips, told, KEY))
    slope, metrics = ask(CLIPS, TOLD)
    jax.effects_barrier()
    return np.asarray(slope), np.asarray(metrics["scores"]["sigma"])


APART = {"guidance_scale": 5.0, "text_guidance_scale": 2.0}


def test_a_critic_that_is_the_teacher_guided_apart_leaves_no_gradient(monkeypatch):
    def guided(noisy, told):
        silent = dataclasses.replace(told, features=jnp.zeros_like(told.features))
        null = dataclasses.replace(silent, text=TOLD.null_text)
        full, silent, null = (velocity_of(noisy, told) for told in (told, silent, null))
        return null + 2 * (silent - null) + 5 * (full - silent)

    assert np.abs(slope_of(monkeypatch, critic=guided, **APART)[0]).max() < 1e-6
    for other in ({"guidance_scale": 5.0}, {**APART, "text_guidance_scale": 1.0}):
        assert np.abs(slope_of(monkeypatch, critic=guided, **other)[0]).max() > 1e-3


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_equal_scales_apart_are_the_standard_form(monkeypatch, scale):
    together, _ = slope_of(monkeypatch, guidance_scale=scale)
    apart, _ = slope_of(monkeypatch, guidance_scale=scale, text_guidance_scale=scale)
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
def test_the_teacher_is_not_asked_for_what_is_not_guided(monkeypatch, settings, forwards):
    asked = []
    slope_of(monkeypatch, asked=asked, **settings)
    assert asked.count("teacher") == forwards and asked.count("critic") == 1


def test_only_levels_within_the_band_are_guided(monkeypatch):
    plain, sigma = slope_of(monkeypatch, guidance_scale=1.0)
    guided, _ = slope_of(monkeypatch, **APART)
    low, high = np.sort(sigma)[[2, 5]].tolist()
    banded, _ = slope_of(monkeypatch, **APART, guidance_bounds=(low, high))
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
