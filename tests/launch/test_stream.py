"""The command as a user runs it, with a nano model."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jax_avatar.io.video import VideoWriter, read_video
from jax_avatar.testing import save_model
from tests.launch.one_process import refusals
from tests.prompts import save_text_encoder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "model")
    save_model(folder / "by_face", framing="face")
    portrait = Image.open(ROOT / "jax_avatar" / "assets" / "portraits" / "amara.png")
    portrait.convert("RGB").resize((100, 100)).crop((0, 5, 100, 85)).save(folder / "face.png")
    speech = 0.1 * np.random.default_rng(1).normal(size=32_000).astype(np.float32)
    with VideoWriter(folder / "speech.mp4", 32, 32, 16, 16_000) as writer:
        writer.write_audio(speech)
        writer.write_frames(np.zeros((32, 32, 32, 3), np.uint8))
    return folder


def command(inputs, *flags, out="out.mp4", audio="speech.mp4"):
    return [
        sys.executable,
        str(ROOT / "launch" / "stream.py"),
        f"--checkpoint={inputs / 'model'}",
        f"--image={inputs / 'face.png'}",
        f"--audio={inputs / audio if audio != '-' else '-'}",
        f"--out={inputs / out}",
        *flags,
    ]


def environment():
    drop = {"XLA_FLAGS"}  # the command makes its own fake devices
    kept = {key: value for key, value in os.environ.items() if key not in drop}
    cache = os.environ.get("JAX_CACHE_DIR", str(ROOT / ".jax_cache"))
    return kept | {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PLATFORMS": "cpu"}


def run(inputs, *flags, data=None, **options):
    return subprocess.run(
        command(inputs, *flags, **options),
        input=data,
        capture_output=True,
        env=environment(),
        timeout=500,
    )


def test_five_slices_make_a_video_with_sound_and_a_report(inputs):
    done = run(inputs, "--mesh=5", "--json")
    assert done.returncode == 0, done.stderr.decode()
    frames, fps, sound, rate = read_video(inputs / "out.mp4")
    assert frames.shape[1:] == (64, 64, 3) and abs(len(frames) / fps - 2.0) <= 1 / fps + 0.07
    assert np.abs(sound).max() > 0.05 and abs(len(sound) / rate - len(frames) / fps) < 0.1
    report = json.loads(done.stdout)
    assert report["frames"] == len(frames) and report["mesh"] == "5" and report["is_complete"]
    assert report["real_time_factor"] > 0 and report["time_to_first_frame_s"] > 0
    assert b"real time" in done.stderr
    check = [sys.executable, str(ROOT / "launch" / "check_video.py"), "--json"]
    done = subprocess.run([*check, str(inputs / "out.mp4")], capture_output=True, timeout=100)
    marks = json.loads(done.stdout)
    assert marks["says_generated"], done.stderr.decode()
    assert marks["manifest"]["validation_state"] == "Valid"


def test_raw_pcm_on_standard_input_a_duration_and_the_full_picture(inputs):
    data = (3000 * np.random.default_rng(2).normal(size=8000)).astype("<i2").tobytes()
    full = ["--frame=full", f"--checkpoint={inputs / 'by_face'}"]
    done = run(inputs, "--mesh=1", "--duration=1.5", *full, data=data, audio="-", out="pipe.mp4")
    assert done.returncode == 0, done.stderr.decode()
    frames = read_video(inputs / "pipe.mp4")[0].astype(int)
    assert frames.shape == (24, 80, 100, 3)
    picture = np.asarray(Image.open(inputs / "face.png")).astype(int)
    moved = np.abs(frames[4] - picture).mean(-1) > 20
    assert moved[35:45, 40:60].mean() > 0.5 and moved[:, :4].mean() < 0.01


@pytest.fixture(scope="module")
def prompted(inputs):
    folder = shutil.copytree(inputs / "model", inputs / "prompted")
    return f"--checkpoint={save_text_encoder(folder)}"


def test_what_becomes_of_a_prompt_and_a_portrait_without_a_face_are_told(inputs, prompted):
    # Prompts come before the audio, so that a run without audio shows it.
    Image.new("RGB", (100, 80), (90, 110, 90)).save(inputs / "green.png")
    lines = [
        command(inputs, *flags, audio="gone.wav")[2:]
        for flags in (
            ("--prompt=A man speaks.", f"--image={inputs / 'green.png'}"),
            (prompted,),
        )
    ]
    (_, plain), (_, with_encoder) = refusals("launch.stream", lines, environment())
    assert "warning: " in plain and "green.png: no face was found in it" in plain
    assert "has no prompt encoder; --prompt is not used" in plain
    assert "describe the scene with --prompt" in with_encoder


def test_a_prompt_is_encoded_once_and_kept(inputs, prompted):
    cache = inputs / "prompts"
    options = ["--mesh=1", "--duration=0.5", prompted, f"--prompt_cache={cache}"]
    done = run(inputs, *options, "--prompt=A man speaks.")
    assert done.returncode == 0 and b"warning" not in done.stderr, done.stderr.decode()
    (entry,) = cache.iterdir()
    written = entry.stat().st_mtime_ns
    done = run(inputs, *options, "--prompt= A  man speaks. ", audio="gone.wav")
    assert b"gone.wav does not exist" in done.stderr and list(cache.iterdir()) == [entry]
    assert entry.stat().st_mtime_ns == written


def test_an_interrupt_leaves_a_playable_file(inputs):
    process = subprocess.Popen(
        command(inputs, "--mesh=1", audio="-", out="cut.mp4"),
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        # Shells start background jobs with interrupts ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    process.stdin.write((3000 * np.ones(48_000)).astype("<i2").tobytes())
    process.stdin.flush()
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if any(part.stat().st_size > 2000 for part in inputs.glob("cut.part-*.mp4")):
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors.decode()
    assert b"stopped before the end" in errors
    assert len(read_video(inputs / "cut.mp4")[0]) > 0


def test_what_makes_no_video_is_refused_with_one_clear_line(inputs):
    (inputs / "link.mp4").symlink_to(inputs / "speech.mp4")
    os.link(inputs / "speech.mp4", inputs / "hard.mp4")
    os.link(inputs / "face.png", inputs / "face.mp4")
    Image.new("RGB", (100, 80), (90, 110, 90)).save(inputs / "bare.png")
    wanted, faces = f"--out={inputs / 'new.mp4'}", f"--checkpoint={inputs / 'by_face'}"
    image, audio = f"--image={inputs / 'face.png'}", f"--audio={inputs / 'speech.mp4'}"
    cases = [
        *[([wanted, f"--duration={x}"], f"--duration {y}: expected") for x, y in (
            ("inf", "inf"), ("nan", "nan"), ("-inf", "-inf"), ("1e-9", "1e-09"), ("0", "0.0"),
            ("-1", "-1.0"), ("1e300", "1e+300"))],
        ([wanted, "--size=0*0"], "--size 0*0: expected HEIGHT*WIDTH"),
        ([wanted, "--size=-64*-64"], "--size -64*-64: expected"),
        *[([audio, f"--out={inputs / x}"], f"{x} is what --audio reads") for x in (
            "speech.mp4", "link.mp4", "hard.mp4", "model/../speech.mp4")],
        ([image, f"--out={inputs / 'face.mp4'}"], "is what --image reads"),
        ([f"--out={inputs / 'model' / 'a.mp4'}"], "lies in what --checkpoint reads"),
        *[([image, audio, wanted, *flags], message) for flags, message in (
            (["--mesh=7"], "--mesh 7: 4 timesteps"),
            (["--image=gone.png"], "gone.png does not exist"),
            (["--face=1"], "only with one that frames by the face"),
            ([faces, "--face=2"], "face.png shows 1 face, numbered from left to right; face 2"),
            ([faces, f"--image={inputs / 'bare.png'}"], "bare.png: no face was found"),
            (["--size=640*480"], "this model makes 64*64 only"),
            (["--audio=gone.wav"], "gone.wav does not exist"),
            (["--out=film.avi"], "ending in .mp4"),
            (["--c2pa_cert=cert.pem"], "both or neither"),
            (["--force_sampler", "--config=configs/stream.py", "--config.stream.refresh=clean"],
             "TPP"))],
    ]  # fmt: skip
    model = f"--checkpoint={inputs / 'model'}"
    lines = [[model, *argv] for argv, _ in cases]
    answers = refusals("launch.stream", lines, environment())
    for (argv, message), (code, said) in zip(cases, answers, strict=True):
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(errors) == 1 and message in errors[0], (argv, said)
    assert not (inputs / "new.mp4").exists()
