"""The mouth probe reads pixels, not boxes."""

import numpy as np
import pytest

from jax_avatar.evaluation.mouth_probe import MouthProbe, mouth_crops
from jax_avatar.pixels import from_uint8


def faces(count, seed):
    """48x48 pictures of random colour with a dark mouth of random height; box around the mouth."""
    rng = np.random.default_rng(seed)
    gap = rng.uniform(0, 9, count).astype(np.float32)
    frames = rng.integers(90, 220, (count, 1, 1, 3)) + rng.integers(0, 12, (count, 48, 48, 3))
    frames = frames.astype(np.uint8)
    left, top = rng.integers(14, 20, count), rng.integers(22, 28, count)
    for frame, height, x, y in zip(frames, np.round(gap).astype(int), left, top, strict=True):
        frame[y : y + 2, x : x + 12] = (150, 60, 60)
        frame[y + 2 : y + 2 + height, x : x + 12] = 15
    boxes = np.stack([left, top, left + 12, top + 4 + gap], 1).astype(np.float32)
    return frames, boxes, gap


@pytest.fixture(scope="module")
def probe():
    return MouthProbe.fit(*faces(600, 0), num_steps=150)


def test_opening_is_read_from_unseen_faces(probe):
    frames, boxes, gap = faces(200, 1)
    read = probe.predict(frames, boxes)
    assert np.corrcoef(read, gap)[0, 1] > 0.95
    as_floats = probe.predict(from_uint8(frames), boxes)
    np.testing.assert_allclose(as_floats, read, atol=1e-3)


def test_boxes_alone_tell_nothing(probe):
    frames, boxes, gap = faces(200, 1)
    others = np.roll(frames, 7, axis=0)
    assert abs(np.corrcoef(probe.predict(others, boxes), gap)[0, 1]) < 0.3
    grown = boxes + np.array([0, 0, 0, 6], np.float32)
    np.testing.assert_array_equal(probe.predict(frames, grown), probe.predict(frames, boxes))


def test_one_box_per_frame_is_asked_for():
    frames, boxes, _ = faces(4, 0)
    with pytest.raises(ValueError, match="4 frames but 3 mouth boxes"):
        mouth_crops(frames, boxes[:3])
