"""Format of a stream: rates and sizes of its picture and its sound."""

from dataclasses import dataclass

__all__ = ["StreamFormat"]


@dataclass(frozen=True)
class StreamFormat:
    """Rates and sizes that stay fixed during a stream.

    Attributes:
        fps: frames per second.
        sample_rate: audio samples per second, a multiple of `fps`.
        height: of a frame, in pixels.
        width: of a frame, in pixels.
        block_frames: frames of a block.
        piece_frames: frames that leave the VAE at once; a block is whole pieces.
    """

    fps: int
    sample_rate: int
    height: int
    width: int
    block_frames: int
    piece_frames: int

    @property
    def samples_per_frame(self) -> int:
        """Audio samples during a frame."""
        return self.sample_rate // self.fps

    @property
    def pieces_per_block(self) -> int:
        """Pieces in which the frames of a block leave the VAE."""
        return self.block_frames // self.piece_frames

    @property
    def block_s(self) -> float:
        """Seconds of a block."""
        return self.block_frames / self.fps
