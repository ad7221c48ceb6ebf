"""Every ablation changes what its name says, and nothing else."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import diffusion_forcing, dmd
from configs.ablations import ABLATIONS, INFERENCE, get_config
from jax_avatar.data.latents import random_clips
from jax_avatar.training.run.state import config_differences, start_state
from jax_avatar.training.run.step import make_optimiser
from jax_avatar.training.stages import build as stages
from launch.overrides import read_config

ROOT = Path(__file__).parents[2]
SIZES = ("tiny", "small", "wan_s2v_14b")
BLOCKS = {"model.frames_per_block", "model.ring_blocks"}
CHANGED = {
    "clean_history": {"rollout.refresh"},
    "fixed_history": {"rollout.refresh"},
    "kv_noise": {"rollout.kv_noise"},
    "algorithm_1": {"rollout.cache", "rollout.sampler", "rollout.gradient"},
    "exit_only": {"rollout.cache"},
    "renoise": {"rollout.sampler"},
    "window_3": {"model.ring_blocks"},
    "heard_clip": {"rollout.audio_context"},
    "sink_per_clip": {"rollout.sink_distance_per"},
    "no_shift": {"rollout.shift_max"},
    **{f"steps_{count}": {"rollout.sigmas"} for count in (4, 3, 2, 1)},
    **{
        f"levels_{name}": {"rollout.sigmas"}
        for name in ("self_forcing", "shift3", "paper_uniform", "released")
    },
    "block_1": BLOCKS,
    "block_2": BLOCKS | {"task.latents"},
    "block_4": BLOCKS | {"task.latents"},
    "guidance_1": {"task.guidance_scale"},
    "guidance_3": {"task.guidance_scale"},
    "guidance_6": {"task.guidance_scale"},
    "guidance_apart": {"task.guidance_scale", "task.text_guidance_scale"},
    "guidance_band": {"task.guidance_bounds"},
    "normalizer_block": {"task.normalizer"},
    "ratio_1": {"task.generator_every"},
    "adaptive_critic": {"task.max_critic_steps"},
    "slow_rates": {"loop.learning_rate", "task.critic_learning_rate"},
    "cosine": {"loop.schedule"},
    "no_average": {"loop.ema_decay"},
    "baseline": set(),
    "stage1_baseline": set(),
    "stage1_block_1": BLOCKS,
    "stage1_block_2": BLOCKS | {"task.latents"},
    "stage1_block_4": BLOCKS | {"task.latents"},
    "stage1_fast_rate": {"loop.learning_rate"},
    "stage1_gaussian_weight": {"task.weight"},
    "stage1_one_level": {"task.shared_share"},
    "stage1_sink_fixed": {"task.sink"},
    "stage1_no_shift": {"task.shift_max"},
    "stage1_no_dropout": {"task.audio_dropout", "task.text_dropout"},
    "stage1_window_3": {"model.ring_blocks"},
    "stage1_heard_clip": {"task.audio_context"},
    "stage1_scaffold": {"task.motion_frames", "model.framepack"},
}


def built(settings):
    """All settings of a run, defaults included."""
    stages.build_stage(settings)
    sections, loop = stages.read_sections(settings)
    return {name: dataclasses.asdict(part) for name, part in (sections | {"loop": loop}).items()}


def changed(name, size):
    stage = diffusion_forcing if name.startswith("stage1_") else dmd
    settings = get_config(f"{name},{size}").to_dict()
    assert settings["stage"] == stage.__name__.partition(".")[2]
    pairs = config_differences(built(stage.get_config(size).to_dict()), built(settings))
    return {pair.partition(":")[0]: pair.partition(": ")[2] for pair in pairs}


@pytest.mark.parametrize("size", SIZES)
def test_an_ablation_changes_what_its_name_says(size):
    """The paper's levels are Self-Forcing's; students of other blocks start from their stage 1."""
    assert set(CHANGED) == set(ABLATIONS)
    for name, expected in CHANGED.items():
        if size == "wan_s2v_14b" and name in ("steps_4", "levels_self_forcing", "window_3"):
            expected = expected & {"model.ring_blocks"}
        elif name.startswith("block_") and size != "tiny":
            expected = expected | {"weights.student"}
        if name.endswith("block_4") and size != "wan_s2v_14b":
            expected = expected - {"model.ring_blocks"}  # two blocks of 4 hold six latents, too
        assert set(changed(name, size)) == expected, name
    if size != "tiny":
        start = "runs/diffusion_forcing -> runs/stage1_block_2"
        assert changed("block_2", size)["weights.student"] == start


@pytest.mark.parametrize(
    ("size", "block", "ring", "latents"),
    [("wan_s2v_14b", 1, 13, 21), ("wan_s2v_14b", 2, 7, 20), ("wan_s2v_14b", 4, 4, 20),
     ("small", 1, 7, 9), ("small", 2, 4, 8), ("small", 4, 3, 8)],
)  # fmt: skip
def test_the_window_follows_the_block(size, block, ring, latents):
    """12 past latents in the paper's size and 6 in the small one, rounded up to whole blocks."""
    for name in (f"block_{block}", f"stage1_block_{block}"):
        settings = get_config(f"{name},{size}")
        assert (settings.model.ring_blocks, settings.task.latents) == (ring, latents)


def test_values_are_those_of_the_papers():
    def rollout(name):
        sections, _ = stages.read_sections(get_config(f"{name},wan_s2v_14b").to_dict())
        return sections["rollout"]

    assert rollout("fixed_history").refresh_sigma == 0.557
    for count, levels in ((3, (1000, 909.09, 714.29)), (2, (1000, 833.33)), (1, (1000,))):
        found = [1000 * sigma for sigma in rollout(f"steps_{count}").sigmas]
        assert found == pytest.approx([*levels, 0], abs=0.01)
    stage1 = get_config("stage1_fast_rate,wan_s2v_14b")
    assert stage1.loop.learning_rate == pytest.approx(5e-5)
    slow = get_config("slow_rates,wan_s2v_14b")
    rates = (slow.loop.learning_rate, slow.task.critic_learning_rate)
    assert rates == pytest.approx((2e-6, 4e-7))


def test_an_ablation_of_inference_names_the_command_that_sets_it():
    for name, command in INFERENCE.items():
        with pytest.raises(ValueError, match="trains nothing; run: ") as error:
            get_config(f"{name},tiny")
        assert command in str(error.value)
        assert (ROOT / command.split()[1]).is_file()
    assert not set(INFERENCE) & set(ABLATIONS)


def test_the_command_line_names_ablations():
    settings = read_config("configs/ablations.py:steps_2,tiny", {"loop.num_steps": "7"})
    assert settings["rollout"]["sigmas"] == "self_forcing:2" and settings["loop"]["num_steps"] == 7
    assert read_config("configs/ablations.py", {}) == get_config("baseline,small").to_dict()
    with pytest.raises(ValueError, match=r"'clean_hystory' is unknown; .* mean clean_history\?"):
        read_config("configs/ablations.py:clean_hystory", {})
    with pytest.raises(ValueError, match=r"size 'tinny' is unknown; .* mean :tiny\?"):
        read_config("configs/ablations.py:clean_history,tinny", {})


def make_task(monkeypatch, name):
    clips = random_clips(4, 31, (12, 12), 32, (5, 96))  # long enough for a scaffold
    monkeypatch.setattr(stages, "load_latents", lambda settings, split: clips)
    build, loop = stages.build_stage(get_config(f"{name},tiny").to_dict())
    return build(), loop


@pytest.mark.parametrize("name", ["block_1", "algorithm_1", "stage1_block_4"])
def test_the_task_of_an_ablation_is_built(monkeypatch, name):
    task, _ = make_task(monkeypatch, name)
    assert task.name == ("diffusion_forcing" if name.startswith("stage1_") else "dmd")
    assert set(task.batches(0)) >= ({"latent"} if name.startswith("stage1_") else {"critic"})


def test_levels_below_those_of_the_small_network_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"rollout\.sigmas asks PortraitDiT .* from 0\.1 up"):
        make_task(monkeypatch, "levels_released")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ABLATIONS if name != "levels_released"])
def test_an_ablation_makes_a_step(monkeypatch, name):
    task, loop = make_task(monkeypatch, name)
    loop = dataclasses.replace(loop, mesh="1", warmup_steps=0)
    mesh = task.mesh(loop)
    if name.startswith("stage1_"):
        state = start_state(task.init(jax.random.key(0)), make_optimiser(loop))
        trained = "params"
    else:
        task.settings = dataclasses.replace(task.settings, generator_every=1)
        state, trained = task.start(loop, jax.random.key(0)), "generator"
    before = jax.device_get(getattr(state, trained))
    after, metrics = task.make_step(loop, mesh)(state, task.batches(0), jax.random.key(1))
    assert int(after.step) == 1 and not int(after.guard.total) and np.isfinite(metrics["loss"])
    pairs = zip(*map(jax.tree.leaves, (before, getattr(after, trained))), strict=True)
    assert any(np.any(a != b) for a, b in pairs)
