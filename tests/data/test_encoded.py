import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest

from jax_avatar.data import encoded
from jax_avatar.data.encoded import (
    EncodedClip,
    decode_encoded,
    encode_encoded,
    finish_index,
    open_encoded,
    read_index,
    start_index,
)
from jax_avatar.data.example_order import Order
from jax_avatar.data.shards import write_records

BF16 = ml_dtypes.bfloat16
SETTINGS = {"weights": {"vae": "aa"}, "data_hash": "dd"}


def make_clip(number=0, latents=5, **changes):
    """A clip whose every array tells its time: latent l is l, video frame T is T."""
    frames = 4 * (latents - 1) + 1
    time = np.arange(latents, dtype=np.float32)[:, None, None, None]
    values = dict(
        latent=np.broadcast_to(time, (latents, 2, 2, 4)).astype(BF16),
        reference=np.full((1, 2, 2, 4), number, BF16),
        wave=np.zeros(frames * 1000 + 1280, np.int16),
        text=np.full((2 + number % 2, 3), 1 + number, BF16),
        features=np.broadcast_to(np.arange(frames)[:, None, None], (frames, 2, 6)).astype(BF16),
        mouth=np.ones((latents, 2, 2), bool),
        lip_gap=np.arange(frames, dtype=np.float32),
        reference_frames=(-1,),
        first_frame=0,
        caption="a person",
        actions=(("nod", 0.5, 1.0, "nods"),),
        fps=16,
        person=number,
        source=f"clip {number}",
    )
    return EncodedClip(**(values | changes))


def write_set(folder, clips, shard_size=2, settings=SETTINGS):
    start_index(folder, settings)
    paths = []
    for i in range(0, len(clips), shard_size):
        paths.append(folder / f"train-{i:05d}.array_record")
        write_records(paths[-1], map(encode_encoded, clips[i : i + shard_size]))
    return finish_index(folder, {"train": paths})


def test_a_record_comes_back_bit_for_bit():
    rng = np.random.default_rng(0)
    clip = make_clip(latent=rng.standard_normal((5, 2, 2, 4)).astype(BF16), text=None)
    data = encode_encoded(clip)
    again = decode_encoded(data)
    for field in dataclasses.fields(EncodedClip):
        before, after = getattr(clip, field.name), getattr(again, field.name)
        np.testing.assert_array_equal(before, after)
        assert getattr(before, "dtype", None) == getattr(after, "dtype", None)
    # Half-precision numbers lie in the record as they are, little-endian.
    assert clip.latent.view(np.uint16).astype("<u2").tobytes() in data


def test_the_index_tells_what_a_reader_must_know(tmp_path):
    index = write_set(tmp_path, [make_clip(i, latents=5 + i) for i in range(3)])
    assert index == read_index(tmp_path)
    assert (index["grid"], index["channels"], index["fps"]) == ([2, 2], 4, 16)
    assert index["states"] == [2, 6] and index["text_width"] == 3
    assert [shard["latents"] for shard in index["splits"]["train"]] == [[5, 6], [7]]
    assert index["fields"]["latent"] == {"dtype": "bfloat16", "shape": "t h w c"}


def test_the_hash_is_that_of_the_content(tmp_path):
    clips = [make_clip(i) for i in range(3)]
    first = write_set(tmp_path / "a", clips)["hash"]
    assert write_set(tmp_path / "b", clips)["hash"] == first
    clips[1] = make_clip(1, caption="somebody else")
    assert write_set(tmp_path / "c", clips)["hash"] != first


def truncate(folder):
    path = folder / "train-00000.array_record"
    path.write_bytes(path.read_bytes()[:-100])


def flip(folder):
    path = folder / "train-00000.array_record"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def change_index(folder, **changes):
    path = folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (truncate, r"train-00000.array_record has [\d,]+ bytes, expected"),
        (lambda folder: (folder / "train-00002.array_record").unlink(), "is missing, expected"),
        (flip, "it was changed or damaged"),
        (lambda folder: (folder / "index.json").unlink(), "has no index.json"),
        (lambda folder: change_index(folder, complete=False), "was not finished"),
        (lambda folder: change_index(folder, fps=25), "was changed since it was written"),
        (lambda folder: change_index(folder, format=0), "has format 0, expected 1"),
    ],
)
def test_a_damaged_set_is_refused(tmp_path, break_it, message):
    write_set(tmp_path, [make_clip(i) for i in range(3)])
    open_encoded(tmp_path, "train")
    break_it(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_encoded(tmp_path, "train")


def test_an_unknown_split_is_refused(tmp_path):
    write_set(tmp_path, [make_clip()])
    with pytest.raises(ValueError, match="no clips of split 'cartoon'; it has train"):
        open_encoded(tmp_path, "cartoon")


def test_records_with_nan_without_sound_or_out_of_step_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="clip 0: latent holds values that are not numbers"):
        make_clip(latent=np.full((5, 2, 2, 4), np.nan, BF16))
    with pytest.raises(ValueError, match="clip 0: 0 samples of sound came for 17 frames"):
        make_clip(wave=np.zeros(0, np.int16))
    with pytest.raises(ValueError, match="clip 0: lip_gap of 16 video frames came for 5 latents"):
        make_clip(lip_gap=np.zeros(16, np.float32))
    # The same for what somebody else has written.
    with monkeypatch.context() as patch:
        patch.setattr(EncodedClip, "__post_init__", lambda self: None)
        write_set(tmp_path, [make_clip(), make_clip(1, latent=np.full((5, 2, 2, 4), np.inf, BF16))])
    with pytest.raises(ValueError, match="clip 1: latent holds values that are not numbers"):
        open_encoded(tmp_path, "train")


def test_clips_of_different_kinds_make_no_set(tmp_path):
    other = make_clip(1, latent=np.zeros((5, 2, 4, 4), BF16))
    for shard_size in (1, 2):
        with pytest.raises(ValueError, match="kinds"):
            write_set(tmp_path / str(shard_size), [make_clip(), other], shard_size)


def test_going_on_with_other_settings_is_refused(tmp_path):
    write_set(tmp_path, [make_clip()])
    start_index(tmp_path, SETTINGS)
    with pytest.raises(ValueError, match="data_hash dd there, ee now"):
        start_index(tmp_path, {**SETTINGS, "data_hash": "ee"})


def test_every_example_comes_once_per_epoch_in_a_new_order():
    order = Order(10, 5, seed=3)
    epochs = [[order.example(2 * e + s, r) for s in (0, 1) for r in range(5)] for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [Order(10, 5, seed=4).example(s, r) for s in (0, 1) for r in range(5)]


def test_epochs_are_covered_where_batches_do_not_divide_them():
    order = Order(7, 4, seed=0)
    seen = [order.example(step, row) for step in range(7) for row in range(4)]
    for epoch in range(4):
        assert sorted(seen[7 * epoch : 7 * epoch + 7]) == list(range(7))


def test_an_order_of_nothing_is_refused():
    with pytest.raises(ValueError, match="0 examples in batches of 4"):
        Order(0, 4, seed=0)


def test_large_sets_are_not_read_whole_before_training(tmp_path, monkeypatch):
    write_set(tmp_path, [make_clip(i) for i in range(3)])
    monkeypatch.setattr(encoded, "_SMALL", 0)
    read = []
    monkeypatch.setattr(encoded, "decode_encoded", lambda data: read.append(1))
    open_encoded(tmp_path, "train")
    assert len(read) == 1
