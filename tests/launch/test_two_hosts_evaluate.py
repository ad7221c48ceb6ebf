"""The paper's stage 1, shrunk, on two hosts: adapters, videos without lip truth, evaluations."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest

from jax_avatar import testing
from jax_avatar.data.records import finish_manifest, start_manifest, write_shard
from jax_avatar.data.toy import toy_clips
from jax_avatar.io.video import read_video
from jax_avatar.models.network import flatten
from jax_avatar.weights.files import load_weights
from jax_avatar.weights.folder import load_model, load_settings
from launch import prepare_data
from tests.launch.test_hosts import finish, free_port, start_command

TRAIN = """
import runpy
import sys

from jax_avatar.models import sharding

sharding.SMALL = 1  # every weight is cut
sys.argv = ["launch/train.py", *sys.argv[1:]]
runpy.run_path("launch/train.py", run_name="__main__")
"""


def save_videos(folder):
    """Clips as `prepare_data.py videos` makes them: of several lengths, nothing known of lips."""
    start_manifest(folder, {"config": {"made": "by a test"}})
    unknown = {"portrait": None, "lip_gap": None, "mouth_box": None, "pose": None, "units": None}
    for split, count in (("train", 3), ("held_out_person", 3)):
        drawn = toy_clips(split, count=count, size=64, num_frames=37)
        clips = [
            dataclasses.replace(clip, frames=clip.frames[: 37 - 4 * i], style="video", **unknown)
            for i, clip in enumerate(drawn)
        ]
        write_shard(folder / f"{split}-0.array_record", clips)
    finish_manifest(folder, {"config": {"made": "by a test"}})


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """Arguments of the shrunk preset, on a folder as a converted Wan-S2V has it."""
    folder = tmp_path_factory.mktemp("paper")
    model, data, latents = (str(folder / name) for name in ("model", "data", "latents"))
    testing.save_model(
        folder / "model", speech="wav2vec2", framepack=True, audio_window="whole",
        motion="still", pose="zeros", size=None, max_area=64 * 64,
    )  # fmt: skip
    settings = load_settings(model)
    assert settings.fps == 25 and settings.motion == "still"
    save_videos(folder / "data")
    encode = ["encode", "--data", data, "--model", model, "--out", latents]
    assert prepare_data.main(encode) in (0, None)
    size = {
        field.name: getattr(testing.NANO, field.name)
        for field in dataclasses.fields(testing.NANO)
        if "dtype" not in field.name
    }
    size |= {"framepack": False, "dtype": "float32", "param_dtype": "float32"}
    changes = {f"model.{name}": value for name, value in size.items()}
    changes |= {"weights.model": model, "weights.start": model, "data": data, "latents": latents}
    changes |= {"task.batch_size": 2, "task.latents": 6, "task.adapter_rank": 2}
    loop = {"num_steps": 3, "warmup_steps": 0, "log_every": 1, "evaluate_every": 2, "mesh": 2}
    loop |= {"evaluate_clips": 3, "validation_clips": 3, "learning_rate": 0.01}
    changes |= {f"loop.{name}": value for name, value in loop.items()}
    return [
        "--config=configs/diffusion_forcing.py:wan_s2v_14b",
        *(f"--config.{name}={value}" for name, value in changes.items()),
    ]


@pytest.mark.slow
def test_the_papers_stage_1_runs_through_its_first_evaluation_on_two_hosts(preset, tmp_path):
    port = free_port()
    finish(
        *(
            start_command(
                [sys.executable, "-c", TRAIN, *preset, f"--workdir={tmp_path}", "--hosts=2",
                 f"--host={host}", f"--coordinator=localhost:{port}"]
            )
            for host in (0, 1)
        ),
        timeout=2000,
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    scores = next(line for line in lines if "eval/motion" in line)
    assert scores["step"] == 2 and all(np.isfinite(value) for value in scores.values())
    kinds = {f"flow_bin{i}" for i in range(10)} | {"flow", "psnr", "psnr_above_still", "identity"}
    kinds |= {"motion", "flicker", "latent_jump"}
    found = {name for name in scores if name.startswith("eval/")}
    assert found == {f"eval/{prefix}{kind}" for prefix in ("", "raw/") for kind in kinds}
    assert scores["eval/flow"] != scores["eval/raw/flow"]
    for place in ("step_000002", "step_000002/raw"):
        frames, fps, *_ = read_video(tmp_path / "samples" / place / "2.mp4")
        assert frames.shape == (29, 64, 128, 3) and fps == 16

    made = load_model(tmp_path)
    assert made.settings.fps == made.speech.config.fps == 16 and made.settings.motion == "none"
    factors = flatten(load_weights(tmp_path, "lora")[0])
    assert any(np.abs(leaf).max() > 0 for path, leaf in factors.items() if path.endswith("/b"))
    assert jax.process_count() == 1
