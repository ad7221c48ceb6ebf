"""From a download with the official names to a video, as an engineer does it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conversion import convert
from jax_avatar.io.video import read_video
from tests.conversion import official

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_converted_download_streams_over_five_slices(tmp_path):
    download = official.write_all(tmp_path / "ckpt")
    model, video = tmp_path / "model", tmp_path / "avatar.mp4"
    assert convert.main(["all", "--src", str(download), "--out", str(model), "--merge"]) == 0
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "launch" / "stream.py"), "--mesh=5", "--dtype=int8"),
            *(f"--checkpoint={model}", "--size=64*64", "--duration=0.5", f"--out={video}"),
        ],
        capture_output=True,
        text=True,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    frames = read_video(video)[0]
    assert frames.shape == (13, 64, 64, 3)
