from pathlib import Path

import numpy as np
import pytest
from matplotlib import cbook
from PIL import Image

from conversion.faces import inputs
from jax_avatar.io.image import load_image, prepare_reference
from jax_avatar.pixels import from_uint8, to_uint8
from jax_avatar.portraits import networks
from jax_avatar.portraits.faces import face_missing, find_faces, track_face
from jax_avatar.portraits.framing import Framing, sample

PORTRAITS = Path(__file__).parents[2] / "jax_avatar" / "assets" / "portraits"


@pytest.fixture(scope="module")
def amara():
    return load_image(PORTRAITS / "amara.png")


@pytest.fixture(scope="module")
def hopper():
    return load_image(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))


def test_the_networks_are_the_published_ones():
    # What LiteRT makes of them with their own weights; ours are rounded to float16.
    with np.load(Path(__file__).parent / "litert.npz") as golden:
        logits, boxes = networks.detect(2 * inputs(128) - 1)
        np.testing.assert_allclose(logits, golden["scores"], atol=2e-4)
        best = boxes[np.arange(4), golden["scores"].argmax(1)]
        expected = golden["boxes"].reshape(4, 8, 2) / 128
        np.testing.assert_allclose(best[:, 1], expected[:, 1], atol=1e-5)
        places = [0, 2, 3, 4, 5, 6, 7]  # from the anchor, which all of them have in common
        off = best[:, places] - expected[:, places]
        np.testing.assert_allclose(off, np.broadcast_to(off[:, :1], off.shape), atol=1e-5)
        steps = off[:, 0] * np.where(golden["scores"].argmax(1) < 512, 16, 8)[:, None]
        np.testing.assert_allclose(steps % 1, 0.5, atol=1e-4)
        points, presence = networks.mesh(inputs(192))
        np.testing.assert_allclose(192 * points[1:], golden["points"][1:], atol=0.03)  # pixels
        np.testing.assert_allclose(presence, golden["presence"], atol=0.03)
        outlines = 64 * networks.eye_outline(inputs(64))
        np.testing.assert_allclose(outlines, golden["outlines"][:, :16, :2], atol=0.03)


@pytest.mark.parametrize("path", sorted(PORTRAITS.glob("*.png")), ids=lambda path: path.stem)
def test_the_portraits_that_come_along_show_a_face(path):
    image = load_image(path)
    for size in (None, (96, 96), (384, 704)):
        shown = image if size is None else _shown(image, *size)
        (face,) = find_faces(shown)
        assert face.score > 0.8 and face.presence > 0.9


def _shown(image, height, width):
    shown = prepare_reference(image, height, width, cover=True)[0, 0]
    return to_uint8(shown)


def test_small_faces_and_several_are_found(hopper):
    (face,) = find_faces(hopper)
    assert face.score > 0.8
    wide = Image.new("RGB", (1500, 1300), (90, 110, 90))
    wide.paste(Image.fromarray(hopper).resize((256, 300)), (200, 700))
    wide.paste(Image.fromarray(hopper[:, ::-1]).resize((256, 300)), (900, 300))
    both = find_faces(np.asarray(wide))
    assert len(both) == 2
    left, right = both
    for found, corner, points in (
        (left, (200, 700), face.points),
        (right, (900, 300), face.points * (-1, 1, 1) + (512, 0, 0)),
    ):
        expected = points[:, :2].mean(0) / 2 + corner
        assert np.abs(found.points[:, :2].mean(0) - expected).max() < 2


def test_landmarks_turn_and_grow_with_the_picture(amara):
    (face,) = find_faces(amara)
    for roll, side in ((0.0, 400.0), (0.26, 300.0), (-0.8, 256.0)):
        framing = Framing.around(np.array([125.0, 135.0]), side, roll)
        (turned,) = find_faces(sample(amara, framing, 320))
        error = framing.inverse(turned.points[:, :2] / 320) - face.points[:, :2]
        assert np.linalg.norm(error, axis=-1).mean() < 0.008 * face.width


def test_a_face_is_followed_from_frame_to_frame(amara):
    moved = np.roll(amara, (6, 12), (0, 1))
    still, shifted, gone, back = track_face(np.stack([amara, moved, np.full_like(amara, 9), amara]))
    assert gone is None and still is not None and shifted is not None and back is not None
    off = shifted.points[:, :2] - still.points[:, :2]
    np.testing.assert_allclose(off.mean(0), (12, 6), atol=0.5)
    assert np.abs(back.points - still.points).mean() < 0.5


@pytest.mark.parametrize("name", ["grey", "noise", "beside"])
def test_what_shows_no_face_is_told(name, amara):
    image = np.full((96, 96, 3), 128, np.uint8)
    if name == "noise":  # the detector alone takes this for a face
        image = np.random.default_rng(7).integers(0, 255, (64, 64, 3), np.uint8)
    whole = image
    if name == "beside":  # the middle of a picture whose face is near its edge
        canvas = Image.new("RGB", (900, 1600), (90, 110, 90))
        canvas.paste(Image.fromarray(amara).resize((300, 300)), (300, 40))
        whole = np.asarray(canvas)
        assert find_faces(whole)
        image = _shown(whole, 96, 96)
    assert not find_faces(image)
    shown = from_uint8(image)[None, None]
    said = "not in the middle" if name == "beside" else "no face was found"
    assert said in face_missing("picture.png", whole, shown)


def test_pictures_are_sampled_where_the_framing_says():
    at = np.arange(64, dtype=np.uint8)
    image = np.stack(np.broadcast_arrays(3 * at[None], 2 * at[:, None], 0), -1).astype(np.uint8)
    for side, size in ((16.0, 64), (32.0, 8)):  # grows, shrinks
        framing = Framing.around(np.array([30.0, 20.0]), side)
        places = framing.inverse(np.stack(np.meshgrid(*2 * [(np.arange(size) + 0.5) / size]), -1))
        expected = (places - 0.5) * (3, 2)
        np.testing.assert_allclose(sample(image, framing, size)[..., :2], expected, atol=1)
    beyond = sample(image, Framing.around(np.array([0.0, 20.0]), 16.0), 16)
    assert (beyond[:, :7, 0] == 0).all() and beyond[0, 15, 0] > 15
    turned = sample(image, Framing.around(np.array([30.0, 20.0]), 16.0, np.pi / 2), 16)
    np.testing.assert_array_equal(turned, np.rot90(image[12:28, 22:38]))
