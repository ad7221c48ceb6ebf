import io

import av
import numpy as np
import pytest

from jax_avatar.io.fragments import FragmentWriter
from jax_avatar.io.provenance import (
    COMMENT,
    SOURCE_TYPE,
    can_sign,
    make_signer,
    read_marks,
    sign_video,
)
from jax_avatar.io.video import VideoWriter, read_video
from tests.io.test_watermark import clip


def write(path, **options):
    with VideoWriter(path, 96, 96, 16, 16_000, **options) as writer:
        writer.write_audio(np.zeros(16_000, np.float32))
        writer.write_frames(clip(frames=16))
    return path


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
def test_a_written_video_carries_watermark_and_metadata(tmp_path, suffix):
    marks = read_marks(write(tmp_path / f"a.{suffix}"))
    assert marks.watermark.is_marked and marks.comment == COMMENT and marks.says_generated
    assert marks.manifest is None
    marks = read_marks(write(tmp_path / f"b.{suffix}", is_marked=False))
    assert not marks.watermark.is_marked and marks.says_generated


def test_the_first_bytes_of_a_live_stream_say_that_it_is_generated():
    writer = FragmentWriter(96, 96, 16, 16_000)
    data = writer.write(clip(frames=1), np.zeros(1000, np.float32))
    assert SOURCE_TYPE.encode() in data[: data.index(b"moof")]
    with av.open(io.BytesIO(data + writer.close())) as container:
        assert container.metadata["comment"] == COMMENT


@pytest.mark.parametrize("suffix", ["mp4", "mov"])
def test_a_signed_video_plays_as_before_and_a_changed_one_is_found_out(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}")
    before = read_video(path)
    sign_video(path, make_signer())
    after = read_video(path)
    np.testing.assert_array_equal(before[0], after[0])
    np.testing.assert_array_equal(before[2], after[2])
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    marks = read_marks(path)
    assert marks.manifest["validation_state"] == "Valid" and marks.watermark.is_marked
    assert SOURCE_TYPE in str(marks.manifest)
    # Nobody vouches for a signer that made itself.
    codes = [status["code"] for status in marks.manifest["validation_status"]]
    assert codes == ["signingCredential.untrusted"]
    data = bytearray(path.read_bytes())
    data[data.rindex(b"mdat") + 200] ^= 1
    path.write_bytes(data)
    assert read_marks(path).manifest["validation_state"] == "Invalid"


def test_what_cannot_be_signed_is_refused(tmp_path):
    assert can_sign("a.mp4") and not can_sign("a.mkv")
    with pytest.raises(ValueError, match="both or neither"):
        make_signer(tmp_path / "cert.pem")
    with pytest.raises(ValueError, match="PEM"):
        make_signer(tmp_path / "cert.pem", tmp_path / "key.pem")
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="could not be signed"):
        sign_video(tmp_path / "a.mp4", make_signer())
    assert (tmp_path / "a.mp4").read_bytes() == b"no video"
    with pytest.raises(ValueError, match="cannot be read"):
        read_marks(tmp_path / "a.mp4")
