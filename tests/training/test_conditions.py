"""What critic and teacher are asked, and how strongly adapters act."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_avatar.training import distillation
from jax_avatar.training.distill_state import DistillConfig, Told
from jax_avatar.training.distillation import Distiller
from jax_avatar.training.rollout import Generator, RolloutConfig
from jax_avatar.training.step import LoopConfig
from tests import nano

MODEL = nano.CONFIG.replace(framepack=False)
KEY = jax.random.key(4)


def asked_of(clips, told, monkeypatch):
    """All that networks are asked: which one, the noisy clip, its level, what it is told."""
    names, questions = [], []

    class Network:
        def __init__(self, graphdef, params):
            self.name = params

        def bidirectional(self, noisy, timestep, text, reference, motion, pose, features):
            names.append(self.name)
            questions.append((noisy, timestep, text, reference, features))
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


def test_adapters_are_scaled_by_alpha_over_rank():
    adapted = DistillConfig(adapter_rank=128, adapter_alpha=64.0).adapted(MODEL)
    assert (adapted.adapter_rank, adapted.adapter_scaling) == (128, 0.5)
