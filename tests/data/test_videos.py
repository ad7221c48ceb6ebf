import dataclasses
import importlib.util
import json
import re
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

pytest.importorskip("cv2")
pytest.importorskip("webrtcvad")
pytest.importorskip("numba")

from jax_avatar.data import records
from jax_avatar.data.statistics import data_statistics, statistics_table
from jax_avatar.data.talking_people.person import make_person
from jax_avatar.data.talking_people.render import Pose, render, unit_weights
from jax_avatar.data.videos import clips
from jax_avatar.data.videos.clips import VideoConfig, cut_video, finish, plan, start
from jax_avatar.data.videos.faces import FrontalFaces, Stretch, single_face_stretches
from jax_avatar.data.videos.filters import speech_share
from jax_avatar.data.videos.footage import Footage
from jax_avatar.data.videos.shots import ShotCuts
from jax_avatar.io.audio import load_audio
from jax_avatar.io.video import VideoWriter

ROOT = Path(__file__).parents[2]
DEMO, SCRIPT = ROOT / "jax_avatar" / "assets" / "demo.flac", ROOT / "launch" / "prepare_data.py"
RATE, SOURCE_FPS = 16_000, 25
CONFIG = VideoConfig(size=(64, 64), fps=16, min_s=1.5, max_s=4.0)
# Seconds of every part of the test's video, one after the other.
PARTS = {"first": 3.2, "second": 2.4, "nobody": 2.0, "silent": 2.4, "short": 0.8}


def pictures(seed, width=192, height=144):
    """A person whose mouth and head move, on a wide background."""
    person = make_person(seed, texture_size=128)
    made = []
    for i in range(6):
        opened = unit_weights({"jawOpen": 0.1 * i})
        face = render(person, opened, Pose(yaw=0.02 * i), size=height).image
        picture = np.full((height, width, 3), 40 * (seed % 5), np.uint8)
        picture[:, 24 : 24 + height] = face
        made.append(picture)
    return made


@pytest.fixture(scope="module")
def people():
    return {seed: pictures(seed) for seed in (7, 8)}


def wall(width=192, height=144):
    rows = np.linspace(0, 200, height)[:, None, None]
    return np.broadcast_to(rows, (height, width, 3)).astype(np.uint8)


def write_video(path, parts, sound=True, fps=SOURCE_FPS):
    """Parts are seconds, pictures to loop over, and whether somebody speaks."""
    speech = load_audio(DEMO)
    height, width = parts[0][1][0].shape[:2]
    with VideoWriter(path, width, height, fps, RATE if sound else None) as writer:
        for seconds, shown, speaks in parts:
            count = round(seconds * fps)
            samples = count * RATE // fps
            writer.write_audio(speech[RATE // 2 :][:samples] if speaks else np.zeros(samples))
            writer.write_frames(np.stack([shown[i // 3 % len(shown)] for i in range(count)]))
    return path


@pytest.fixture(scope="module")
def footage(people, tmp_path_factory):
    folder = tmp_path_factory.mktemp("footage")
    first, second = people.values()
    shown = dict(first=first, second=second, nobody=[wall()], silent=first, short=second)
    parts = [(s, shown[name], name != "silent") for name, s in PARTS.items()]
    write_video(folder / "talk.mp4", parts)
    (folder / "talk.txt").write_text("Two people talk.\n")
    write_video(folder / "mute.mp4", [(2.0, first, False)], sound=False)
    (folder / "broken.mp4").write_bytes(b"this is no video")
    (folder / "notes.pdf").write_bytes(b"nor is this")
    return folder


def make(footage, out, config=CONFIG, **options):
    start(config, out)
    notes = [cut_video(job) for job in plan(config, footage, out, **options)]
    return notes, finish(config, out)


@pytest.fixture(scope="module")
def made(footage, tmp_path_factory):
    """The command's result; it must be that of `CONFIG`."""
    spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    out = tmp_path_factory.mktemp("clips")
    options = "--size 64*64 --fps 16 --min_s 1.5 --max_s 4 --workers 1"
    assert script.main(["videos", "--src", str(footage), "--out", str(out), *options.split()]) == 0
    return out


def read_all(out):
    return [
        source[i]
        for split in records.SPLITS
        if any(Path(out).glob(f"{split}-*.array_record"))
        for source in [records.read_clips(out, split)]
        for i in range(len(source))
    ]


def test_people_who_talk_are_kept_and_everything_else_has_a_reason(made):
    kept = [clip.source for clip in read_all(made)]
    assert kept == ["talk.mp4@0.00s", "talk.mp4@3.19s"]
    lines = [json.loads(line) for line in (made / clips.REJECTED).read_text().splitlines()]
    reasons = [(line["video"], round(line.get("start_s", -1)), line["reason"]) for line in lines]
    assert reasons[0][:2] == ("broken.mp4", -1) and "cannot be read" in reasons[0][2]
    assert reasons[1] == ("mute.mp4", -1, "no sound")
    assert reasons[2] == ("talk.mp4", 6, "not exactly one face")
    assert reasons[3][:2] == ("talk.mp4", 8) and "silent" in reasons[3][2]
    assert reasons[4] == ("talk.mp4", 10, "shorter than 1.5 s")
    assert len(reasons) == 5


def test_statistics_tell_what_was_kept_and_why_the_rest_was_not(made):
    found = data_statistics(made)
    assert found["videos"] == 3 and found["kept"]["clips"] == found["clips"] == 2
    reasons = found["rejected"]["reasons"]
    plain = {"no sound", "not exactly one face", "silent (loudest sample #)", "shorter than # s"}
    (broken,) = reasons.keys() - plain
    assert broken.startswith("the file cannot be read") and set(reasons.values()) == {1}
    assert found["rejected"]["parts"] == 5 and plain < reasons.keys()
    assert found["counts"]["size"] == {"64x64": 2} and found["counts"]["caption"] == {"yes": 2}
    assert found["counts"]["people"]["different"] == 1
    shares = found["quantiles"]
    assert shares["speech_share"]["least"] >= CONFIG.speech_share
    assert shares["faces_found"]["mean"] > 0.6 and 0.3 < shares["face_height"]["median"] < 1
    assert "not exactly one face" in statistics_table(found)


@pytest.mark.parametrize(("tag", "language"), [("deu", "deu"), ("und", ""), (None, "")])
def test_the_language_is_what_the_file_says(tmp_path, tag, language):
    with av.open(str(tmp_path / "talk.mp4"), "w") as container:
        picture = container.add_stream("mpeg4", rate=16)
        picture.width, picture.height, picture.pix_fmt = 32, 32, "yuv420p"
        sound = container.add_stream("aac", rate=RATE)
        sound.metadata.update({"language": tag} if tag else {})
        for i in range(4):
            shown = av.VideoFrame.from_ndarray(wall(32, 32), format="rgb24")
            shown.pts = i
            container.mux(picture.encode(shown))
        container.mux(picture.encode())
        heard = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        heard.sample_rate = RATE
        container.mux(sound.encode(heard))
        container.mux(sound.encode())
    assert Footage(tmp_path / "talk.mp4", 16).language == language


def test_clips_show_the_face_with_its_sound(made):
    first, second = read_all(made)
    speech = load_audio(DEMO)[RATE // 2 :]
    # The second clip begins at a frame of its own rate, a little before the cut.
    early = round((PARTS["first"] - 51 / 16) * RATE)
    for clip, seconds, lag in ((first, PARTS["first"], 0), (second, PARTS["second"], early)):
        assert clip.frames.shape[1:] == (64, 64, 3) and (len(clip.frames) - 1) % 16 == 0
        assert seconds - 1.1 < len(clip.frames) / 16 <= seconds + 0.1
        assert len(FrontalFaces()(clip.frames[5])) == 1
        heard = clip.wave[lag : len(clip.frames) * 1000].astype(np.float32) / 32768
        assert np.corrcoef(heard, speech[: len(heard)])[0, 1] > 0.9
        assert clip.caption == "Two people talk." and clip.portrait is None
        assert clip.style == "video" and clip.person_id == first.person_id


def test_a_stopped_run_goes_on_to_the_same_set(footage, made, tmp_path, monkeypatch):
    real = records.write_shard

    def cut_off(path, kept):
        next(iter(kept))
        path.with_suffix(".part").write_bytes(b"half a shard")
        raise KeyboardInterrupt

    monkeypatch.setattr(records, "write_shard", cut_off)
    with pytest.raises(KeyboardInterrupt):
        make(footage, tmp_path)
    monkeypatch.setattr(records, "write_shard", real)
    looked = []
    jobs = plan(CONFIG, footage, tmp_path)
    assert [job.note.exists() for job in jobs] == [True, True, False]
    for job in jobs:
        cut_video(job, lambda frame: looked.append(1) or FrontalFaces(smallest=0.09)(frame))
    assert finish(CONFIG, tmp_path) == records.read_manifest(made)["data_hash"]
    assert (tmp_path / clips.REJECTED).read_bytes() == (made / clips.REJECTED).read_bytes()


def test_other_settings_do_not_go_into_the_same_folder(made):
    with pytest.raises(ValueError, match="fps 16 there, 25 asked for"):
        start(dataclasses.replace(CONFIG, fps=25), made)


def test_a_filter_of_ones_own_decides(footage, tmp_path):
    def too_calm(clip):
        return "calm" if clip.source.startswith("talk.mp4@0") else None

    notes, _ = make(footage, tmp_path, filters=[too_calm])
    assert notes[2]["clips"] == 1
    assert notes[2]["rejected"][0]["reason"] == "calm"


def test_long_stretches_become_pieces_of_equal_length():
    box = np.array([[0.3, 0.3, 0.5, 0.6]])
    for length, expected in ((51, [49]), (64, [49]), (130, [33, 33, 33]), (24, [])):
        pieces = list(clips.cut_stretch(CONFIG, Stretch(100, 100 + length, box)))
        assert [p.stop - p.start for p in pieces if p.reason is None] == expected
        assert all(100 <= p.start and p.stop <= 100 + length for p in pieces)


def test_small_faces_are_rejected_and_the_crop_follows_the_face(footage, tmp_path):
    job = plan(CONFIG, footage, tmp_path)[2]
    whole, close = (dataclasses.replace(CONFIG, face_zoom=zoom) for zoom in (0.0, 1.2))
    box = np.array([0.3, 0.3, 0.5, 0.6], np.float32)
    # 144 rows at most; 0.3 of them are the face.
    top, bottom, left, right = clips.crop_box((144, 192), box, whole)
    assert (bottom - top, right - left) == (144, 144)
    top, bottom, left, right = clips.crop_box((144, 192), box, close)
    assert abs(bottom - top - 0.3 * 144 * 1.2) <= 1 and bottom - top == right - left
    assert left <= 0.3 * 192 and 0.5 * 192 <= right and top <= 0.3 * 144
    strict = dataclasses.replace(job, config=dataclasses.replace(CONFIG, face_share=0.99))
    reasons = [piece.reason for piece in clips.find_pieces(strict, FrontalFaces())]
    assert any("of the picture's height" in (reason or "") for reason in reasons)


def test_a_folder_without_videos_is_refused(tmp_path):
    (tmp_path / "notes.pdf").touch()
    with pytest.raises(ValueError, match=r"has no videos; expected files that end in \.avi"):
        plan(CONFIG, tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": (60, 64)}, "multiples of 16"),
        ({"fps": 30}, "stream 16 or 25"),
        ({"min_s": 5.0, "max_s": 4.0}, "the smaller comes first"),
        ({"min_s": 4.0, "max_s": 4.0}, "widen the range"),
        ({"speech_share": 1.2}, r"within 0\.\.1"),
    ],
)
def test_settings_that_make_no_clips_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize("fps", [16, 25])
def test_frames_and_sound_are_where_their_times_say(tmp_path, fps):
    # The grey level tells the time, ten per source frame; a click is heard every half second.
    grey = [np.full((32, 32, 3), 5 * i, np.uint8) for i in range(50)]
    clicks = np.zeros(2 * RATE, np.float32)
    clicks[RATE // 2 :: RATE // 2] = 1.0
    with VideoWriter(tmp_path / "time.mp4", 32, 32, SOURCE_FPS, RATE) as writer:
        writer.write_audio(clicks)
        writer.write_frames(np.stack(grey))
    video = Footage(tmp_path / "time.mp4", fps)
    seen = np.array([frame.mean() for frame in video.frames()]) / 5 / SOURCE_FPS
    np.testing.assert_allclose(seen, np.arange(len(seen)) / fps, atol=0.5 / SOURCE_FPS + 0.01)
    assert len(seen) == 2 * fps
    # Entered in the middle, it shows the same.
    part = np.array([frame.mean() for frame in video.frames(fps, fps + 5)]) / 5 / SOURCE_FPS
    np.testing.assert_array_equal(part, seen[fps : fps + 5])
    heard = np.abs(video.sound().astype(np.float32))
    for second in (0.5, 1.0, 1.5):
        around = heard[int((second - 0.2) * RATE) : int((second + 0.2) * RATE)]
        assert abs(around.argmax() / RATE - 0.2) < 0.003


def test_cuts_are_found_and_movement_is_none():
    rng = np.random.default_rng(0)
    scenes = rng.integers(0, 255, (2, 36, 64, 3)).astype(np.uint8)
    detector = ShotCuts()
    for i in range(40):
        detector.watch(np.roll(scenes[i // 25], 3 * i, axis=1))
    assert detector.shots() == [(0, 40)]  # it moves all the time
    detector = ShotCuts()
    for i in range(40):
        detector.watch(scenes[i // 25])
    assert detector.shots() == [(0, 25), (25, 40)]


def test_stretches_end_where_the_face_is_lost_joined_or_elsewhere():
    here, there = np.array([0.1, 0.1, 0.4, 0.5]), np.array([0.6, 0.1, 0.9, 0.5])
    one, none, two = here[None], np.zeros((0, 4)), np.stack([here, there])
    tiny = np.stack([here, np.array([0.8, 0.8, 0.85, 0.85])])

    def stretches(*looks):
        found = single_face_stretches(list(zip(range(0, 99, 4), looks, strict=False)), 0, 40)
        return [(s.start, s.stop) for s in found]

    assert stretches(*[one] * 10) == [(0, 40)]
    assert stretches(one, one, none, one, none, none, one, one, one, one) == [(0, 40)]
    assert stretches(one, one, two, one, one, one, one, one, one, one) == [(0, 5), (12, 40)]
    assert stretches(*[one] * 5, *[there[None]] * 5) == [(0, 17), (20, 40)]
    assert stretches(*[tiny] * 10) == [(0, 40)]
    assert stretches(none, none, one, one, none, none, none, none, none, none) == [(8, 13)]
    assert stretches(*[none] * 10) == []


def test_speech_is_told_from_silence_and_hiss():
    speech = (load_audio(DEMO)[: 3 * RATE] * 32767).astype(np.int16)
    hiss = (300 * np.random.default_rng(0).standard_normal(3 * RATE)).astype(np.int16)
    assert speech_share(speech) > 0.7
    assert speech_share(np.zeros(RATE, np.int16)) == 0
    assert speech_share(hiss, strictness=3) < 0.5


@pytest.mark.parametrize(
    ("suffix", "codec", "kind"),
    [
        ("mov", "pcm_s16le", "s16"),
        ("mov", "pcm_s24le", "s32"),
        ("mov", "pcm_u8", "u8"),
        ("mov", "pcm_f64le", "dbl"),
        ("mov", "alac", "s16p"),
        ("mkv", "pcm_s32le", "s32"),
        ("mkv", "flac", "s16"),
        ("mp4", "aac", "fltp"),
    ],
)
@pytest.mark.parametrize("layout", ["mono", "stereo", "5.1"])
def test_every_kind_of_sound_is_the_same_sound(tmp_path, suffix, codec, kind, layout):
    rate, path = 48_000, tmp_path / f"a.{suffix}"
    sine = 0.1 * np.sin(2 * np.pi * 300 * np.arange(rate) / rate)
    channels = np.tile(sine, (av.AudioLayout(layout).nb_channels, 1)).astype(np.float32)
    frame = av.AudioFrame.from_ndarray(channels, "fltp", layout)
    frame.sample_rate, fifo = rate, av.AudioFifo()
    for part in av.AudioResampler(kind, layout, rate).resample(frame):
        fifo.write(part)
    with av.open(str(path), "w") as out:
        picture = out.add_stream("mpeg4", rate=25)
        sound = out.add_stream(codec, rate=rate, layout=layout)
        picture.width = picture.height = 32
        picture.pix_fmt, sound.format = "yuv420p", kind
        for part in (*[av.VideoFrame(32, 32, "yuv420p") for _ in range(25)], None):
            out.mux(picture.encode(part))
        while (part := fifo.read(sound.frame_size or 1024, partial=True)) is not None:
            out.mux(sound.encode(part))
        out.mux(sound.encode(None))
    heard = Footage(path, 25).sound() / 32768
    assert abs(len(heard) / RATE - 1) < 0.07
    assert abs(np.sqrt((heard[2000:-2000] ** 2).mean()) - 0.1 / np.sqrt(2)) < 0.002
    assert abs(np.abs(np.fft.rfft(heard[1000:9000])).argmax() * 2 - 300) <= 2


def quadrants():
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:16, :32], picture[:16, 32:], picture[16:, :32] = 240, 160, 80
    return picture


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ((1, 0, 0, 1), lambda x: x),
        ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
        ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
        ((0, -1, 1, 0), np.rot90),
        ((-1, 0, 0, 1), np.fliplr),
        ((1, 0, 0, -1), np.flipud),
        ((0, 1, 1, 0), lambda x: x.transpose(1, 0, 2)),
        ((0, -1, -1, 0), lambda x: np.rot90(x, 2).transpose(1, 0, 2)),
    ],
)
def test_pictures_stand_as_players_show_them(tmp_path, matrix, expected):
    with VideoWriter(tmp_path / "a.mp4", 64, 32, 25, is_marked=False) as writer:
        writer.write_frames(np.stack([quadrants()] * 3))
    data = (tmp_path / "a.mp4").read_bytes()
    a, b, c, d = (65536 * x for x in matrix)
    placed = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    for header in re.finditer(b"tkhd", data):
        at = header.start() + 44  # the matrix of a track header, ISO/IEC 14496-12
        data = data[:at] + placed + data[at + 36 :]
    (tmp_path / "a.mp4").write_bytes(data)
    shown = next(Footage(tmp_path / "a.mp4", 25).frames()).astype(int)
    assert shown.shape == expected(quadrants()).shape
    assert np.abs(shown - expected(quadrants())).mean() < 6


@pytest.mark.parametrize(("aspect", "width"), [(2, 128), (Fraction(1, 2), 32), (1, 64)])
def test_pixels_that_are_not_square_become_square(tmp_path, aspect, width):
    with av.open(str(tmp_path / "a.mkv"), "w") as out:
        stream = out.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        for part in (av.VideoFrame.from_ndarray(quadrants(), format="rgb24"), None):
            out.mux(stream.encode(part))
    assert next(Footage(tmp_path / "a.mkv", 25).frames()).shape == (32, width, 3)


def test_a_file_that_begins_late_begins_with_its_first_picture(tmp_path):
    grey = np.stack([np.full((32, 32, 3), 5 * i, np.uint8) for i in range(50)])
    clicks = np.zeros(2 * RATE, np.float32)
    clicks[RATE] = 1.0
    with VideoWriter(tmp_path / "a.mp4", 32, 32, 25, RATE, is_marked=False) as writer:
        writer.write_audio(clicks)
        writer.write_frames(grey)
    with av.open(str(tmp_path / "a.mp4")) as old, av.open(str(tmp_path / "a.ts"), "w") as new:
        tracks = {stream.index: new.add_stream_from_template(stream) for stream in old.streams}
        for packet in old.demux():
            if packet.dts is not None:
                late = round(1.5 / packet.time_base)
                packet.pts, packet.dts = packet.pts + late, packet.dts + late
                packet.stream = tracks[packet.stream.index]
                new.mux(packet)
    late = Footage(tmp_path / "a.ts", 25)
    assert late.begin_s > 1
    seen = np.array([frame.mean() for frame in late.frames()]) / 5
    np.testing.assert_allclose(seen, np.arange(50), atol=0.6)
    assert abs(np.abs(late.sound().astype(int)).argmax() / RATE - 1.0) < 0.003
