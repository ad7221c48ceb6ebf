import io

import av
import numpy as np
import pytest
from PIL import Image

from jax_avatar.io.fragments import FragmentWriter
from jax_avatar.io.watermark import THRESHOLD, detect, mark
from jax_avatar.weights.folder import SMALL

PORTRAITS = SMALL.parent / "portraits"


def clip(name="amara", height=96, width=96, frames=12):
    """A portrait before a camera that trembles."""
    image = Image.open(PORTRAITS / f"{name}.png").convert("RGB").resize((width, height))
    return np.stack([np.roll(np.asarray(image), t % 3 - 1, 1) for t in range(frames)])


def through_h264(frames):
    """As a client of the live server sees them."""
    height, width = frames.shape[1:3]
    writer = FragmentWriter(width, height, 16, 16_000)
    data = writer.write(frames, np.zeros(1000 * len(frames), np.float32)) + writer.close()
    with av.open(io.BytesIO(data)) as container:
        return np.stack([x.to_ndarray(format="rgb24") for x in container.decode(video=0)])


@pytest.mark.parametrize("name", ["amara", "jun", "lena"])
@pytest.mark.parametrize("size", [(96, 96), (128, 96), (192, 320)])
def test_a_marked_video_is_found_after_coding_and_an_unmarked_one_is_not(name, size):
    frames = clip(name, *size)
    assert detect(through_h264(mark(frames))).score > THRESHOLD + 2
    plain = detect(through_h264(frames))
    assert not plain.is_marked and plain.score < 4


def test_one_frame_is_enough_and_a_resized_video_is_still_marked():
    frames = through_h264(mark(clip(height=192, width=192)))
    assert detect(frames[:1]).is_marked
    small = np.stack([Image.fromarray(x).resize((140, 140), Image.BOX) for x in frames])
    assert detect(small).is_marked


def test_the_mark_is_hardly_there():
    frames = np.concatenate([clip(), np.zeros((1, 96, 96, 3), np.uint8), clip()[:1] | 254])
    marked = mark(frames)
    error = marked.astype(float) - frames
    assert abs(error).max() == 1 and marked.shape == frames.shape
    assert 10 * np.log10(255**2 / (error**2).mean()) > 48
    assert abs(error[0].mean()) < 0.1  # neither lighter nor darker as a whole


def test_scores_of_what_knows_no_mark_are_those_of_chance():
    rng = np.random.default_rng(0)
    scores = []
    for _ in range(200):
        smooth = Image.fromarray(rng.integers(0, 255, (12, 12, 3), np.uint8)).resize((96, 96))
        scores.append(detect(np.asarray(smooth)[None]).score)
    assert abs(np.mean(scores)) < 0.25 and 0.7 < np.std(scores) < 1.3
    assert detect(np.zeros((1, 96, 96, 3), np.uint8)).score == 0
