"""Every stage at every size, and the mistakes that can be made with them."""

import importlib

import pytest

from configs.sizes import PAPER_MODEL
from jax_avatar.data.latents import random_clips
from jax_avatar.models.config import wan_s2v_14b
from jax_avatar.models.dit import DiT
from jax_avatar.models.portrait_dit import PortraitDiT
from jax_avatar.training.distillation import check_levels
from jax_avatar.training.stages import build as stages
from jax_avatar.training.stages.build import build_stage, load_latents, read_sections

SIZES = {
    "speech": ("tiny", "small"),
    "vae": ("tiny", "small"),
    "anchored_vae": ("tiny", "small"),
    "teacher": ("tiny", "small", "wan_s2v_14b"),
    "diffusion_forcing": ("tiny", "small", "wan_s2v_14b"),
    "dmd": ("tiny", "small", "wan_s2v_14b"),
}
FLOWS = ("teacher", "diffusion_forcing", "dmd")
ALL = [(stage, size) for stage, sizes in SIZES.items() for size in sizes]


def get(stage, *size):
    return importlib.import_module(f"configs.{stage}").get_config(*size).to_dict()


@pytest.mark.parametrize(("stage", "size"), ALL)
def test_a_size_is_a_stage(stage, size):
    settings = get(stage, size)
    sections, loop = read_sections(settings)
    assert settings["stage"] == stage and loop.num_steps > loop.warmup_steps
    if size == "wan_s2v_14b":
        expected = wan_s2v_14b(half_rotary=True, ring_blocks=5, framepack=False, rematerialise=True)
        assert sections["model"] == expected
    if size == "tiny":
        assert loop.num_steps <= 20 and not settings.get("data")


@pytest.mark.parametrize(("stage", "size"), [pair for pair in ALL if pair[0] in FLOWS])
def test_no_size_asks_for_levels_below_those_of_its_network(stage, size):
    sections, _ = read_sections(get(stage, size))
    network, task = DiT if size == "wan_s2v_14b" else PortraitDiT, sections["task"]
    if stage == "dmd":
        check_levels(network, sections["rollout"], task)
    else:
        network.check_level("task.smallest_sigma", task.smallest_sigma)


@pytest.mark.parametrize("stage", SIZES)
def test_small_is_what_comes_without_a_size(stage):
    assert get(stage) == get(stage, "small")


def test_stages_of_a_size_have_the_same_transformer():
    for size in ("tiny", "small", "wan_s2v_14b"):
        stages = ("teacher", "diffusion_forcing", "dmd")
        models = [read_sections(get(stage, size))[0]["model"] for stage in stages]
        assert len({model.replace(unroll=1) for model in models}) == 1


def test_the_published_values_are_the_papers():
    sections, loop = read_sections(get("diffusion_forcing", "wan_s2v_14b"))
    task = sections["task"]
    assert (loop.learning_rate, loop.betas, loop.num_steps) == (1e-5, (0.9, 0.999), 25_000)
    assert (loop.warmup_steps, loop.max_grad_norm, loop.schedule) == (500, 1.0, "constant")
    assert (task.shift, task.shared_share, task.smallest_sigma) == (5.0, 0.0, 0.0)
    assert (task.weight, task.sink, task.form) == ("uniform", "follow", "block_causal")
    assert (task.shift_max, task.reference_frames) == (1003, (22, 30))
    assert (task.audio_dropout, task.text_dropout) == (0.15, 0.1)
    student = read_sections(get("dmd", "wan_s2v_14b"))[0]["task"]  # goes on with the adapter
    assert (student.generator_every, student.max_critic_steps) == (5, 1)
    assert task.adapter_fields == student.adapter_fields == {"rank": 128, "scaling": 0.5}
    sections, loop = read_sections(get("teacher", "wan_s2v_14b"))
    task = sections["task"]
    assert (loop.learning_rate, loop.betas, loop.warmup_steps) == (1e-4, (0.9, 0.95), 1000)
    assert (task.form, task.shift, task.shared_share) == ("bidirectional", 3.0, 1.0)
    assert (task.weight, task.reference_dropout, loop.ema_decay) == ("uniform", 0.05, 0.999)


def test_the_motion_packer_is_there_where_motion_frames_are():
    settings = get("diffusion_forcing", "wan_s2v_14b")
    settings["task"]["motion_frames"] = "scaffold"
    assert read_sections(settings)[0]["model"].framepack
    settings["model"]["framepack"] = False  # as told, which the task refuses
    assert not read_sections(settings)[0]["model"].framepack


def test_an_unknown_size_names_the_nearest():
    with pytest.raises(ValueError, match=r"'tiney' is unknown; write dmd\.py:tiny.*mean :tiny"):
        get("dmd", "tiney")
    with pytest.raises(ValueError, match=r"write vae\.py:tiny, vae\.py:small"):
        get("vae", "wan_s2v_14b")


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("task", "audio_dropot", 0.1, r"config\.task\.audio_dropot.*'audio_dropout'"),
        ("task", "audio_dropout", 2.0, r"task\.audio_dropout 2\.0 must be within 0\.\.1"),
        ("task", "form", "causal", r"task\.form 'causal' must be one of block_causal"),
        ("task", "adapter_rank", 4, r"task\.adapter_rank=4 .*config\.weights\.start is empty"),
        ("task", "adapter_rank", -1, r"task\.adapter_rank -1 must be 0 \(none\) or more"),
        ("task", "shift_max", 2040, r"task\.shift_max 2040 must be within 0\.\."),
        ("loop", "num_steps", 1.5, r"config\.loop\.num_steps: 1\.5 came, expected.*int"),
        ("weights", "strat", "", r"config\.weights\.strat.*'start'"),
        ("model", "num_heads", 5, "head size"),
        ("sampler", "steps", 3, r"config\.sampler\.steps.*'num_steps'"),
    ],
)
def test_a_mistake_is_named(section, key, value, message):
    settings = get("teacher", "tiny")
    settings[section][key] = value
    with pytest.raises(ValueError, match=message):
        build_stage(settings)


def test_a_misspelt_or_missing_section_is_named():
    settings = get("dmd", "tiny")
    settings["rolout"] = settings.pop("rollout")
    with pytest.raises(ValueError, match=r"config\.rolout is unknown.*'rollout'"):
        build_stage(settings)
    settings = get("dmd", "tiny")
    del settings["rollout"]
    with pytest.raises(ValueError, match=r"config\.rollout is missing in stage dmd"):
        build_stage(settings)


@pytest.mark.parametrize(
    ("stage", "task", "expected"),
    [
        ("diffusion_forcing", {"audio_context": "clip"}, {"audio_context": "clip"}),
        (
            "diffusion_forcing",
            {"motion_frames": "scaffold"},
            {"audio_context": "block_reset", "motion": "still"},
        ),
        ("teacher", {"audio_context": "clip"}, {}),
    ],
)
def test_what_a_block_heard_goes_with_a_model_that_streams(stage, task, expected, monkeypatch):
    settings, written = get(stage, "tiny"), {}
    settings["task"] |= task
    model = read_sections(settings)[0]["model"]
    states = (model.audio_layers, model.audio_width)
    clips = random_clips(2, 28, (12, 12), model.latent_channels, states)
    monkeypatch.setattr(stages, "load_latents", lambda *_: clips)
    monkeypatch.setattr(stages, "export_model", lambda *_, **options: written.update(options))
    build_stage(settings)[0]().export({}, "", {})
    assert written["stream"] == {"fps": 16, "size": [96, 96], **expected}


def test_large_networks_want_large_batches():
    settings = get("dmd", "wan_s2v_14b")
    settings["task"]["batch_size"] = 8
    with pytest.raises(ValueError, match=r"task\.batch_size 8: distilling 14\..*--small_batch"):
        build_stage(settings)
    build_stage(settings, small_batch=True)
    build_stage(get("dmd", "small"))


def test_missing_weights_and_data_are_named(tmp_path):
    settings = get("diffusion_forcing", "tiny")
    build = build_stage(settings | {"weights": {**settings["weights"], "model": PAPER_MODEL}})[0]
    with pytest.raises(ValueError, match=r"models/wan_s2v_14b.*config\.json"):
        build()
    settings |= {"data": str(tmp_path / "people"), "latents": str(tmp_path / "latents")}
    with pytest.raises(ValueError, match=r"does not exist; expected a folder.*prepare_data\.py"):
        build_stage(settings)[0]()
    with pytest.raises(ValueError, match=r"config\.latents is empty"):
        load_latents({**settings, "latents": ""}, "train")
