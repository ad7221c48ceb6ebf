import dataclasses
import logging
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jax_avatar.data.toy import toy_clips
from jax_avatar.evaluation.in_training import ClipEvaluation, make_evaluation
from jax_avatar.io.video import read_video
from jax_avatar.layout import make_training_mesh, parse_layout
from jax_avatar.models import sharding
from jax_avatar.streaming.batch import BatchStream
from jax_avatar.streaming.session import AvatarSession
from jax_avatar.testing import save_model
from jax_avatar.training.run.placement import place_state
from jax_avatar.weights.folder import SMALL, load_model
from tests.evaluation.test_scores import BrightnessProbe


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("model"), sigmas=[1.0, 0.6, 0.0])
    return BatchStream(load_model(folder))


def held_out(count=2):
    return toy_clips("held_out_person", count=count, size=64, num_frames=9)


def louder(params):
    return params | {"head": jax.tree.map(lambda leaf: 3 * leaf, params["head"])}


def test_the_weights_of_the_moment_are_streamed_scored_and_shown(stream, tmp_path):
    clips, params = held_out(), stream.model.dit.params
    probe = {"make_probe": BrightnessProbe, "num_videos": 1}
    evaluate = ClipEvaluation(stream, clips, tmp_path / "samples", **probe)
    state = SimpleNamespace(ema=params, params=louder(params))
    evaluate.check(state)
    assert not list((tmp_path / "samples").iterdir())
    first, again = evaluate(state, 10), evaluate(state, 20)
    assert first == again and np.isfinite(list(first.values())).all()
    assert {name for name in first if not name.startswith("raw/")} > {"lip_r", "motion", "psnr"}
    assert first["raw/motion"] != first["motion"]
    assert evaluate(SimpleNamespace(ema=louder(params), params=params), 30) == {
        **{name.removeprefix("raw/"): value for name, value in first.items() if "raw" in name},
        **{f"raw/{name}": value for name, value in first.items() if "raw" not in name},
    }

    folders = sorted(p.name for p in (tmp_path / "samples").iterdir())
    assert folders == [f"step_0000{n}" for n in (10, 20, 30)]
    assert (tmp_path / "samples" / "step_000010" / "raw" / "0.mp4").exists()
    frames, fps, sound, rate = read_video(tmp_path / "samples" / "step_000010" / "0.mp4")
    assert frames.shape == (9, 64, 128, 3) and (fps, rate) == (16, 16000)
    # The portrait stands still on the left, up to compression.
    assert np.abs(frames[:, :, :64].astype(int) - clips[0].portrait).mean() < 8
    said = clips[0].wave[: len(sound)] / 32768
    assert np.corrcoef(sound[: len(said)], said)[0, 1] > 0.8


def test_clips_of_videos_are_scored_without_what_nobody_knows_of_them(stream, tmp_path):
    """Neither lips nor portraits, and of several lengths."""
    unknown = {"portrait": None, "lip_gap": None, "mouth_box": None}
    clips = [
        dataclasses.replace(clip, frames=clip.frames[:length], **unknown)
        for clip, length in zip(held_out(), (9, 7), strict=True)
    ]
    params = stream.model.dit.params
    evaluate = ClipEvaluation(stream, clips, tmp_path, num_videos=2)
    scores = evaluate(SimpleNamespace(ema=params, params=params), 1)
    assert set(scores) == {
        f"{prefix}{name}" for prefix in ("", "raw/")
        for name in ("psnr", "psnr_above_still", "motion", "flicker", "latent_jump", "identity")
    }  # fmt: skip
    frames, *_ = read_video(tmp_path / "step_000001" / "0.mp4")
    assert len(frames) == 7
    assert np.abs(frames[:, :, :64].astype(int) - clips[0].frames[0]).mean() < 8


def test_clips_that_were_only_encoded_are_left_out_with_the_reason(caplog):
    settings = {"data": "", "latents": "somewhere", "weights": {"model": str(SMALL)}}
    with caplog.at_level(logging.WARNING):
        assert make_evaluation(settings, None, make_training_mesh("1", None), "samples") is None
    assert "config.data is empty" in caplog.text


def test_whole_clips_may_come_from_another_sampler(stream):
    made = []

    def sample(params, reference, features):
        made.append((reference.shape, features.shape))
        return np.repeat(reference, features.shape[2] // 4, axis=1)

    still = BatchStream(stream.model, sample=sample)
    portraits = np.stack([clip.portrait for clip in toy_clips("train", count=2, size=64)])
    frames = still(portraits, np.zeros((2, 16000), np.float32), 14)
    assert made == [((2, 1, 8, 8, 4), (2, 1, 24, 2, 6))]
    assert frames.shape == (2, 14, 64, 64, 3)
    # A still latent is the same four frames over and over.
    assert np.abs(frames[:, 4:].astype(int) - frames[:, :-4]).max() <= 1


def test_a_batch_is_its_sessions(tmp_path):
    """With the portrait's still latents for the motion packer."""
    model = load_model(save_model(tmp_path, framepack=True, motion="still", sigmas=[1.0, 0.6, 0.0]))
    clips = held_out()
    portraits = np.stack([clip.portrait for clip in clips])
    waves = np.stack([clip.wave for clip in clips]).astype(np.float32)[:, :9000] / 32768
    frames = BatchStream(model)(portraits, waves, 9)
    still = portraits[:1, None].astype(np.float32) / 127.5 - 1
    session = AvatarSession(model, still, parse_layout("1", model.settings.num_steps))
    alone = np.concatenate([*session.push(waves[0]), *session.finish()])
    # The noise of a batch is drawn as one, so its first row is that of a batch of one.
    assert np.abs(frames[0].astype(int) - alone).max() <= 1
    assert frames[0].std(0).max() > 1


def test_a_batch_on_the_mesh_of_a_run_is_that_on_one_device(stream, monkeypatch):
    """Three portraits on two devices for data, weights cut over both axes."""
    monkeypatch.setattr(sharding, "SMALL", 1)
    portraits = np.stack([clip.portrait for clip in held_out(3)])
    waves = np.stack([clip.wave for clip in held_out(3)]).astype(np.float32)[:, :9000] / 32768
    stream.params = stream.model.dit.params
    expected = stream(portraits, waves, 9)
    mesh = make_training_mesh("2x2", None, num_heads=2)
    spread = BatchStream(stream.model, mesh=mesh)
    spread.params = place_state(stream.model.dit.params, mesh)
    kernel = spread.params["blocks"]["ffn_in"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) != kernel.shape
    found = spread(portraits, waves, 9)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert len({clip.tobytes() for clip in expected}) == 3
