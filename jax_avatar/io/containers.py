"""The kind of a file, from its first bytes: what raw samples must not be taken for."""

import codecs

__all__ = ["HEAD", "container_kind", "silent_kind"]

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
    b"riff\x2e\x91\xcf\x11": "Wave64",
    b"nut/multimedia container": "NUT",
    b".SoX": "SoX",
    b"XoS.": "SoX",
    b"NIST_1A\n": "NIST SPHERE",
    b"\x7f\xfe\x80\x01": "DTS",
    b"\xfe\x7f\x01\x80": "DTS",
    b"\x1f\xff\xe8\x00": "DTS",
    b"\xff\x1f\x00\xe8": "DTS",
    b"MPCK": "Musepack",
    b"MP+": "Musepack",
    **{bytes((0x64, 0xA3, i, 0)): "IRCAM" for i in range(1, 5)},
    **{bytes((0, i, 0xA3, 0x64)): "IRCAM" for i in range(1, 5)},
}
_NO_SOUND = {
    b"\x1f\x8b\x08": "gzip data; unpack it first",
    b"\xfd7zXZ\x00": "xz data; unpack it first",
    b"BZh9": "bzip2 data; unpack it first",
    b"\x28\xb5\x2f\xfd": "Zstandard data; unpack it first",
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it first",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff\xe0": "a picture",
    b"\xff\xd8\xff\xe1": "a picture",
    b"GIF8": "a picture",
    b"%PDF": "a document",
    b"MThd": "MIDI notes, which hold no sound",
}
_SHORTEST_TEXT = 8  # bytes, fewer of which may be samples by chance
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
    if head[4:8] in (b"\xf8\x72\x6f\xba", b"\xf8\x72\x6f\xbb"):
        return "TrueHD or MLP"
    if _is_ac3(head):
        return "AC-3"
    if _chain(head, _adts_length):
        return "AAC"
    if _chain(head, _mp3_length):
        return "MP3"
    if len(head) > 376 and all(head[i] == 0x47 for i in range(0, min(len(head), 188 * 8), 188)):
        return "MPEG-TS"
    return None


def silent_kind(head: bytes) -> str | None:
    """Kind of a file without sound that begins so; None if it may be sound.

    Args:
        head: as for `container_kind`, of whose kinds this is none.
    """
    for start, kind in _NO_SOUND.items():
        if head.startswith(start):
            return kind
    if head[8:10] == b'{"' and not any(head[4:8]):
        return "weights (safetensors)"
    if len(head) >= _SHORTEST_TEXT and _is_text(head):
        return f"text, {head[:20].decode('utf-8-sig', 'ignore')!r}..."
    return None


def _is_text(head: bytes) -> bool:
    try:  # the last character may be cut
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)
    except UnicodeDecodeError:
        return False
    return all(c.isprintable() or c in "\t\r\n\f" for c in text)


def _is_ac3(h: bytes) -> bool:
    """True for the head of an AC-3 or E-AC-3 frame. Source: ETSI TS 102 366, 4.4 and E.1.2."""
    if len(h) < 6 or h[:2] != b"\x0b\x77":
        return False
    version, rate = h[5] >> 3, h[4] >> 6
    return 10 < version <= 16 or (version <= 10 and rate < 3 and h[4] & 0x3F < 38)


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
