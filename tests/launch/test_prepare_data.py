import importlib.util
from pathlib import Path

import numpy as np
import pytest

from jax_avatar import testing
from jax_avatar.data.latents import load_encoded
from jax_avatar.training.stages.flow import ForcingConfig, ForcingTask
from tests.data.test_encode import make_clip, write_data
from tests.prompts import save_text_encoder

SCRIPT = Path(__file__).parents[2] / "launch" / "prepare_data.py"


@pytest.fixture(scope="module")
def prepare():
    spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.mark.parametrize(
    "command", ["people", "portraits", "videos", "encode", "utterances", "motion"]
)
def test_every_command_explains_itself(prepare, capsys, command):
    with pytest.raises(SystemExit) as stopped:
        prepare([command, "--help"])
    assert stopped.value.code == 0 and "--out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("people --out {out} --clips_per_person 0", "clips_per_person 0: expected at least 1"),
        ("people --out {out} --cartoon_clips -1", "cartoon_clips -1: expected at least 0"),
        ("people --out {out} --seed -1", "seed -1: expected at least 0"),
        ("people --out {out} --movement -1", "movement -1.0: expected at least 0"),
        ("people --out {out} --fps 0", "fps 0: must divide"),
        ("people --out {out} --size 8*8", "size 8: expected 16 to 4096"),
        ("people --out {out} --workers 0", "--workers 0: expected at least 1"),
        ("portraits --out {out} --size 8*8", "--size 8*8: expected 16 to 4096"),
        ("people --out {out} --size 64*32", "--size 64*32: expected a square"),
        ("videos --src {src} --out {out} --size 0", "--size 0: expected HEIGHT*WIDTH"),
        ("portraits --out {file}", "File exists"),
        ("videos --src {src} --out {src}", "--out {src} is what --src reads"),
        ("videos --src {src} --out {out} --face_zoom -1", "face_zoom -1.0"),
        ("videos --src {src} --out {out} --filter .:a", "--filter .:a"),
        ("videos --src {src} --out {out} --filter os:name", "--filter os:name is not a function"),
        ("encode --data {src} --model m --out {src}", "--out {src} is what --data reads"),
        (
            "utterances --out {out} --flite 0 --hibari 0 --kokoro 0",
            "a synthesiser with more than 0 sentences",
        ),
        ("motion --utterances {src} --checkpoint m --out {src}", "is what --utterances reads"),
        ("motion --utterances {src} --checkpoint m --out {out} --hours 0", "hours 0.0"),
        (
            "motion --utterances {src} --checkpoint jax_avatar/assets/small --out {out}",
            "VAE of kind 'light', whose latents are pictures",
        ),
        ("stats {long}", "File name too long"),
    ],
)
def test_what_cannot_be_made_is_one_line(prepare, tmp_path, capsys, command, message):
    (tmp_path / "src").mkdir()
    (tmp_path / "file").touch()
    places = {name: str(tmp_path / name) for name in ("src", "file", "out")}
    places["long"] = "x" * 300
    assert prepare([word.format(**places) for word in command.split()]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and message.format(**places) in told[0], told
    assert not (tmp_path / "out").exists()


def test_an_interrupt_is_one_line(prepare, tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("jax_avatar.data.statistics.data_statistics", interrupted)
    assert prepare(["stats", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "stopped; repeat the command to go on.\n"


@pytest.fixture(scope="module")
def encoded(prepare, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoded")
    save_text_encoder(testing.save_model(folder / "model"))
    write_data(folder / "raw", [make_clip(i, length=14) for i in range(2)])
    command = ["encode", "--data", str(folder / "raw"), "--model", str(folder / "model")]
    command += ["--out", str(folder / "set"), "--phases", "2", "--negative_prompt", "café"]
    assert prepare(command) == 0
    return folder, command


def test_encoded_clips_train_the_model_whose_encoders_made_them(encoded):
    clips = load_encoded(encoded[0] / "set", "train")
    model = testing.NANO.replace(framepack=False)
    task = ForcingTask(model, ForcingConfig(batch_size=4, latents=3), clips)
    batch = task.batches(0)
    assert batch["latent"].shape == (4, 3, 4, 4, 4)
    assert batch["text"].shape == (4, 3, 4) and np.abs(batch["text"]).max(2).all(1).any()
    # The prompts of all clips say the same, the negative one something else.
    assert (batch["text"] == batch["text"][:1]).all()
    assert (batch["text"][0] != batch["null_text"][0]).any()
    assert sorted(r.first_frame for r in map(clips.records.__getitem__, range(4))) == [0, 0, 1, 1]


def test_repeating_the_command_changes_nothing(encoded, prepare):
    folder, command = encoded
    before = {path.name: path.read_bytes() for path in (folder / "set").iterdir()}
    assert prepare(command) == 0
    after = {path.name: path.read_bytes() for path in (folder / "set").iterdir()}
    before.pop("negative_prompt.safetensors"), after.pop("negative_prompt.safetensors")
    assert before == after


def test_mistakes_are_one_line(encoded, prepare, capsys):
    folder, command = encoded
    assert prepare([*command, "--phases", "3"]) == 2
    assert prepare(["encode", "--data", str(folder), "--model", "x", "--out", "y"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "phases 2 there, 3 now" in lines[0] and "config.json" in lines[-1]
