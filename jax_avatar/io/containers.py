"""The kind of a media file, from its first bytes: what raw samples must not be taken for."""

__all__ = ["HEAD", "container_kind"]

HEAD = 4096
"""First bytes that are enough to tell."""

_STARTS = {
    b"RIFX": "WAV",
    b"RF64": "WAV",
    b"BW64": "WAV",
    b"fLaC": "FLAC",
    b"OggS": "Ogg",
    b"ID3": "MP3",
    b"\x1aE\xdf\xa3": "Matroska or WebM",
    b"caff": "CAF",
    b"wvpk": "WavPack",
    b"MAC ": "Monkey's Audio",
    b".snd": "AU",
    b"#!AMR": "AMR",
    b"FLV\x01": "FLV",
    b"DSD ": "DSD",
    b"TTA1": "TTA",
    b"Creative Voice File": "VOC",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11": "WMA or ASF",
    b"\x00\x00\x01\xba": "MPEG",
}
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot", b"styp", b"moof")
_FORMS = {b"RIFF": (b"WAVE", b"AVI "), b"FORM": (b"AIFF", b"AIFC", b"8SVX")}
_ADTS_RATES = 13  # indices that mean a rate
_MP3_KBPS = {
    (1, 3): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 1): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 3): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 1): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_MP3_HZ = (44_100, 48_000, 32_000)


def container_kind(head: bytes) -> str | None:
    """Name of the kind of file that begins so; None for what may be raw samples.

    Args:
        head: the first `HEAD` bytes, or all if there are fewer.
    """
    for start, kind in _STARTS.items():
        if head.startswith(start):
            return kind
    if head[8:12] in _FORMS.get(head[:4], ()):
        return {b"WAVE": "WAV", b"AVI ": "AVI"}.get(head[8:12], "AIFF")
    if head[4:8] in _MP4_BOXES and int.from_bytes(head[:4], "big") not in range(2, 8):
        return "M4A, MP4 or MOV"
    if _chain(head, _adts_length):
        return "AAC"
    if _chain(head, _mp3_length):
        return "MP3"
    if len(head) > 376 and all(head[i] == 0x47 for i in range(0, min(len(head), 188 * 8), 188)):
        return "MPEG-TS"
    return None


def _chain(head: bytes, length_at) -> bool:
    """True if frames follow one another: one header alone may be chance in raw samples."""
    at = count = 0
    while at + 6 <= len(head):
        length = length_at(head[at : at + 6])
        if not length:
            return False
        at, count = at + length, count + 1
    return count >= 2 or (count == 1 and at == len(head))


def _adts_length(h: bytes) -> int:
    """Bytes of an AAC frame, 0 if this is no header of one. Source: ISO/IEC 13818-7."""
    if h[0] != 0xFF or h[1] & 0xF6 != 0xF0 or (h[2] >> 2) & 0xF >= _ADTS_RATES:
        return 0
    length = (h[3] & 3) << 11 | h[4] << 3 | h[5] >> 5
    return length if length > 7 else 0


def _mp3_length(h: bytes) -> int:
    """Bytes of an MPEG audio frame, 0 if this is no header of one. Source: ISO/IEC 11172-3."""
    version, layer, rate = (h[1] >> 3) & 3, (h[1] >> 1) & 3, (h[2] >> 2) & 3
    index, padding = h[2] >> 4, (h[2] >> 1) & 1
    if h[0] != 0xFF or h[1] & 0xE0 != 0xE0 or version == 1 or not layer or rate == 3:
        return 0
    if index in (0, 15):
        return 0
    bits = 1000 * _MP3_KBPS[1 if version == 3 else 2, layer][index - 1]
    hertz = _MP3_HZ[rate] >> {3: 0, 2: 1, 0: 2}[version]
    if layer == 3:
        return (12 * bits // hertz + padding) * 4
    samples = 576 if layer == 1 and version != 3 else 1152
    return samples // 8 * bits // hertz + padding
