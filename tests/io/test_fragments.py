import io

import av
import numpy as np
import pytest

from jax_avatar.io.fragments import FragmentWriter


def boxes(data):
    """Names of the boxes that data begins with; it must hold whole ones."""
    names = []
    while data:
        size = int.from_bytes(data[:4], "big")
        assert 8 <= size <= len(data)
        names.append(data[4:8].decode())
        data = data[size:]
    return names


@pytest.mark.parametrize(("fps", "rate"), [(16, 16_000), (25, 16_000), (30, 48_000)])
def test_fragments_come_soon_and_picture_and_sound_keep_step(fps, rate):
    """Every half second a white frame and a click: they must meet, to a frame."""
    writer = FragmentWriter(64, 48, fps, rate)
    parts = []
    for frame in range(3 * fps):
        start, stop = frame * rate // fps, (frame + 1) * rate // fps
        is_flash = frame % (fps // 2) == 0
        picture = np.full((1, 48, 64, 3), 255 if is_flash else 0, np.uint8)
        sound = np.zeros(stop - start, np.float32)
        sound[: rate // fps] = 0.8 * is_flash * np.sin(np.arange(rate // fps) * 0.4)
        parts.append(writer.write(picture, sound))
        assert 0 <= writer.offset_s < 0.1  # frames of AAC, and the resampler's delay
    parts.append(writer.close())
    assert boxes(parts[0]) == ["ftyp", "moov", "moof", "mdat"]
    assert all(boxes(part) == ["moof", "mdat"] for part in parts[1:])
    # Every picture that went in has come out, and sound but for three frames of AAC.
    have = b"".join(parts[: 2 * fps])
    with av.open(io.BytesIO(have)) as container:
        assert len(list(container.decode(video=0))) == 2 * fps
    with av.open(io.BytesIO(have)) as container:
        heard = [frame.time + frame.samples / 48_000 for frame in container.decode(audio=0)]
    assert 0 < 2.0 + writer.delay_s - max(heard) < 3.1 * 1024 / 48_000
    data = b"".join(parts)
    with av.open(io.BytesIO(data)) as container:
        frames = [(f.time, f.to_ndarray(format="gray").mean()) for f in container.decode(video=0)]
    assert len(frames) == 3 * fps
    with av.open(io.BytesIO(data)) as container:
        sound = [(f.time, f.to_ndarray()[0]) for f in container.decode(audio=0)]
    times = np.concatenate([t + np.arange(len(x)) / 48_000 for t, x in sound])
    loud = times[np.abs(np.concatenate([x for _, x in sound])) > 0.3]
    flashes = np.array([t for t, bright in frames if bright > 128])[1:]  # the first is at 0
    np.testing.assert_allclose(np.diff(flashes), fps // 2 / fps, atol=1e-3)
    for flash in flashes:
        assert np.abs(loud - flash).min() < 0.02


def test_the_type_is_what_a_media_source_asks_for():
    writer = FragmentWriter(96, 96, 16, 16_000)
    assert writer.mime.startswith('video/mp4; codecs="avc1.4d') and "mp4a.40.2" in writer.mime
    assert writer.delay_s == 1024 / 48_000
    assert boxes(writer.close())
    assert writer.close() == b""
