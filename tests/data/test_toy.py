import dataclasses

import numpy as np

from jax_avatar.data.records import decode_clip, encode_clip
from jax_avatar.data.toy import toy_clips


def test_the_mouth_opens_with_the_voice():
    for clip in toy_clips("train", count=3):
        around = np.pad(clip.wave.astype(float), (500, 0))  # half a frame before and after
        heard = around[: len(clip.frames) * 1000].reshape(-1, 1000).std(1)
        assert np.corrcoef(heard, clip.lip_gap)[0, 1] > 0.9
        left, top, right, bottom = clip.mouth_box[0].astype(int)
        change = np.abs(clip.frames.astype(float) - clip.portrait).mean(-1)
        mouth = change[:, top:bottom, left:right].mean((1, 2))
        assert np.corrcoef(mouth, clip.lip_gap)[0, 1] > 0.95
        change[:, top:bottom, left:right] = 0
        assert change.max() == 0


def test_clips_repeat_and_splits_share_no_one():
    train, again, held_out = (toy_clips(s, count=2) for s in ("train", "train", "held_out_person"))
    for clip, same in zip(train, again, strict=True):
        for field in dataclasses.fields(clip):
            one, two = getattr(clip, field.name), getattr(same, field.name)
            np.testing.assert_array_equal(one, two)
    assert not {c.person_id for c in train} & {c.person_id for c in held_out}
    assert np.abs(train[0].portrait.astype(int) - held_out[0].portrait).mean() > 5


def test_they_are_stored_like_any_clip():
    clip = toy_clips("train", count=1)[0]
    stored = decode_clip(encode_clip(clip))
    np.testing.assert_array_equal(stored.frames, clip.frames)
    assert (stored.style, stored.fps, len(stored.wave)) == ("toy", 16, 37 * 1000 + 1280)
