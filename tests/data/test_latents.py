import numpy as np
import pytest

from jax_avatar import testing
from jax_avatar.data.encoded import describe
from jax_avatar.data.latents import StoredClips, load_encoded, random_clips
from jax_avatar.data.windows import Windows, check_fit
from tests.data.test_encoded import BF16, make_clip, write_set

MODEL = testing.NANO.replace(framepack=False, text_width=3, text_len=6)
LATENTS = 3


def stored(clips, **options):
    entry = describe(clips)
    index = {**entry.pop("kind"), "hash": "x", "splits": {"train": [entry]}}
    return StoredClips(clips, index, "train", **options)


def test_features_and_lips_belong_to_the_latents_of_a_window():
    # Latent l has the value l and stands for the frames 4l-3 to 4l, which have their own number.
    windows = Windows(stored([make_clip(latents=9)]), LATENTS, 4, seed=0)
    starts = set()
    for step in range(6):
        batch = windows.batch(step)
        first = batch["latent"][:, 0, 0, 0, 0]
        assert first.min() >= 1  # latent 0 is not like the latents of a stream
        for row, start in enumerate(first):
            shown = start + np.arange(LATENTS)
            np.testing.assert_array_equal(batch["latent"][row, :, 0, 0, 0], shown)
            frames = np.arange(4 * start - 3, 4 * start + 4 * LATENTS - 3)
            np.testing.assert_array_equal(batch["features"][row, 0, :, 0, 0], frames)
            np.testing.assert_array_equal(batch["lip_gap"][row], frames)
        starts |= set(first)
    assert starts == set(range(1, 7))


def test_the_latents_before_a_window_come_with_it():
    """Latent 0 may be among them, where it is kept; latent l has the value l."""
    clips = stored([make_clip(latents=9)])
    for source, earliest in ((clips, 3), (clips.take(slice(None)), 4)):
        windows, starts = Windows(source, LATENTS, 3, seed=0, motion=3), set()
        for step in range(6):
            batch = windows.batch(step)
            first = batch["latent"][:, 0, 0, 0, 0]
            before = first[:, None] + np.arange(-3, 0)
            np.testing.assert_array_equal(batch["motion"][..., 0, 0, 0], before)
            starts |= set(first)
        assert starts == set(range(earliest, 7))
    assert "motion" not in Windows(clips, LATENTS, 3).batch(0)
    config = MODEL.replace(text_width=clips.text_width or MODEL.text_width)
    check_fit(clips, config, LATENTS, motion=6)
    with pytest.raises(ValueError, match=r"7 latents before the 3 .* 10 latents or more; .* has 9"):
        check_fit(clips, config, LATENTS, motion=7)


def test_features_made_in_training_are_those_of_the_whole_wave():
    heard = []

    def encode_speech(wave, frames):
        heard.append((len(wave), frames))
        return np.broadcast_to(np.arange(frames)[:, None, None], (frames, 2, 6)).astype(np.float32)

    wave = np.zeros(30_000, np.int16)
    clips = [make_clip(latents=5, features=None, first_frame=2, wave=wave)]
    windows = Windows(stored(clips, encode_speech=encode_speech, states=(2, 6)), LATENTS, 1, seed=0)
    batch = windows.batch(0)
    start = batch["latent"][0, 0, 0, 0, 0]
    # Frame 0 of the record is frame 2 of the wave.
    np.testing.assert_array_equal(
        batch["features"][0, 0, :, 0, 0], 2 + np.arange(4 * start - 3, 4 * start + 9)
    )
    assert heard == [(30_000, 19)]


def test_a_batch_is_its_rows_whoever_makes_them_and_whenever():
    portraits = np.arange(4, dtype=np.float32)[:, None, None, None] * np.ones((1, 2, 2, 4))
    several = {"reference": portraits.astype(BF16), "reference_frames": (-1,) * 4}

    def make_windows(seed):
        clips = [make_clip(i, latents=7, **several) for i in range(5)]
        return Windows(stored(clips), LATENTS, 4, seed=seed)

    windows = make_windows(1)
    whole = windows.batch(3)
    hosts = [windows.batch(3, rows) for rows in (np.arange(2), np.arange(2, 4))]
    again = make_windows(1)
    for name, value in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in hosts]), value)
        np.testing.assert_array_equal(again.batch(3)[name], value)
    other = make_windows(2)
    assert any((other.batch(s)["latent"] != windows.batch(s)["latent"]).any() for s in range(3))


def test_every_window_comes_once_per_epoch_whatever_the_lengths():
    clips = [make_clip(i, latents=n) for i, n in enumerate((4, 7, 3))]
    windows = Windows(stored(clips), LATENTS, 5, seed=0)
    batch = windows.batch(0)
    seen = list(zip(batch["reference"][:, 0, 0, 0, 0], batch["latent"][:, 0, 0, 0, 0], strict=True))
    # The last clip is too short for a window.
    assert sorted(seen) == [(0, 1), (1, 1), (1, 2), (1, 3), (1, 4)]


def test_text_is_padded_with_zeros_and_absent_text_is_a_row_of_zeros():
    clips = stored([make_clip(1)], null_text=np.full((1, 3), 7, np.float32))
    batch = Windows(clips, LATENTS, 1, text_len=6, seed=0).batch(0)
    np.testing.assert_array_equal(batch["text"][0, :, 0], [2, 2, 2, 0, 0, 0])
    np.testing.assert_array_equal(batch["null_text"][0, :, 0], [7, 0, 0, 0, 0, 0])
    clips = stored([make_clip(1, text=None)])
    batch = Windows(clips, LATENTS, 1, text_len=6, text_width=3, seed=0).batch(0)
    assert batch["text"].shape == batch["null_text"].shape == (1, 1, 3)
    assert not batch["text"].any() and not batch["null_text"].any()


def test_the_portrait_is_from_outside_of_the_window_where_there_is_one():
    reference = np.arange(4, dtype=np.float32)[:, None, None, None] * np.ones((1, 2, 2, 4))
    clip = make_clip(latents=21, reference=reference.astype(BF16), reference_frames=(0, 25, 50, 75))
    windows = Windows(stored([clip]), LATENTS, 1, seed=0)
    seen = set()
    for step in range(40):
        batch = windows.batch(step)
        first = 4 * batch["latent"][0, 0, 0, 0, 0] - 3
        place = 25 * batch["reference"][0, 0, 0, 0, 0]
        assert place <= first - 16 or place >= first + 11 + 16
        seen.add(float(place))
    assert seen == {0, 25, 50, 75}
    # A clip that is too short for that takes any.
    clip = make_clip(latents=4, reference=reference.astype(BF16), reference_frames=(0, 3, 6, 9))
    Windows(stored([clip]), LATENTS, 1, seed=0).batch(0)


def test_clips_on_disk_are_those_that_were_written(tmp_path):
    clips = [make_clip(i, latents=6) for i in range(3)]
    write_set(tmp_path, clips)
    windows = Windows(load_encoded(tmp_path, "train"), LATENTS, 6, text_len=6, seed=0)
    for name, value in Windows(stored(clips), LATENTS, 6, text_len=6, seed=0).batch(1).items():
        np.testing.assert_array_equal(windows.batch(1)[name], value)
    assert windows.clips.content_hash


def test_data_of_other_weights_are_refused(tmp_path):
    write_set(tmp_path, [make_clip()])
    load_encoded(tmp_path, "train", weights={"vae": "aa", "speech": "ss"})
    with pytest.raises(ValueError, match="encoded with vae weights aa, those of this run are bb"):
        load_encoded(tmp_path, "train", weights={"vae": "bb"})


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no index\.json; encode clips into it"):
        load_encoded(tmp_path, "train")


def test_clips_without_features_want_a_speech_encoder():
    with pytest.raises(ValueError, match="no speech features and no speech encoder"):
        stored([make_clip(features=None)])


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"latent_channels": 5}, {}, "latents have 4 channels, the transformer expects 5"),
        ({}, {"latents": 6}, "task.latents=6: clips have 4 and a block has 3"),
        ({}, {"latents": 4}, "task.latents=4: clips have 4 and a block has 3"),
        ({"audio_layers": 3}, {}, r"speech features have \(2, 6\) states and channels"),
        ({"text_width": 4}, {}, "text rows have 3 channels, the transformer expects 4"),
        (
            {},
            {"fps": 25},
            r"clips have 16 frames per second, this run config\.fps=25",
        ),
        ({}, {"grid": (4, 2)}, r"latents have \(2, 2\) rows and columns, expected \(4, 2\)"),
    ],
)
def test_clips_that_do_not_fit_the_model_are_named(changes, options, message):
    clips = stored([make_clip()])
    check_fit(clips, MODEL, LATENTS, fps=16, grid=(2, 2))
    with pytest.raises(ValueError, match=message):
        check_fit(clips, MODEL.replace(**changes), **({"latents": LATENTS} | options))


def test_grids_that_no_patch_fits_are_named():
    with pytest.raises(ValueError, match=r"\(3, 4\) rows and columns, expected even numbers"):
        check_fit(random_clips(1, 3, (3, 4), 4, (2, 6)), MODEL, LATENTS)
