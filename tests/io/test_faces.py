from pathlib import Path

import numpy as np
import pytest
from matplotlib import cbook
from PIL import Image

from jax_avatar.io.faces import FACE_SCORE, _score, face_score
from jax_avatar.io.image import load_image, prepare_reference

PORTRAITS = Path(__file__).parents[2] / "jax_avatar" / "assets" / "portraits"


def crop(image, height, width):
    shown = prepare_reference(image, height, width, cover=True)[0, 0]
    return ((shown + 1) * 127.5).round().astype(np.uint8)


def test_the_network_is_the_published_one():
    # What TensorFlow Lite 2.x made of `face_detection_short_range.tflite` and this input.
    noise = np.random.default_rng(0).uniform(-1, 1, (1, 128, 128, 3)).astype(np.float32)
    assert abs(_score(noise[0]) - 0.40706) < 2e-4


@pytest.mark.parametrize("path", sorted(PORTRAITS.glob("*.png")), ids=lambda path: path.stem)
def test_the_portraits_that_come_along_show_a_face(path):
    image = load_image(path)
    assert face_score(image) > 0.8
    for size in ((96, 96), (64, 64), (384, 704), (704, 384)):
        assert face_score(crop(image, *size)) > 0.8


def test_a_photograph_shows_a_face():
    image = load_image(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
    assert face_score(image) > 0.8
    # A small face of a large picture, too.
    wide = Image.new("RGB", (1500, 1300), (90, 110, 90))
    wide.paste(Image.fromarray(image).resize((256, 300)), (200, 700))
    assert face_score(np.asarray(wide)) > FACE_SCORE


@pytest.mark.parametrize("name", ["grey", "noise", "gradient", "beside"])
def test_what_shows_no_face_is_told(name):
    image = np.full((96, 96, 3), 128, np.uint8)
    if name == "noise":
        image = np.random.default_rng(0).integers(0, 255, (80, 100, 3), np.uint8)
    if name == "gradient":
        image = np.broadcast_to(np.arange(96, dtype=np.uint8)[:, None, None], (96, 96, 3)).copy()
    if name == "beside":  # the middle of a picture whose face is near its edge
        face = Image.open(PORTRAITS / "amara.png").convert("RGB").resize((300, 300))
        whole = Image.new("RGB", (900, 1600), (90, 110, 90))
        whole.paste(face, (300, 40))
        assert face_score(np.asarray(whole)) > FACE_SCORE
        image = crop(np.asarray(whole), 96, 96)
    assert face_score(image) < FACE_SCORE
