import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jax_avatar.io.image import decode_image, fit_size, load_image, prepare_reference, resized_size

RED = (200, 40, 30)


def save(path, mode="RGB", size=(64, 48), color=RED, **options):
    Image.new("RGB", size, color).convert(mode).save(path, **options)
    return path


def assert_red(image, tolerance=12):
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    assert np.abs(image.reshape(-1, 3).mean(0) - RED).max() < tolerance


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("a.png", "RGB"), ("a.jpg", "RGB"), ("a.webp", "RGB"), ("a.bmp", "RGB"), ("a.gif", "P"),
        ("a.png", "P"), ("a.png", "RGBA"), ("a.jpg", "CMYK"), ("a.tif", "CMYK"),
    ],
)  # fmt: skip
def test_every_mode_becomes_rgb(tmp_path, name, mode):
    image = load_image(save(tmp_path / name, mode))
    assert image.shape == (48, 64, 3)
    assert_red(image)


def test_grey_and_sixteen_bits_keep_their_brightness(tmp_path):
    save(tmp_path / "grey.png", "L", color=(100, 100, 100))
    assert np.abs(load_image(tmp_path / "grey.png").astype(int) - 100).max() <= 1
    values = np.full((32, 32), 100 * 257, np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert np.abs(load_image(tmp_path / "deep.png").astype(int) - 100).max() <= 1


def test_transparency_shows_a_light_background(tmp_path):
    Image.new("RGBA", (32, 32), (*RED, 0)).save(tmp_path / "clear.png")
    assert (load_image(tmp_path / "clear.png") == 200).all()


def test_a_sideways_photo_is_turned_upright(tmp_path):
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, :32] = RED
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter clockwise to be seen
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    image = load_image(tmp_path / "a.png")
    assert image.shape == (64, 32, 3)
    assert (image[:32] == RED).all() and (image[32:] == 0).all()


def test_of_an_animation_the_first_frame_counts(tmp_path):
    frames = [Image.new("RGB", (32, 32), color) for color in (RED, (0, 0, 0))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert_red(load_image(tmp_path / "a.gif"))


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_ten_thousand_pixels_are_reduced_while_reading(tmp_path, name):
    image = load_image(save(tmp_path / name, size=(10_000, 5_000)))
    assert max(image.shape) <= 2048 and abs(image.shape[1] / image.shape[0] - 2) < 0.01
    assert_red(image)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.png does not exist"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(ValueError, match="is a folder"):
        load_image(tmp_path)
    (tmp_path / "empty.png").touch()
    with pytest.raises(ValueError, match="is empty"):
        load_image(tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ValueError, match="not an image"):
        load_image(tmp_path / "text.png")
    noisy = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    Image.fromarray(noisy).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="broken or cut off"):
        load_image(tmp_path / "cut.png")
    with pytest.raises(ValueError, match="1x1 pixels; expected at least 16"):
        load_image(save(tmp_path / "dot.png", size=(1, 1)))
    with pytest.raises(ValueError, match="does not exist"):
        load_image(tmp_path / ("long" * 100))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.tif", "a.bmp", "a.ppm"])
@pytest.mark.filterwarnings("ignore")
def test_damage_of_any_kind_is_told_with_the_file(tmp_path, name):
    rng = np.random.default_rng(0)
    pixels = Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8))
    pixels.save(tmp_path / name)
    whole = np.frombuffer((tmp_path / name).read_bytes(), np.uint8)
    refused = 0
    for trial in range(60):
        damaged = whole.copy()
        damaged[rng.integers(0, 40, 3)] = rng.integers(0, 256, 3)
        end = len(whole) if trial % 3 else rng.integers(1, len(whole))
        (tmp_path / name).write_bytes(damaged[:end].tobytes())
        try:
            load_image(tmp_path / name)
        except ValueError as error:
            refused += 1
            assert str(tmp_path / name) in str(error)
    assert refused > 5


@pytest.mark.parametrize("missing", [1, 2, 3, 10, 11, 12, 13])
def test_of_odd_black_columns_the_left_has_the_fewer(missing):
    row = prepare_reference(np.full((100, 100, 3), 255, np.uint8), 100, 100 + missing)[0, 0, 50]
    black = row[:, 0] == -1
    assert black.sum() == missing and black[: 100 // 2].sum() == missing // 2


def test_sizes_are_those_of_the_official_code():
    tables = Path(__file__).parents[1] / "golden" / "dit" / "sampler_tables.json"
    rows = json.loads(tables.read_text())["size_rule"]
    assert len(rows) > 100
    for row in rows:
        height, width = fit_size(row["image_h"], row["image_w"], row["max_area"])
        assert (height, width) == (row["H"], row["W"])
        resized = resized_size(row["image_h"], row["image_w"], height, width)
        assert list(resized) == row["resized"]


@pytest.mark.parametrize("shape", [(100, 700), (700, 100), (30, 30), (5000, 16)])
def test_sizes_fit_the_area_in_whole_multiples(shape):
    height, width = fit_size(*shape, 96 * 96, 16)
    assert height * width <= 96 * 96 and height % 16 == width % 16 == 0 and min(height, width) > 0


def test_an_area_without_room_is_refused():
    with pytest.raises(ValueError, match="holds no 64x64"):
        fit_size(100, 100, 1000)


def test_the_reference_is_centred_black_where_missing_or_covers():
    wide = np.full((50, 400, 3), 255, np.uint8)
    wide[:, :150] = wide[:, 250:] = (255, 0, 0)
    middle = prepare_reference(wide, 96, 96)
    assert middle.shape == (1, 1, 96, 96, 3) and middle.dtype == np.float32
    np.testing.assert_allclose(middle[0, 0, 48, 48], 1, atol=0.01)
    bars = prepare_reference(np.full((400, 720, 3), 255, np.uint8), 384, 704)
    assert bars[0, 0, :, 0].max() == -1 and bars[0, 0, :, 352].min() == 1
    covered = prepare_reference(np.full((400, 720, 3), 255, np.uint8), 384, 704, cover=True)
    assert covered.min() == 1


def test_a_sideways_photo_of_sixteen_bits_is_turned_too(tmp_path):
    values = np.zeros((32, 64), np.uint16)
    values[:, :32] = 65535
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
    image = load_image(tmp_path / "a.png")
    assert image.shape == (64, 32, 3)
    assert (image[:32] == 255).all() and (image[32:] == 0).all()


def test_postscript_is_never_run(tmp_path):
    Image.new("RGB", (64, 64), RED).save(tmp_path / "a.eps")
    with pytest.raises(ValueError, match="not an image"):
        load_image(tmp_path / "a.eps")


def test_an_image_of_a_network_is_read_as_a_file_is(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (40, 30), (1, 2, 3)).save(path)
    np.testing.assert_array_equal(decode_image(path.read_bytes()), load_image(path))
    for data, message in [
        (b"", "the image is empty"),
        (b"/etc/passwd", "not an image"),
        (path.read_bytes()[:-30], "cut off"),
    ]:
        with pytest.raises(ValueError, match=message):
            decode_image(data)
    with pytest.raises(ValueError, match=r"40x30 pixels.*1,000 in all"):
        decode_image(path.read_bytes(), most_pixels=1000)
