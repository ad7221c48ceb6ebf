"""Portraits and frames of them moving: framing, curves, exact flow."""

import dataclasses
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("numba")

from jax_avatar.data.talking_people import head_motion
from jax_avatar.data.talking_people.head_motion import CURVES, SCALE, index, mirrored
from jax_avatar.data.talking_people.moved_portraits import (
    MovedPortrait,
    MovedPortraitsConfig,
    load_moved_portrait,
    make_moved_portrait,
)
from jax_avatar.data.talking_people.person import make_person
from jax_avatar.data.talking_people.render import Pose, posed_vertices, project, unit_weights
from jax_avatar.models.vae import rigid_head
from jax_avatar.portraits.framing import EYES_AND_MOUTH, Framing

pytestmark = pytest.mark.skipif(shutil.which("flite") is None, reason="flite is not installed")

NANO = MovedPortraitsConfig(size=64, count=6, texture_size=64, movement=(1.0, 1.0))
FIELDS = [field.name for field in dataclasses.fields(MovedPortrait)]


@pytest.fixture(scope="module")
def made():
    return make_moved_portrait(3, NANO)


def poses(made):
    rows = made.motion[np.arange(len(made.offset)), made.offset]
    chosen = index(*head_motion.POSE)
    return rows[:, chosen] * SCALE[chosen]


def test_a_seed_is_a_set_and_survives_the_folder(made, tmp_path):
    for _ in range(2):  # rendered, then read
        back = load_moved_portrait(tmp_path, 3, NANO)
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(made, name), getattr(back, name))
    assert [path.name for path in tmp_path.iterdir()] == ["000003.npz"]


def test_the_flow_leads_to_the_portraits_pixels(made):
    x = (np.arange(64) + 0.5) / 64
    there = np.stack(np.meshgrid(x, x), -1) + made.flow
    column, row = np.clip((there * 64).astype(int), 0, 63).transpose(3, 0, 1, 2)
    seen = made.seen.astype(bool)
    frames = made.frames.astype(float)
    warped = np.abs(made.portrait[row, column] - frames)[seen].mean()
    still = np.abs(made.portrait - frames)[seen].mean()
    assert warped < 0.6 * still
    assert 0.8 < seen.mean() < 1


def test_turn_and_place_of_the_head_explain_most_of_the_flow(made):
    head = rigid_head.HeadShape(
        *(jnp.asarray(m, jnp.float32)[None, ..., None] for m in (made.depth, made.head_weight)),
        jnp.asarray(made.camera[:3]),
        jnp.asarray(made.camera[3]),
    )
    found = np.asarray(rigid_head.source(jnp.asarray(poses(made)), head))
    truth = np.asarray(rigid_head.grid(64, 64)) + made.flow
    inside = made.seen.astype(bool) & (made.surface == 255)
    error, size = (
        np.abs(truth - np.asarray(x)).sum(-1)[inside]
        for x in (found, rigid_head.grid(64, 64)[None])
    )
    assert np.median(error) < 0.003 < 0.15 * np.median(size)


def test_eyes_and_mouth_of_every_portrait_are_in_the_same_places():
    for seed, pose in ((0, Pose()), (3, Pose(yaw=0.1, roll=0.1))):
        person = make_person(seed, texture_size=64)
        vertices = posed_vertices(person, unit_weights({}), pose)
        points = head_motion.eyes_and_mouth(person, vertices)
        framed = Framing.of(points)(points)
        np.testing.assert_allclose(framed, EYES_AND_MOUTH, atol=0.03)
        moved = Framing.of(1.3 * points @ [[0.8, 0.6], [-0.6, 0.8]] + 2)
        again = moved(1.3 * points @ [[0.8, 0.6], [-0.6, 0.8]] + 2)
        np.testing.assert_allclose(again, framed, atol=1e-6)


def test_a_still_head_has_no_pose():
    person = make_person(0, texture_size=64)
    pose = Pose(yaw=0.1, pitch=-0.1, roll=0.05)
    vertices = posed_vertices(person, unit_weights({}), pose)
    framing = Framing.of(head_motion.eyes_and_mouth(person, vertices))
    camera = head_motion.Camera(person, pose, framing)
    np.testing.assert_allclose(camera.head(pose), np.zeros(6), atol=1e-6)
    turned = camera.head(Pose(yaw=0.4, pitch=-0.1, roll=0.05))
    assert turned[0] > 0.25 and turned[3] > 0.05  # the face turns and goes to the right
    assert project(person, vertices, 1)[0].shape == (len(vertices), 2)


def test_mirrored_curves_swap_sides():
    curves = np.zeros((2, len(CURVES)), np.float32)
    curves[:, index("eyeBlinkLeft", "yaw", "pitch")] = 1, 2, 3
    flipped = mirrored(curves)
    assert flipped[0, index("eyeBlinkRight", "yaw", "pitch")].tolist() == [1, -2, 3]
    np.testing.assert_array_equal(mirrored(flipped), curves)


def test_pictures_are_as_many_and_as_large_as_told(made):
    larger = make_moved_portrait(3, dataclasses.replace(NANO, size=128, count=5))
    assert made.frames.shape == (6, 64, 64, 3) and made.motion.shape == (6, 4, len(CURVES))
    assert larger.frames.shape == (5, 128, 128, 3) and larger.flow.shape == (5, 64, 64, 2)
    finer = make_moved_portrait(3, dataclasses.replace(NANO, texture_size=128))
    np.testing.assert_array_equal(finer.flow, made.flow)
    assert (finer.portrait != made.portrait).any()


def test_movement_scales_the_head():
    less = make_moved_portrait(3, dataclasses.replace(NANO, movement=(0.25, 0.25)))
    more = make_moved_portrait(3, dataclasses.replace(NANO, movement=(0.5, 0.5)))
    sizes = [np.abs(poses(m)[:, 0]).mean() for m in (less, more)]
    assert 1.5 < sizes[1] / sizes[0] < 3


def test_plain_sets_are_whole_windows_of_a_clip():
    config = dataclasses.replace(NANO, is_plain=True, count=8)
    slow = make_moved_portrait(3, dataclasses.replace(config, fps=100))
    fast = make_moved_portrait(3, config)
    assert slow.offset.tolist() == [0, 1, 2, 3] * 2
    np.testing.assert_array_equal(slow.motion[0], slow.motion[3])
    change = [np.abs(np.diff(poses(m), axis=0)).mean() for m in (slow, fast)]
    assert change[0] < change[1]


def test_plain_sets_come_with_the_sound_of_their_lips(made):
    config = dataclasses.replace(NANO, is_plain=True, count=100)
    plain = make_moved_portrait(4, dataclasses.replace(config, texture_size=32))
    assert len(plain.wave) >= 101 * 640 and len(made.wave) == 0
    loud = np.sqrt(np.square(plain.wave[640 : 101 * 640].reshape(100, 640)).mean(1))

    def agreement(shift):
        return np.corrcoef(np.roll(plain.lip_gap, shift), loud)[0, 1]

    assert agreement(0) > 0.25
    assert agreement(0) > max(agreement(shift) for shift in (-12, -8, 8, 12)) + 0.1


def test_a_folder_of_other_settings_is_refused(tmp_path):
    config = dataclasses.replace(NANO, texture_size=32)
    load_moved_portrait(tmp_path, 3, config)
    with pytest.raises(ValueError, match="is of other settings"):
        load_moved_portrait(tmp_path, 3, dataclasses.replace(config, count=5))


@pytest.mark.parametrize("setting", [{"size": 100}, {"count": 2}])
def test_impossible_settings_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        dataclasses.replace(NANO, **setting)
