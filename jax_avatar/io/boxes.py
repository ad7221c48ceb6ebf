"""A fragment of MP4 in one piece: `moof` describes the content of `mdat`.

    moof | mfhd | traf (picture) | traf (sound) || mdat | pictures | sounds

libavformat's own muxer keeps what came last until something newer comes, of both streams: in a
stream at its own pace that is a tenth of a second.
"""

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Run", "Sample", "movie_fragment", "with_lengths"]

_BASE_IS_MOOF = 0x020000  # of tfhd
_OFFSET_DURATION_SIZE_FLAGS = 0x000701  # of trun
_ON_ITS_OWN, _NEEDS_OTHERS = 0x02000000, 0x01010000  # of a sample: depends on none; on others
_START_CODE = re.compile(b"\x00\x00\x00?\x01")


@dataclass(frozen=True)
class Sample:
    """A picture, or a frame of sound, encoded.

    Attributes:
        data: as MP4 stores it, see `with_lengths` for H.264.
        duration: in units of its track.
        is_key: decodable on its own.
    """

    data: bytes
    duration: int
    is_key: bool = True


@dataclass(frozen=True)
class Run:
    """Samples of a track that follow each other.

    Attributes:
        track: its number in the header, from 1.
        start: time of the first, in units of the track.
        samples: at least one.
    """

    track: int
    start: int
    samples: Sequence[Sample]


def movie_fragment(number: int, runs: Sequence[Run]) -> bytes:
    """The bytes of a fragment.

    Args:
        number: from 1, one more each time.
        runs: at most one per track.

    Source: ISO/IEC 14496-12, sections 8.8.4 to 8.8.8 and 8.8.12.
    """
    # How long `moof` is does not depend on the offsets in it.
    offset = len(_moof(number, runs, 0)) + 8
    data = b"".join(sample.data for run in runs for sample in run.samples)
    return _moof(number, runs, offset) + _box(b"mdat", data)


def with_lengths(stream: bytes) -> bytes:
    """H.264 with the length before each unit, as MP4 has it, from one with start codes."""
    units = _START_CODE.split(stream)[1:]
    return b"".join(struct.pack(">I", len(unit)) + unit for unit in units)


def _moof(number: int, runs: Sequence[Run], offset: int) -> bytes:
    parts = [_box(b"mfhd", struct.pack(">II", 0, number))]
    for run in runs:
        parts.append(_traf(run, offset))
        offset += sum(len(sample.data) for sample in run.samples)
    return _box(b"moof", *parts)


def _traf(run: Run, offset: int) -> bytes:
    table = b"".join(
        struct.pack(
            ">III", sample.duration, len(sample.data),
            _ON_ITS_OWN if sample.is_key else _NEEDS_OTHERS,
        )
        for sample in run.samples
    )  # fmt: skip
    count = len(run.samples)
    return _box(
        b"traf",
        _box(b"tfhd", struct.pack(">II", _BASE_IS_MOOF, run.track)),
        _box(b"tfdt", struct.pack(">IQ", 1 << 24, run.start)),  # version 1: 64 bits
        _box(b"trun", struct.pack(">IIi", _OFFSET_DURATION_SIZE_FLAGS, count, offset), table),
    )


def _box(name: bytes, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return struct.pack(">I", 8 + len(content)) + name + content
