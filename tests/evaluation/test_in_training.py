import jax
import numpy as np
import pytest

from jax_avatar.data.toy import toy_clips
from jax_avatar.evaluation.in_training import ClipEvaluation
from jax_avatar.io.video import read_video
from jax_avatar.streaming.batch import BatchStream
from jax_avatar.streaming.model import load_model
from tests.evaluation.test_scores import BrightnessProbe
from tests.nano import save_model


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("model"), sigmas=[1.0, 0.6, 0.0])
    return BatchStream(load_model(folder))


def test_the_weights_of_the_moment_are_streamed_scored_and_shown(stream, tmp_path):
    clips = toy_clips("held_out_person", count=2, size=64, num_frames=9)
    params = stream.model.dit.params
    evaluate = ClipEvaluation(stream, clips, BrightnessProbe(), tmp_path, num_videos=1)
    first, again = evaluate(params, 10), evaluate(params, 20)
    assert first == again and np.isfinite(first["motion"])
    louder = jax.tree.map(lambda leaf: leaf, params)
    louder["head"] = {"kernel": 3 * params["head"]["kernel"], "bias": params["head"]["bias"]}
    assert evaluate(louder, 30)["motion"] != first["motion"]

    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step_0000{n}" for n in (10, 20, 30)]
    frames, fps, sound, rate = read_video(tmp_path / "step_000010" / "0.mp4")
    assert frames.shape == (9, 64, 128, 3) and (fps, rate) == (16, 16000)
    # The portrait stands still on the left, up to compression.
    assert np.abs(frames[:, :, :64].astype(int) - clips[0].portrait).mean() < 8
    said = clips[0].wave[: len(sound)] / 32768
    assert np.corrcoef(sound[: len(said)], said)[0, 1] > 0.8


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
