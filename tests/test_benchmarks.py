"""Each benchmark runs at nano size and says what it promises."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    common,
    curves,
    dit_step,
    live,
    loader,
    long_stream,
    overlap,
    phone_timing,
    stream,
)
from benchmarks.gpu import small_128
from configs.sizes import SMALL_MODEL
from jax_avatar.data.talking_people import voices
from jax_avatar.layout import parse_layout
from jax_avatar.models.dit import DiT
from jax_avatar.streaming.session import AvatarSession
from jax_avatar.testing import NANO
from jax_avatar.training.stages.build import read_sections

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return common.open_model(None, "nano", tmp_path_factory.mktemp("nano"))


@pytest.fixture(scope="module")
def voice():
    return np.random.default_rng(0).uniform(-0.1, 0.1, 16_000).astype(np.float32)


def is_timing(value):
    return value["count"] > 0 and 0 < value["median_ms"] <= value["p95_ms"]


def test_quantiles_and_slope_are_those_of_the_numbers():
    result = common.quantiles([0.001 * n for n in range(1, 102)])
    assert result == {"median_ms": 51.0, "p95_ms": 96.0, "count": 101}
    assert common.quantiles([])["median_ms"] is None
    assert common.slope([0, 1, 2], [5, 7, 9]) == pytest.approx(2)


def test_memory_has_a_slope_after_it_has_warmed_up():
    """Caches fill in the first third; later a jump, and noise, are no growth."""
    seconds = np.arange(0, 1800.0)
    filling = 1000 + 300 * np.minimum(seconds / 500, 1)
    noise = np.random.default_rng(0).normal(size=1800) + 50 * (seconds == 1200)
    flat = live.growth(seconds, filling + noise)
    assert abs(flat["slope_per_hour"]) < 1 and flat["least"] > 1290 and flat["minutes"] == 20
    leaking = live.growth(seconds, filling + noise + 0.01 * seconds)
    assert leaking["slope_per_hour"] == pytest.approx(36, abs=1)
    assert live.growth(seconds[:600], filling[:600])["slope_per_hour"] is None


def test_a_record_names_its_surroundings_and_is_one_line(tmp_path, capsys):
    record = common.emit({"benchmark": "x", **common.environment()}, tmp_path / "x.json")
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and json.loads(printed) == record
    assert json.loads((tmp_path / "x.json").read_text()) == record
    assert record["cpus"] >= 1 and record["device"] and record["command"]
    assert {"jax", "flax", "python"} <= set(record["versions"])
    assert record["commit"] is None or re.fullmatch(r"[0-9a-f]{12}\+?", record["commit"])


def test_curves_of_a_run_are_drawn_from_its_log(tmp_path):
    lines = [{"step": n, "loss": 1 / n} | ({"eval/lip_r": 0.5} if n == 4 else {}) for n in (2, 4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert curves.series(curves.read_metrics(tmp_path), "loss") == ([2, 4], [0.5, 0.25])
    assert curves.series(lines, "eval/lip_r") == ([4], [0.5])
    curves.main([str(tmp_path), str(tmp_path / "metrics.jsonl"), "--out", str(tmp_path / "a.png")])
    panel = curves.draw([tmp_path], tmp_path / "b.png", clips_per_step=4).axes[0]
    assert list(panel.lines[0].get_xdata()) == [8, 16]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(FileNotFoundError, match="holds no metrics"):
        curves.read_metrics(tmp_path / "nothing")


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(ValueError, match="--nano"):
        common.open_model(tmp_path, None, tmp_path)


def test_stream_times_every_part_and_the_whole(model, voice):
    result = stream.run(model, "1", voice, seconds=4.5, repeats=3, progress=False)
    parts, whole = result["parts"], result["stream"]
    for part in (parts["speech"], parts["step"], parts["vae"], parts["block_of_all_steps"]):
        assert is_timing(part)
    assert [s["sigma"] for s in parts["steps"]] == list(model.settings.sigmas[:-1])
    assert all(is_timing(s) and s["count"] == 3 for s in parts["steps"])
    assert all(is_timing(whole[name]) for name in ("dispatch", "push", "block_latency"))
    assert whole["frames"] == 72 and whole["video_s"] == 4.5
    assert whole["fps"] == pytest.approx(16 * whole["real_time_factor"], rel=0.01)
    assert 0 < whole["ttff_s"] <= whole["wall_s"]
    assert whole["audio_before_first_frame_s"] == 0.75
    assert result["warm_up_s"] > 0 and result["dtype"] == "float32"


def test_long_stream_reports_growth_and_drift(model, voice):
    session = AvatarSession(model, common.random_portrait(model), parse_layout("1", 4))
    features = long_stream.speech_features(model, voice)
    result = long_stream.run(session, features, 30, 3, decode_all=False, progress=False)
    assert result["blocks"] == 40 and result["video_s"] == 30 and result["finite"]
    memory = result["memory"]
    assert memory["live_arrays_at_the_end"] == memory["live_arrays_after_a_tenth"]
    assert memory["first_mib"] > 10 and np.isfinite(memory["slope_mib_per_1000_blocks"])
    assert is_timing(result["block_latency"]["first_tenth"])
    assert is_timing(result["block_latency"]["last_tenth"])
    windows = result["drift"]["windows"]
    assert [w["start_s"] for w in windows.values()] == [0, 9, 18, 27]
    for window in windows.values():
        assert len(window["colour_mean"]) == 3 and window["latent_std"] > 0


@pytest.mark.slow
def test_scored_windows_are_decoded_as_in_a_whole_stream(model, voice):
    scored, whole = (
        long_stream.run(
            AvatarSession(model, common.random_portrait(model), parse_layout("1", 4)),
            long_stream.speech_features(model, voice),
            *(30, 3, decode_all, False),
        )["drift"]["windows"]
        for decode_all in (False, True)
    )
    for name, window in scored.items():
        for key, value in window.items():
            np.testing.assert_allclose(value, whole[name][key], atol=2e-5, err_msg=name)


def test_speech_of_a_repeating_voice_is_that_of_the_encoder(model, voice):
    features = long_stream.speech_features(model, voice)
    got = np.concatenate([next(features) for _ in range(3)], axis=2)
    network = model.speech.bind()
    whole = network.encode(jnp.asarray(np.tile(voice, 3)[None, None]), 36)
    np.testing.assert_allclose(got, whole, atol=1e-4)


@pytest.mark.slow
def test_overlap_gives_a_ratio_of_the_same_latents():
    config = overlap.mid_size(64, 1)
    rounds = {
        kind: [overlap.one_round(overlap.make_stream(kind, config, 8), 6)] for kind in overlap.CORES
    }
    result = overlap.summary(rounds, 6)
    assert result["same_latents"] and result["ratio"] > 0
    assert result["ideal_ratio"] == pytest.approx(12 / 7, abs=1e-3)
    assert result["sequential"]["block_ms"] > 0 and result["pipelined"]["cores_used"] > 0


def test_the_ratio_is_that_of_rounds_in_turn():
    one = {"wall_s": 3.0, "cpu_s": 3.0, "checksum": 1.0}
    two = {"wall_s": 1.5, "cpu_s": 3.0, "checksum": 1.0}
    result = overlap.summary({"sequential": [one], "pipelined": [two]}, 4)
    assert result["ratio"] == 2.0 and result["pipelined"]["cores_used"] == 2.0
    changed = overlap.summary({"sequential": [one], "pipelined": [two | {"checksum": 2.0}]}, 4)
    assert not changed["same_latents"]


@pytest.mark.slow
def test_overlap_runs_in_processes_of_its_own():
    command = [sys.executable, "benchmarks/overlap.py", "--width=64", "--layers=1", "--rounds=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    record = json.loads(done.stdout)
    assert record["workers"]["sequential"]["devices"] == 1
    assert record["workers"]["pipelined"]["devices"] == 2
    assert record["same_latents"]


def test_a_step_is_timed_and_its_arithmetic_counted():
    result = dit_step.run(DiT, NANO.replace(framepack=False), "64*64", 3)
    assert is_timing(result["step"]) and is_timing(result["prefill"])
    assert result["shapes"]["tokens"] == 3 * 4 * 4
    assert result["fps_pipelined"] == pytest.approx(4 * result["fps_sequential"], rel=1e-3)
    assert result["memory"]["weights_gib"] is not None


def test_the_published_size_needs_what_is_known_of_it():
    # 16.3 billion weights, 2 operations each and token, of which a step uses most.
    tokens = 3 * 24 * 44
    flops = dit_step.step_flops(dit_step.wan_s2v_14b(), 48, 88)
    assert 0.8 < flops / (2 * 14e9 * tokens) < 1.6
    with pytest.raises(ValueError, match="1 to 2"):
        dit_step.shrink(NANO, 3)


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks" / "gpu").glob("*.sh")), ids=str)
def test_scripts_for_a_gpu_are_shell_and_name_files_that_exist(script):
    subprocess.run(["bash", "-n", script], check=True)
    named = re.findall(r"(?:launch|benchmarks|configs)/[\w/]+\.(?:py|sh)", script.read_text())
    assert all((ROOT / path).is_file() for path in named)


def test_the_recipe_for_a_gpu_is_a_chain():
    """Every stage starts from what earlier ones write, with the same transformer."""
    models = set()
    needed = {
        "teacher": {"speech", "vae"},
        "diffusion_forcing": {"speech", "vae", "teacher"},
        "dmd": {"teacher", "diffusion_forcing"},
    }
    for stage, earlier in needed.items():
        sections, _ = read_sections(small_128.get_config(stage).to_dict())
        folders = set(vars(sections["weights"]).values()) - {"", SMALL_MODEL}
        assert folders == {f"{small_128.WORK}/{name}" for name in earlier}
        models.add(sections["model"].replace(unroll=1))
    assert len(models) == 1


@pytest.mark.parametrize(
    "flag", ["--minutes=nan", "--minutes=inf", "--minutes=-1", "--trials=0", "--reconnects=-1"]
)
def test_numbers_that_measure_nothing_are_refused(flag, capsys):
    with pytest.raises(SystemExit) as stopped:
        live.parse_arguments([flag])
    assert stopped.value.code == 2 and flag.split("=")[0] in capsys.readouterr().err


def test_the_loader_tells_windows_per_second_and_the_cpu_time_it_takes():
    arguments = ["--size", "nano", "--clips", "3", "--batch", "2", "--batches", "4"]
    record = loader.main([*arguments, "--warm_up", "2", "--workers", "0", "0"])
    first, second = record["rows"]
    assert first["workers"] == 0 and first["ratio"] == 1 and record["latents"] == 3
    assert second["windows_per_s"] > 0 and first["own_cpu_ms_per_window"] > 0


def test_natural_phones_begin_with_their_sounds():
    for package in ("hibari", "onnx"):
        pytest.importorskip(package)
    rng = np.random.default_rng(0)
    texts = ("Every apple is awful.", "I ate all eggs, and Emma asked, again, if it is over.")
    found = phone_timing.summary("hibari", [voices.hibari(text, "heart", rng) for text in texts])
    assert abs(found["kinds"]["vowel after pause"]["median_ms"]) < 20
