import dataclasses
import importlib.util
import itertools
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("numba")

from jax_avatar.data import records
from jax_avatar.data.talking_people import cartoon, clips, mesh, motion, speech
from jax_avatar.data.talking_people.person import change_scene, make_person
from jax_avatar.data.talking_people.render import (
    FRONTAL,
    Pose,
    posed_vertices,
    render,
    render_portrait,
    unit_weights,
)

needs_flite = pytest.mark.skipif(shutil.which("flite") is None, reason="flite is not installed")

NANO = clips.PeopleConfig(
    people=4,
    clips_per_person=2,
    held_out_people=2,
    held_out_clips=3,
    cartoon_clips=1,
    size=32,
    num_frames=5,
    texture_size=128,
    people_per_shard=2,
)


@pytest.fixture(scope="module")
def person():
    return make_person(7, texture_size=128)


def test_a_seed_is_a_person(person):
    again = make_person(7, texture_size=128)
    other = make_person(8, texture_size=128)
    np.testing.assert_array_equal(person.vertices, again.vertices)
    np.testing.assert_array_equal(person.texture, again.texture)
    assert np.abs(person.vertices - other.vertices).max() > 0.01


def test_a_person_keeps_the_face_at_another_texture_size(person):
    fine = make_person(7, texture_size=256)
    np.testing.assert_array_equal(person.vertices, fine.vertices)
    a, b = (render_portrait(p, 32).astype(float) for p in (person, fine))
    assert np.abs(a - b).mean() < 8


@pytest.mark.parametrize("size", [32, 96])
def test_the_lip_gap_rises_with_the_jaw(person, size):
    opened = [
        render(person, unit_weights({"jawOpen": w}), Pose(yaw=0.1), size=size)
        for w in (0.0, 0.2, 0.5, 0.9)
    ]
    gaps = [drawing.lip_gap for drawing in opened]
    assert gaps[0] == 0
    assert all(b > a + 0.02 for a, b in itertools.pairwise(gaps))
    left, top, right, bottom = opened[-1].mouth_box
    assert 0.3 * size < left < right < 0.7 * size
    assert 0.5 * size < top < bottom < 0.95 * size
    closed, open_ = (drawing.image.astype(float) for drawing in (opened[0], opened[-1]))
    rows, columns = slice(int(top), int(bottom) + 1), slice(int(left), int(right) + 1)
    changed = np.abs(open_ - closed)
    assert changed[rows, columns].mean() > 3 * changed.mean()


@pytest.mark.parametrize("seed", range(0, 40, 8))
def test_the_portrait_has_its_mouth_closed(seed):
    rest = render(make_person(seed, texture_size=64), unit_weights({}), size=32)
    assert rest.lip_gap < 0.002


def test_turning_the_head_moves_the_mouth_that_way(person):
    middle = [
        render(person, unit_weights({}), Pose(yaw=yaw), size=96).mouth_box[[0, 2]].mean()
        for yaw in (-0.2, 0.0, 0.2)
    ]
    assert middle[0] < middle[1] - 3
    assert middle[2] > middle[1] + 3


def test_every_head_turns_about_its_own_neck():
    """The chins of these two stand more than a decimetre apart."""
    short, tall = make_person(3, texture_size=64), make_person(4, texture_size=64)
    face = mesh.load_face_mesh()
    assert abs(short.vertices[face.chin, 1] - tall.vertices[face.chin, 1]) > 1

    def moved(person, pose):  # of neck and mouth, in heights of the head
        still, turned = (posed_vertices(person, unit_weights({}), p) for p in (FRONTAL, pose))
        height = person.vertices[face.crown, 1] - person.vertices[face.chin, 1]
        return [(turned - still)[part].mean(0) / height for part in (face.neck, face.lips)]

    for pose in (Pose(yaw=0.3), Pose(pitch=0.3), Pose(roll=0.3)):
        (neck, mouth), (other_neck, other_mouth) = moved(short, pose), moved(tall, pose)
        assert max(np.abs(neck).max(), np.abs(other_neck).max()) < 0.04
        np.testing.assert_allclose(mouth, other_mouth, atol=0.04)


def test_another_scene_shows_the_same_face(person):
    scene = change_scene(person, 3)
    assert scene.vertices is person.vertices
    assert np.abs(render_portrait(scene, 32).astype(int) - render_portrait(person, 32)).mean() > 2


def test_an_unknown_unit_is_refused(person):
    with pytest.raises(ValueError, match="jawOpn"):
        unit_weights({"jawOpn": 1.0})
    with pytest.raises(ValueError, match="unit_weights"):
        render(person, np.zeros(3, np.float32))


def test_a_cartoon_opens_its_mouth_too():
    figure = cartoon.make_cartoon(0)
    closed = cartoon.draw(figure, unit_weights({}), size=32)
    opened = cartoon.draw(figure, unit_weights({"jawOpen": 0.8}), size=32)
    assert closed.image.shape == (32, 32, 3)
    assert closed.lip_gap == 0 < opened.lip_gap
    left, top, right, bottom = np.round(opened.mouth_box).astype(int)
    changed = np.abs(opened.image.astype(int) - closed.image)
    assert changed[top:bottom, left:right].mean() > 3 * changed.mean()


def test_motion_stays_small_and_actions_stay_inside_the_clip():
    rng = np.random.default_rng(0)
    drawn = [motion.make_motion(rng, 49, 16) for _ in range(200)]
    angles = np.concatenate([m.pose[:, :3] for m in drawn])
    np.testing.assert_allclose(angles.std(0), [0.08, 0.05, 0.04], rtol=0.4)
    assert all(0 <= c.min() and c.max() <= 1 for m in drawn for c in m.units.values())
    acting = [m for m in drawn if m.actions]
    assert 0.2 < len(acting) / len(drawn) < 0.4
    for action in (a for m in acting for a in m.actions):
        assert 0 <= action.start_s < action.end_s <= 49 / 16
        assert action.caption == motion.ACTIONS[action.name]
    assert {a.name for m in acting for a in m.actions} == set(motion.ACTIONS)


def test_splits_share_neither_people_nor_voices_they_should_not():
    config = clips.PeopleConfig()
    who = {
        split: {clips.person_seed(config, split, i) for i in range(config.num_clips(split))}
        for split in records.SPLITS
    }
    said = {split: set(clips.voices(split)) for split in records.SPLITS}
    assert len(who["train"]) == config.people
    assert not who["train"] & (who["held_out_person"] | who["held_out_both"])
    assert who["held_out_voice"] <= who["train"]
    assert not said["train"] & (said["held_out_voice"] | said["held_out_both"])
    assert said["held_out_person"] == said["train"]
    other = dataclasses.replace(config, seed=1)
    assert clips.person_seed(other, "train", 0) not in who["train"] | who["held_out_both"]


def test_shards_hold_every_clip_once():
    for split in records.SPLITS:
        held = [i for shard in NANO.shards(split) for i in shard]
        assert held == list(range(NANO.num_clips(split)))


@pytest.mark.parametrize("setting", [{"num_frames": 48}, {"fps": 15}, {"people": 0}])
def test_impossible_settings_are_refused(setting):
    name = next(iter(setting))
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(NANO, **setting)


@needs_flite
def test_a_clip_is_the_same_every_time_and_survives_the_disk():
    clip, again = (clips.make_clip(NANO, "held_out_both", 1) for _ in range(2))
    back = records.decode_clip(records.encode_clip(clip))
    for other in (again, back):
        for field in dataclasses.fields(clip):
            ours, theirs = getattr(clip, field.name), getattr(other, field.name)
            np.testing.assert_array_equal(ours, theirs, err_msg=field.name)
            if isinstance(ours, np.ndarray):
                assert ours.dtype == theirs.dtype
    assert clip.voice == speech.HELD_OUT_VOICE
    assert clip.frames.shape == (5, 32, 32, 3)
    assert clip.wave.shape == (5 * 1000 + clips.LOOKAHEAD_SAMPLES,)
    assert clip.units.shape == (5, len(mesh.load_face_mesh().unit_names))


@needs_flite
def test_the_lips_follow_the_units():
    config = dataclasses.replace(NANO, num_frames=49)
    jaw = mesh.load_face_mesh().unit_names.index("jawOpen")
    clip = clips.make_clip(config, "train", 2)
    correlation = np.corrcoef(clip.lip_gap, clip.units[:, jaw].astype(np.float32))[0, 1]
    assert correlation > 0.9
    assert clip.phones[0][1] <= 0 < clip.phones[-1][2]


@needs_flite
def test_speech_outweighs_silence():
    rng = np.random.default_rng(0)
    talks = [clips.make_talk(rng, speech.TRAINING_VOICES, 49, 16) for _ in range(6)]
    silent = [
        sum(p.end_s - p.start_s for p in talk.phones if p.name in ("pau", "sil", "ssil"))
        for talk in talks
    ]
    assert np.mean(silent) < 0.35 * 49 / 16
    opening = np.concatenate([talk.mouth["jawOpen"] for talk in talks])
    assert opening.std() > 0.1


@needs_flite
def test_a_stopped_run_goes_on_and_other_settings_are_refused(tmp_path):
    clips.start_manifest(NANO, tmp_path)
    jobs = clips.plan_shards(NANO, tmp_path)
    train = [job for job in jobs if job.split == "train"]
    assert clips.write_shard(train[0]) == 4 * NANO.num_frames
    whole = train[0].path.read_bytes()
    train[1].path.with_suffix(".part").write_bytes(b"torn")  # as a killed run leaves it
    assert len(records.read_clips(tmp_path)) == 4

    clips.start_manifest(NANO, tmp_path)
    assert [clips.write_shard(job) for job in train] == [0, 4 * NANO.num_frames]
    assert train[0].path.read_bytes() == whole
    source = records.read_clips(tmp_path)
    assert len(source) == NANO.num_clips("train")
    assert [source[i].person_id for i in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]

    with pytest.raises(ValueError, match="size 32 there, 64 asked for"):
        clips.start_manifest(dataclasses.replace(NANO, size=64), tmp_path)
    assert records.read_manifest(tmp_path)["complete"] is False


def test_missing_data_is_named_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(ValueError, match=r"prepare_data\.py people"):
        records.read_clips(tmp_path)
    with pytest.raises(ValueError, match="expected one of"):
        records.read_clips(tmp_path, "test")


def load_command():
    path = pathlib.Path(__file__).parents[2] / "launch" / "prepare_data.py"
    spec = importlib.util.spec_from_file_location("prepare_data", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_missing_flite_is_named(monkeypatch, capsys, tmp_path):
    prepare_data = load_command()
    monkeypatch.setattr(prepare_data.shutil, "which", lambda name: None)
    assert prepare_data.main(["people", "--out", str(tmp_path / "people")]) == 2
    assert "install the package `flite`" in capsys.readouterr().err
    assert not (tmp_path / "people").exists()


def test_the_portraits_of_the_package_are_of_nobody_in_training():
    config = clips.PeopleConfig()
    trained = {clips.person_seed(config, "train", i) for i in range(config.num_clips("train"))}
    folder = pathlib.Path(records.__file__).parents[1] / "assets" / "portraits"
    for name, (person, _) in load_command().PORTRAITS.items():
        assert person not in trained
        picture = Image.open(folder / f"{name}.png")
        assert picture.size == (256, 256)
        assert (folder / f"{name}.png").stat().st_size < 150_000
