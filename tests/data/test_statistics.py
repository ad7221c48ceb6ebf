"""What is told of a prepared data set is what is in it."""

import json
import sys

import numpy as np
import pytest

from jax_avatar.data.statistics import data_statistics, statistics_table
from launch.prepare_data import main
from tests.data.test_encode import make_clip, write_data
from tests.data.test_encoded import make_clip as make_encoded
from tests.data.test_encoded import write_set

TONE = np.round(16384 * np.sqrt(2) * np.sin(np.arange(32_000) * 0.3)).astype(np.int16)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    clips = [make_clip(0, wave=TONE, voice="a"), make_clip(1, length=29, voice="b", caption="hi")]
    clips += [make_clip(1, split="held_out_person", voice="b", wave=0 * TONE)]
    return write_data(tmp_path_factory.mktemp("raw"), clips)


def test_raw_clips_are_counted_and_measured(raw):
    found = data_statistics(raw)
    assert (found["kind"], found["complete"], found["clips"]) == ("raw", True, 3)
    assert found["splits"] == {"train": 2, "held_out_person": 1}
    assert found["counts"]["voice"] == {"b": 2, "a": 1}
    assert found["counts"]["people"] == {"with most clips": 2, "different": 2}
    assert found["counts"]["caption"] == {"no": 2, "yes": 1}
    assert found["counts"]["size"] == {"32x32": 3} and found["counts"]["fps"] == {"16": 3}
    durations = found["quantiles"]["duration_s"]
    assert (durations["least"], durations["most"]) == (0.8125, 1.8125)
    level = found["quantiles"]["level_dbfs"]
    assert level["most"] == pytest.approx(-6.02, abs=0.05) and level["least"] == -120
    assert found["quantiles"]["lip_gap"]["least"] == 6


def test_a_sample_counts_all_clips_and_opens_some(raw):
    found = data_statistics(raw, sample=2)
    assert found["clips"] == 3 and found["opened"] == 2
    assert sum(found["counts"]["fps"].values()) == 2
    assert found["counts"]["caption"] == {"no": 2}  # the first clip and the last


def test_encoded_clips_are_counted_and_measured(tmp_path):
    index = write_set(tmp_path, [make_encoded(i, latents=5 + i) for i in range(3)])
    found = data_statistics(tmp_path)
    assert (found["kind"], found["hash"], found["clips"]) == ("encoded", index["hash"], 3)
    assert found["counts"]["latents"] == {"2x2": 3}
    assert found["quantiles"]["duration_s"]["median"] == 21 / 16
    assert "faces" in found["missing"] and "rejected" not in found


def test_what_cannot_be_measured_here_is_named(raw, monkeypatch):
    for name in ("webrtcvad", "cv2"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "jax_avatar.data.videos.faces", raising=False)
    found = data_statistics(raw)
    assert {"speech_share", "faces", "languages"} == found["missing"].keys()
    assert "speech_share" not in found["quantiles"]
    assert "not measured: faces" in statistics_table(found)


def test_the_command_prints_a_table_and_writes_json(raw, tmp_path, capsys):
    out = tmp_path / "figures.json"
    assert main(["stats", str(raw), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "3 clips, raw, complete" in printed and "duration_s" in printed
    assert json.loads(out.read_text()) == json.loads(json.dumps(data_statistics(raw)))
    assert main(["stats", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert main(["stats", str(raw), "--sample", "0"]) == 2
