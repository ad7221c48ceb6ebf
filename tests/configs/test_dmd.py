import pytest

from configs import dmd
from jax_avatar.training.distillation import DistillConfig
from jax_avatar.training.distillation_task import DistillTask
from jax_avatar.training.loop import LoopConfig
from jax_avatar.training.rollout import RolloutConfig
from jax_avatar.training.stages import build_stage
from jax_avatar.training.state import build_section


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_a_size_is_a_stage(size):
    build, loop = build_stage(dmd.get_config(size).to_dict())
    assert loop.betas == (0.0, 0.999)
    if size == "tiny":
        task = build()
        assert isinstance(task, DistillTask)
        told = task.batches(4)["generator"]
        assert told.reference.shape == (2, 1, 12, 12, 32)
        assert told.features.shape == (2, 1, 36, 5, 96)


def test_the_published_values_are_the_papers():
    settings = dmd.get_config("wan_s2v_14b").to_dict()
    rollout = build_section(RolloutConfig, settings["rollout"], "rollout")
    task = build_section(DistillConfig, settings["task"], "task")
    loop = build_section(LoopConfig, settings["loop"], "loop")
    assert [round(1000 * sigma, 3) for sigma in rollout.sigmas] == [1000, 937.5, 833.333, 625, 0]
    assert (rollout.refresh, rollout.cache, rollout.gradient) == ("none", "per_step", "blocks")
    assert (task.generator_every, task.guidance_scale, task.adapter_scaling) == (5, 4.0, 0.5)
    assert (loop.learning_rate, task.critic_learning_rate) == (1e-5, 2e-6)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"write dmd\.py:tiny"):
        dmd.get_config("huge")
    settings = dmd.get_config("tiny").to_dict()
    settings["rollout"]["shift_mx"] = 3
    with pytest.raises(ValueError, match=r"config\.rollout\.shift_mx.*'shift_max'"):
        build_stage(settings)
    with pytest.raises(ValueError, match="models/wan_s2v_14b holds no weights of 'dit'"):
        build_stage(dmd.get_config("wan_s2v_14b").to_dict())
