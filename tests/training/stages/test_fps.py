"""The rate of video frames belongs to the run: data must have it, the speech encoder follows."""

import jax
import numpy as np
import pytest

from jax_avatar import testing
from jax_avatar.data.latents import random_clips
from jax_avatar.training.base_weights import trained_fps
from jax_avatar.training.stages import build as stages
from jax_avatar.weights.encoders import Encoders
from jax_avatar.weights.fields import plain_fields
from jax_avatar.weights.files import load_json
from jax_avatar.weights.folder import load_model

MODEL = testing.NANO.replace(framepack=False, num_layers=2, ring_blocks=2)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A folder like that of a converted Wan-S2V: its settings say 25 frames per second."""
    folder = testing.save_model(
        tmp_path_factory.mktemp("converted"), speech="wav2vec2", audio_window="whole"
    )
    assert load_json(folder / "config.json")["stream"]["fps"] == 25
    return str(folder)


def settings_of(stage, fps, **weights):
    fields = plain_fields(MODEL)
    content = {"stage": stage, "seed": 0, "fps": fps, "data": "", "latents": "", "model": fields}
    content |= {"task": {"batch_size": 2, "latents": 6}, "weights": weights}
    content |= {"loop": {"num_steps": 2, "warmup_steps": 0}}
    return content | ({"rollout": {"shift_max": 20}} if stage == "dmd" else {})


def test_a_model_converted_for_25_frames_is_trained_and_exported_at_16(
    converted, tmp_path, monkeypatch
):
    asked = []

    def load_latents(settings, split):
        asked.append(Encoders.load(settings["weights"], fps=settings["fps"]).fps)
        clips = random_clips(3, 7, testing.GRID, 4, (2, 6))
        object.__setattr__(clips, "fps", 16)
        return clips

    monkeypatch.setattr(stages, "load_latents", load_latents)
    weights = {"model": converted, "start": converted}
    build, _ = stages.build_stage(settings_of("diffusion_forcing", 16, **weights))
    task = build()
    assert asked == [16] and task.stream_settings["fps"] == 16
    task.export(task.init(jax.random.key(0)), tmp_path, {})
    made = load_model(tmp_path)
    assert made.settings.fps == made.speech.config.fps == trained_fps(tmp_path) == 16
    assert trained_fps(converted) is None

    # At 25 the data do not fit, nor does a student of 16 at any later stage.
    build, _ = stages.build_stage(settings_of("diffusion_forcing", 25, **weights))
    with pytest.raises(ValueError, match=r"16 frames per second, this run config\.fps=25; .*=16"):
        build()
    later = {"model": converted, "teacher": converted, "student": str(tmp_path)}
    message = r"config\.fps=25, but .*config\.weights\.student=.* trained at 16 .*--config\.fps=16"
    with pytest.raises(ValueError, match=message):
        stages.build_stage(settings_of("dmd", 25, **later))
    stages.build_stage(settings_of("dmd", 16, **later))
    for fps in (0, 16.5, "16"):
        with pytest.raises(ValueError, match=r"config\.fps=.* must be a whole number"):
            stages.build_stage(settings_of("dmd", fps, **later))


def test_a_speech_encoder_makes_features_at_the_rate_that_is_asked_for(converted):
    folders = {"vae": converted, "speech": converted}
    wave = (3000 * np.sin(np.arange(16_000) ** 1.5 / 900)).astype(np.int16)  # rises
    slow, fast = (Encoders.load(folders, fps=fps).features(wave, fps) for fps in (16, 25))
    assert slow.shape[0] == 16 and fast.shape[0] == 25
    # What is heard at half a second is the same, whatever the number of its frame.
    distance = np.abs(fast - slow[8]).mean((1, 2))
    assert np.argmin(distance) in (12, 13)


def test_a_speech_encoder_that_was_trained_for_a_rate_keeps_it(tmp_path):
    testing.save_model(tmp_path)
    assert load_model(tmp_path).settings.fps == 16
    message = r"mel speech encoder was trained for 16 frames per second, 25 are asked for"
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path, fps=25)
    with pytest.raises(ValueError, match=message):
        Encoders.load({"vae": tmp_path, "speech": tmp_path}, fps=25)
