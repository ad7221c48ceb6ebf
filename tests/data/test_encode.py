import dataclasses
import functools
import json

import numpy as np
import pytest

from jax_avatar import testing
from jax_avatar.data import encode as encoding
from jax_avatar.data.encode import (
    EncodeConfig,
    caption_of,
    encode_clip,
    encode_clips,
    encode_data,
)
from jax_avatar.data.encoded import negative_rows, open_encoded
from jax_avatar.data.records import ClipRecord, finish_manifest, start_manifest, write_shard
from jax_avatar.data.windows import Windows
from jax_avatar.models.config import strided_grid
from jax_avatar.training.stages.flow import ForcingConfig, ForcingTask
from jax_avatar.weights.encoders import Encoders

CONFIG = EncodeConfig(clips_per_shard=2)


def video(portrait, frames):
    """Stands for a VAE: latent 0 is the mean of frame 0, the others of four frames each."""
    pixels = np.asarray(frames)[0, :, ::8, ::8]
    later = pixels[1:].reshape(-1, 4, *pixels.shape[1:]).mean(1)
    return np.concatenate([pixels[:1], later])[None]


def speech(wave, frames):
    """Features that tell the sample at the time of each frame."""
    heard = np.asarray(wave)[0, 0, np.arange(frames) * 1000]
    return np.tile(heard[None, None, :, None, None], (1, 1, 1, 2, 6))


def text(prompt):
    return np.full((max(1, len(prompt) % 7), 3), len(prompt), np.float32)


HASHES = {"vae": "aa", "speech": "ss", "text": "tt"}
GRID_OF = functools.partial(strided_grid, stride=8)
ENCODERS = Encoders(video, speech, text, 16, (2, 6), HASHES, GRID_OF)


def make_clip(number=0, length=13, split="train", **changes):
    """Frame T is grey of level T and sample n is T too, n/1000 frames into the clip."""
    level = np.arange(length)
    box = np.array([9, 17, 15, 23], np.float32)
    values = dict(
        frames=np.broadcast_to(level[:, None, None, None], (length, 32, 32, 3)).astype(np.uint8),
        portrait=np.full((32, 32, 3), 100 + number, np.uint8),
        wave=np.repeat(np.arange(length + 2), 1000).astype(np.int16),
        lip_gap=level.astype(np.float32),
        mouth_box=np.tile(box, (length, 1)),
        actions=(("nod", 0.5, 1.0, "nods"),),
        person_id=number,
        split=split,
        style="people",
        fps=16,
    )
    return ClipRecord(**(values | changes))


def write_data(folder, clips):
    content = {"config": {"made": "by a test"}}
    start_manifest(folder, content)
    for split in {clip.split for clip in clips}:
        write_shard(folder / f"{split}-0.array_record", [c for c in clips if c.split == split])
    finish_manifest(folder, content)
    return folder


def levels(values):
    """Grey levels of what `video` made, or frame numbers of what `speech` made."""
    return np.round((np.asarray(values, np.float32) + 1) * 127.5)


@pytest.mark.parametrize("phase", [0, 3])
def test_frames_sound_and_lips_stay_together_in_every_phase(phase):
    clip = encode_clip(make_clip(), ENCODERS, EncodeConfig(phases=4), phase=phase)
    assert len(clip.latent) == 3 and clip.first_frame == phase
    first = levels(clip.latent[:, 0, 0, 0])
    np.testing.assert_allclose(first, phase + np.array([0, 2.5, 6.5]), atol=1)
    np.testing.assert_array_equal(clip.lip_gap, phase + np.arange(9))
    heard = np.asarray(clip.features[:, 0, 0], np.float32) * 32768
    np.testing.assert_allclose(heard, phase + np.arange(9), atol=0.1)
    assert clip.mouth[:, 2, 1].all() and not clip.mouth[:, 0, 3].any()


def test_a_portrait_is_the_reference_and_without_one_frames_of_the_clip_are():
    clip = encode_clip(make_clip(7), ENCODERS, CONFIG)
    assert clip.reference_frames == (-1,) and levels(clip.reference[0, 0, 0, 0]) == 107
    clip = encode_clip(make_clip(length=81, portrait=None), ENCODERS, CONFIG)
    assert len(set(clip.reference_frames)) == 4
    np.testing.assert_allclose(levels(clip.reference[:, 0, 0, 0]), clip.reference_frames, atol=1)


def test_without_known_lips_there_is_nothing_to_probe():
    video_clip = make_clip(lip_gap=None, mouth_box=None, style="video")
    clips = encode_clips([video_clip], dataclasses.replace(ENCODERS, text=None))
    assert not clips.has_lips and not clips.moving(0)["mouth"].any()
    model = testing.NANO.replace(framepack=False, latent_channels=3)
    with pytest.raises(ValueError, match=r"mouth_probe_weight=0\.1 needs clips whose lips"):
        ForcingTask(model, ForcingConfig(latents=3, mouth_probe_weight=0.1), clips)


def test_a_repeated_portrait_keeps_its_last_latent():
    lengths = []

    def noted(portrait, frames):
        lengths.append(frames.shape[1])
        return video(portrait, frames)

    encoders = dataclasses.replace(ENCODERS, video=noted)
    clip = encode_clip(make_clip(), encoders, EncodeConfig(reference_repeats=5))
    assert 5 in lengths and clip.reference.shape == (1, 4, 4, 3)


def test_captions_tell_what_happens_when():
    clip = make_clip(caption="A man sits.")
    said = caption_of(clip.caption, clip.actions)
    assert said == "A man sits. From 0.5 to 1.0 seconds, the person nods."


def test_a_folder_becomes_a_set_that_trains(tmp_path):
    clips = [make_clip(i) for i in range(3)] + [make_clip(9, split="held_out_person")]
    data = write_data(tmp_path / "raw", clips)
    config = dataclasses.replace(CONFIG, phases=4)
    index = encode_data(data, tmp_path / "set", ENCODERS, config, progress=False)
    assert [len(s["latents"]) for s in index["splits"]["train"]] == [2] * 6
    # Only training clips are encoded again and again.
    assert [len(s["latents"]) for s in index["splits"]["held_out_person"]] == [1]
    records, _ = open_encoded(tmp_path / "set", "train")
    assert [(r.person, r.first_frame) for r in map(records.__getitem__, range(12))] == [
        (person, phase) for person in range(3) for phase in range(4)
    ]
    assert records[0].text.shape == (len(caption_of(clips[0].caption, clips[0].actions)) % 7, 3)


@pytest.mark.parametrize("store_features", [False, True])
def test_features_and_the_negative_prompt_are_stored_as_told(tmp_path, store_features):
    data = write_data(tmp_path / "raw", [make_clip()])
    config = dataclasses.replace(CONFIG, store_features=store_features, negative_prompt="blur")
    encode_data(data, tmp_path / "set", ENCODERS, config, progress=False)
    records, _ = open_encoded(tmp_path / "set", "train")
    assert (records[0].features is not None) == store_features
    np.testing.assert_array_equal(negative_rows(tmp_path / "set"), text("blur"))


class Killed(BaseException):
    pass


def test_an_interrupted_encoding_goes_on_to_the_same_set(tmp_path, monkeypatch):
    data = write_data(tmp_path / "raw", [make_clip(i) for i in range(5)])
    whole = encode_data(data, tmp_path / "whole", ENCODERS, CONFIG, progress=False)
    count, real = [], encoding.encode_clip

    def counted(clip, *args, **kwargs):
        count.append(clip.person_id)
        if len(count) == 4:
            raise Killed
        return real(clip, *args, **kwargs)

    monkeypatch.setattr(encoding, "encode_clip", counted)
    with pytest.raises(Killed):
        encode_data(data, tmp_path / "cut", ENCODERS, CONFIG, progress=False)
    with pytest.raises(ValueError, match="was not finished; repeat"):
        open_encoded(tmp_path / "cut", "train")
    assert encode_data(data, tmp_path / "cut", ENCODERS, CONFIG, progress=False) == whole
    # The first shard was kept, the one under way was made anew.
    assert count == [0, 1, 2, 3, 2, 3, 4]


def test_other_settings_or_weights_do_not_go_into_the_same_folder(tmp_path):
    data = write_data(tmp_path / "raw", [make_clip()])
    encode_data(data, tmp_path / "set", ENCODERS, CONFIG, progress=False)
    other = dataclasses.replace(ENCODERS, hashes={"vae": "bb"})
    with pytest.raises(ValueError, match="holds data encoded with other settings: weights"):
        encode_data(data, tmp_path / "set", other, CONFIG, progress=False)


def test_unfinished_data_are_not_encoded(tmp_path):
    data = write_data(tmp_path / "raw", [make_clip()])
    manifest = data / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"complete": False}))
    with pytest.raises(ValueError, match="is not complete; repeat the command"):
        encode_data(data, tmp_path / "set", ENCODERS, CONFIG, progress=False)


def test_a_folder_without_clips_is_refused(tmp_path):
    data = write_data(tmp_path / "raw", [])
    with pytest.raises(ValueError, match="holds no clips"):
        encode_data(data, tmp_path / "set", ENCODERS, CONFIG, progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wave": np.zeros(0, np.int16)}, "clip x has no sound"),
        ({"fps": 25}, "clip x has 25 frames per second; expected 16"),
        (
            {"frames": np.zeros((13, 32, 24, 3), np.uint8)},
            r"clip x: 32\*24 pixels: sides must be multiples of 16",
        ),
    ],
)
def test_clips_that_cannot_be_encoded_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        encode_clip(make_clip(**changes), ENCODERS, CONFIG, source="x")


def test_a_network_that_makes_nan_is_noticed_while_encoding():
    broken = dataclasses.replace(ENCODERS, video=lambda *clip: video(*clip) * np.nan)
    with pytest.raises(ValueError, match="clip x: latent holds values that are not numbers"):
        encode_clip(make_clip(), broken, CONFIG, source="x")


def test_the_rate_of_data_and_encoder_must_agree(tmp_path):
    data = write_data(tmp_path / "raw", [make_clip()])
    fast = dataclasses.replace(ENCODERS, fps=25)
    with pytest.raises(ValueError, match=r"have 16 frames per second.*prepare the data with --fps"):
        encode_data(data, tmp_path / "set", fast, CONFIG, progress=False)


def test_clips_in_memory_train_as_those_on_disk():
    clips = encode_clips([make_clip(i) for i in range(2)], ENCODERS, EncodeConfig(phases=2))
    batch = Windows(clips, 2, 4, seed=0).batch(0)
    assert batch["latent"].shape == (4, 2, 4, 4, 3)
    np.testing.assert_allclose(batch["features"][:, 0, :, 0, 0] * 32768, batch["lip_gap"], atol=0.1)
