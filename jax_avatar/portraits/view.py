"""From a picture to the portrait of a stream, and from its frames to the video."""

import dataclasses

import numpy as np
from jaxtyping import Float, UInt8

from jax_avatar.io.image import prepare_reference
from jax_avatar.portraits.faces import face_missing
from jax_avatar.portraits.framing import Framing
from jax_avatar.portraits.portrait import frame_portrait
from jax_avatar.portraits.whole_picture import WholePicture

__all__ = ["FRAMES", "PortraitView", "ShownPortrait"]

FRAMES = ("crop", "full")
"""What the video shows: the square around the face, or the picture in which it moves."""

_SHARE = 0.125  # of a picture, below which it is told that the rest is left out


@dataclasses.dataclass(frozen=True, eq=False)
class ShownPortrait:
    """The portrait of a stream.

    Attributes:
        reference: that the stream starts from, in [-1, 1].
        remarks: what to expect of it, and what to change; one sentence each.
        whole: the picture in which the frames are shown; None shows them as they are.
    """

    reference: Float[np.ndarray, "1 1 H W 3"]
    remarks: tuple[str, ...] = ()
    whole: WholePicture | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the video."""
        if self.whole is None:
            return self.reference.shape[2:4]
        return self.whole.height, self.whole.width

    def show(self, frames: UInt8[np.ndarray, "T H W 3"]) -> UInt8[np.ndarray, "T h w 3"]:
        """Frames of the stream -> frames of the video."""
        return frames if self.whole is None else self.whole(frames)


@dataclasses.dataclass(frozen=True)
class PortraitView:
    """Part of a picture that a stream shows.

    Attributes:
        framing: of the model, see `StreamSettings`: "face" or "picture".
        face: number of the face, from 1 on, from left to right; None takes the largest.
        frame: one of `FRAMES`.
    """

    framing: str = "picture"
    face: int | None = None
    frame: str = "crop"

    def __post_init__(self):
        if self.frame not in FRAMES:
            raise ValueError(f"frame {self.frame!r}: expected one of {', '.join(FRAMES)}.")
        if self.framing != "face" and (self.face is not None or self.frame != "crop"):
            raise ValueError(
                "this model shows the middle of the picture, whoever is there; choose a face or "
                "the full frame (--face, --frame) only with one that frames by the face."
            )

    def portrait(
        self,
        image: UInt8[np.ndarray, "H W 3"],
        size: tuple[int, int],
        *,
        cover: bool = True,
        is_known: bool = False,
        name: str = "the picture",
    ) -> ShownPortrait:
        """The portrait of a stream of that size.

        Args:
            image: 8-bit RGB, upright.
            size: height and width of the stream.
            cover: see `prepare_reference`; without effect where the face decides.
            is_known: True for a picture that was looked at before; nothing is remarked.
            name: of the picture, in messages.

        Raises:
            ValueError: the face decides, and there is none, or not the chosen one.
        """
        if self.framing != "face":
            reference = prepare_reference(image, *size, cover=cover)
            missing = None if is_known else face_missing(name, image, reference)
            return ShownPortrait(reference, (missing,) if missing else ())
        if size[0] != size[1]:
            raise ValueError(
                f"a stream of {size[0]}*{size[1]} pixels; this model frames by the face and makes "
                "squares: pass a size such as 256*256."
            )
        framed = frame_portrait(image, size[0], number=self.face, name=name)
        if self.frame == "full":
            whole, remarks = WholePicture(image, framed.framing), framed.remarks
        else:
            whole, remarks = None, (*framed.remarks, *_about_share(image, framed.framing, name))
        return ShownPortrait(framed.reference, () if is_known else remarks, whole)


def _about_share(image: UInt8[np.ndarray, "H W 3"], framing: Framing, name: str) -> tuple[str, ...]:
    """A remark where the square around the face leaves most of the picture out."""
    share = (1 / framing.scale) ** 2 / (image.shape[0] * image.shape[1])
    if share > _SHARE:
        return ()
    return (
        f"{name}: only the square around the face is shown, {100 * share:.0f} % of the picture; "
        "choose the full frame (--frame full) to show all of it.",
    )
