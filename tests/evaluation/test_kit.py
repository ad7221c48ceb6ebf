"""The runner of an evaluation, on makers that need no network."""

import numpy as np
import pytest

from jax_avatar.data.toy import toy_clips
from jax_avatar.evaluation import kit
from jax_avatar.io.video import read_video
from jax_avatar.testing import save_model
from jax_avatar.weights.folder import load_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(save_model(tmp_path_factory.mktemp("nano")))


def still(portraits, waves, frames):
    return np.repeat(portraits[:, None], frames, axis=1)


def test_makers_are_scored_and_shown_and_a_batch_is_filled_up(model, tmp_path, monkeypatch):
    asked = []

    def maker(portraits, waves, frames):
        asked.append((len(portraits), frames))
        return still(portraits, waves, frames)

    monkeypatch.setattr(kit, "read_clips", lambda data, split: toy_clips(split, size=64))
    monkeypatch.setattr(kit, "fit_probe", lambda clips: None)  # lips are not scored
    settings = kit.KitSettings(clips=3, batch=2, long_s=11, with_still=True)
    makers = {"generated": maker, "again": still}
    made = dict(kit.evaluate(model, "", ["held_out_both"], makers, settings, tmp_path))
    assert asked == [(2, 37), (2, 37), (2, 11 * 16)]
    rows, long = made["held_out_both"], made["long"]
    assert rows["n"] == 3 and set(rows) == {"n", "generated", "again", "still", "decoded_truth"}
    assert rows["generated"] == rows["again"] == rows["still"] and rows["still"]["motion"] == 0
    assert rows["decoded_truth"]["motion"] > 0
    assert long["n"] == 2 and long["seconds"] == 11 and long["colour_drift"] == 0
    assert long["again"].items() <= long.items()
    frames, fps, sound, _ = read_video(tmp_path / "held_out_both_2.mp4")
    assert frames.shape[2:] == (128, 3) and fps == 16 and np.abs(sound).max() > 0
    assert (tmp_path / "held_out_both.png").exists() and (tmp_path / "long.mp4").exists()


def test_a_long_stream_is_left_out_on_request(model, tmp_path, monkeypatch):
    monkeypatch.setattr(kit, "read_clips", lambda data, split: toy_clips(split, size=64))
    monkeypatch.setattr(kit, "fit_probe", lambda clips: None)
    settings = kit.KitSettings(clips=2, batch=2, long_s=0)
    made = dict(
        kit.evaluate(model, "", ["held_out_voice"], {"generated": still}, settings, tmp_path)
    )
    assert list(made) == ["held_out_voice"] and "still" not in made["held_out_voice"]


def test_ablations_change_what_they_name(model):
    plain = kit.ablated_plan(model, 3, aas=True, rolling_rope=True)
    assert plain.seed == 3 and plain.distance is None and plain.aas_after_blocks == 4
    assert kit.ablated_plan(model, 3, aas=False, rolling_rope=True).aas_after_blocks == 0
    fixed = kit.ablated_plan(model, 3, aas=True, rolling_rope=False)
    assert fixed.distance(5, 0) == -5 * model.dit.config.frames_per_block
    assert list(kit.makers_of(model, plain, one_step=True)) == ["generated", "one_step"]
