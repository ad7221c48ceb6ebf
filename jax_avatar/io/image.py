"""Image files -> the RGB portrait that a stream starts from."""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from jax_avatar.pixels import from_uint8
from jax_avatar.shapes import Float

__all__ = ["decode_image", "fit_size", "load_image", "prepare_reference", "resized_size"]

_SMALLEST = 16  # pixels per side, below which there is no face to see
_LARGEST = 2048  # sides are reduced to this while decoding; no stream is larger
_MOST_PIXELS = 400_000_000  # a compressed file may claim any size
_BACKGROUND = (200, 200, 200)  # behind transparent pixels
# What portraits come in; Pillow would hand PostScript to another program.
_FORMATS = frozenset("AVIF BMP GIF ICO JPEG JPEG2000 MPO PCX PNG PPM QOI TGA TIFF WEBP".split())
_EIGHT_OF_SIXTEEN_BITS = ((np.arange(65536) + 128) // 257).astype(np.uint8)


def load_image(path: str | Path) -> np.ndarray:
    """Reads an image as 8-bit RGB `[H W 3]`, upright, at most 2048 pixels per side.

    Any mode is understood: grey, palette, CMYK, 16-bit; transparency is laid over light grey; of
    an animation the first frame counts.

    Raises:
        ValueError: the file is missing, not an image, cut off, or too small or large to use.
    """
    path = Path(path)
    if not os.path.isfile(path):
        kind = "is a folder" if os.path.isdir(path) else "does not exist"
        raise ValueError(f"image {path} {kind}; expected a file such as portrait.png.")
    return _read(path, f"image {path}", path.stat().st_size, _MOST_PIXELS)


def decode_image(data: bytes, *, most_pixels: int = 50_000_000) -> np.ndarray:
    """Reads an image that came over a network; as `load_image`.

    Args:
        data: the file's bytes.
        most_pixels: of what it decodes to, whatever its compressed size.

    Raises:
        ValueError: it is not an image, cut off, or too small or large to use.
    """
    return _read(io.BytesIO(data), "the image", len(data), most_pixels)


def _read(source: Path | io.BytesIO, name: str, size: int, most_pixels: int) -> np.ndarray:
    if not size:
        raise ValueError(f"{name} is empty; expected PNG, JPEG, WebP or the like.")
    Image.init()
    formats = sorted(_FORMATS & Image.OPEN.keys())
    previous, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(source, formats=formats) as image:
            width, height = image.size
            if min(width, height) >= _SMALLEST and width * height <= most_pixels:
                image.draft("RGB", (_LARGEST, _LARGEST))  # JPEG: decode straight to a smaller size
                image.load()
                return np.asarray(_to_rgb(image))
    except UnidentifiedImageError:
        raise ValueError(
            f"{name} is not an image that can be read; expected PNG, JPEG, WebP or the like."
        ) from None
    except Exception as error:  # Pillow's readers raise nearly anything on a broken file
        raise ValueError(f"{name} is broken or cut off ({error}); save it again.") from error
    finally:
        Image.MAX_IMAGE_PIXELS = previous
    expected = f"expected at least {_SMALLEST} per side, to show a face, and {most_pixels:,} in all"
    raise ValueError(f"{name} has {width}x{height} pixels; {expected}; resize it.")


def _to_rgb(image: Image.Image) -> Image.Image:
    # Pillow would clip, not scale, what does not fit into 8 bits. Arrays forget the orientation.
    if image.mode.startswith("I;16"):
        image = ImageOps.exif_transpose(image)
        image = Image.fromarray(_EIGHT_OF_SIXTEEN_BITS[np.asarray(image)])
    elif image.mode in ("I", "F"):
        values = np.nan_to_num(np.array(ImageOps.exif_transpose(image), np.float32))
        values *= 255 / (65535.0 if image.mode == "I" else max(1.0, float(values.max())))
        image = Image.fromarray(np.clip(values, 0, 255).round().astype(np.uint8))
    if max(image.size) > _LARGEST:
        if image.mode == "P":
            image = image.convert("RGBA")
        image.thumbnail((_LARGEST, _LARGEST), Image.Resampling.BILINEAR, reducing_gap=3.0)
    upright = ImageOps.exif_transpose(image)
    has_alpha = upright.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in upright.info
    if not has_alpha:
        return upright.convert("RGB")
    over = upright.convert("RGBA")
    background = Image.new("RGBA", over.size, (*_BACKGROUND, 255))
    return Image.alpha_composite(background, over).convert("RGB")


def fit_size(image_h: int, image_w: int, max_area: int, multiple: int = 64) -> tuple[int, int]:
    """Height and width of a stream: the image's shape, at most `max_area` pixels.

    Args:
        image_h: pixel rows of the image.
        image_w: pixel columns.
        max_area: most pixels.
        multiple: both sides are multiples of this.

    Raises:
        ValueError: not even one multiple fits the area.

    Source: Wan2.2-S2V, size of the reference image.
    """
    if max_area < multiple * multiple:
        raise ValueError(
            f"an area of {max_area} pixels holds no {multiple}x{multiple}; pass a larger size."
        )
    if image_h * image_w <= max_area:
        smallest, largest = 0.1, 1.0
    else:
        slack = multiple - 1
        a, b, c = image_h * image_w, slack * (image_h + image_w), slack**2 - max_area
        smallest = (-b + np.sqrt(b**2 - 2 * a * c)) / (2 * a)
        largest = np.sqrt(max_area / a)
    for i in range(100):
        scale = largest - (largest - smallest) * i / 100
        height, width = (
            -(-int(side * scale) // multiple) * multiple for side in (image_h, image_w)
        )
        if height * width <= max_area and height and width:
            return height, width
    ratio = image_h / image_w
    height = int(np.sqrt(max_area * ratio)) // multiple * multiple
    width = int(np.sqrt(max_area / ratio)) // multiple * multiple
    if height >= image_h or width >= image_w:
        height, width = (side // multiple * multiple for side in (image_h, image_w))
    return max(height, multiple), max(width, multiple)


def resized_size(image_h: int, image_w: int, height: int, width: int) -> tuple[int, int]:
    """Size of the image after the resize and before the centre crop to `height` x `width`.

    The image's shorter side becomes the shorter of the two; the other is truncated.
    """
    short = min(height, width)
    if image_h <= image_w:
        return short, int(short * image_w / image_h)
    return int(short * image_h / image_w), short


def prepare_reference(
    image: np.ndarray, height: int, width: int, *, cover: bool = False
) -> Float[np.ndarray, "1 1 H W 3"]:
    """Resizes and crops a portrait to the size of the stream.

    Args:
        image: 8-bit RGB `[H W 3]`.
        height: pixel rows of the stream.
        width: pixel columns.
        cover: enlarge until the whole frame is filled; otherwise black fills what is missing,
            as in the official preprocessing.

    Returns:
        One frame in [-1, 1].
    """
    image_h, image_w = image.shape[:2]
    if cover:
        scale = max(height / image_h, width / image_w)
        size = max(height, round(image_h * scale)), max(width, round(image_w * scale))
    else:
        size = resized_size(image_h, image_w, height, width)
    resized = Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR)
    top, left = (_margin(have, want) for have, want in zip(size, (height, width), strict=True))
    # A crop that reaches beyond the image is filled with black.
    cropped = resized.crop((left, top, left + width, top + height))
    return from_uint8(np.asarray(cropped))[None, None]


def _margin(have: int, want: int) -> int:
    """Offset of the centre crop; negative for padding, with the smaller half first."""
    return round((have - want) / 2) if have >= want else -((want - have) // 2)
