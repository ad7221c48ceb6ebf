"""The anchored VAE: reading between pixels, the rigid head, latents, one portrait at every size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_avatar.models.network import Network, flatten
from jax_avatar.models.vae import rigid_head, warp
from jax_avatar.models.vae.anchored import AnchoredVAE, AnchoredVAEConfig
from jax_avatar.testing import ANCHORED as NANO
from jax_avatar.testing import make_anchored_vae

CURVES = NANO.curves


@pytest.fixture(scope="module")
def vae():
    return make_anchored_vae().bind()


@pytest.fixture(scope="module")
def portraits():
    noise = jax.random.uniform(jax.random.key(2), (2, 16, 16, 3), minval=-1, maxval=1)
    return warp.enlarged(noise, 128)


@pytest.fixture(scope="module")
def latents():
    return jax.random.normal(jax.random.key(3), (2, 3, 2, 2, 4))


@pytest.fixture(scope="module")
def decode():
    return jax.jit(lambda vae, state, z: vae.decode_next(state, z)[0])


@pytest.fixture(scope="module")
def frames(vae, portraits, latents, decode):
    return decode(vae, vae.prepare(portraits), latents)


def test_folding_is_undone_and_reading_in_place_changes_nothing(portraits):
    folded = warp.fold(portraits, 4)
    assert folded.shape == (2, 32, 32, 48)
    np.testing.assert_array_equal(warp.unfold(folded, 4), portraits)
    here = jnp.broadcast_to(warp.grid(128, 128)[None], (4, 128, 128, 2))
    seen = warp.read(warp.packed(portraits), here)
    np.testing.assert_allclose(seen[1], portraits[0], atol=1e-4)
    np.testing.assert_allclose(seen[2], portraits[1], atol=1e-4)
    aside = warp.read(warp.packed(portraits), here.at[..., 0].add(1 / 128))
    np.testing.assert_allclose(aside[0, :, :-2], portraits[0, :, 1:-1], atol=1e-4)


def test_sizes_change_without_a_shift(portraits):
    for side in (160, 256):
        back = warp.shrunk(warp.enlarged(portraits, side), 128)
        np.testing.assert_allclose(back, portraits, atol=0.2)
        assert abs(float(jnp.mean(back - portraits))) < 1e-3


def make_head(weight):
    at = warp.grid(32, 32) - 0.5
    depth = (0.3 - (at**2).sum(-1))[None, ..., None]
    lever = jnp.array([0.0, -0.4, 0.4])
    return rigid_head.HeadShape(depth, jnp.full_like(depth, weight), lever, jnp.asarray(5.0))


POSE = jnp.array([[0.15, 0.1, -0.1, 0.03, -0.02, 0.02]])


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_source_of_a_frame_is_the_inverse_of_its_motion(weight):
    head = make_head(weight)
    at = rigid_head.source(POSE, head)
    depth = warp.read(warp.packed(head.depth), at)
    back = rigid_head.moved(POSE, at, depth, jnp.full_like(depth, weight), head)
    inside = slice(8, 24)
    np.testing.assert_allclose(
        back[:, inside, inside], warp.grid(32, 32)[None, inside, inside], atol=2e-3
    )


def test_the_bridge_of_the_nose_goes_where_the_pose_says():
    at = jnp.asarray(rigid_head.BRIDGE).reshape(1, 1, 1, 2)
    none = jnp.zeros((1, 1, 1, 1))
    there = rigid_head.moved(POSE, at, none, none + 1, make_head(1.0))
    np.testing.assert_allclose(there[0, 0, 0], at[0, 0, 0] + POSE[0, 3:5], atol=1e-6)


def test_shoulders_stay_where_only_the_neck_turns():
    head = make_head(0.0)
    pose = jnp.array([[0.2, 0.0, 0.0, 0.0, 0.0, 0.0]])
    swing = rigid_head.turn(pose)[0] @ head.lever - head.lever
    near = swing[2]  # towards the camera, which enlarges the face
    growth = 1 / (1 - near / head.focal) - 1
    centre = jnp.asarray(rigid_head.BRIDGE) - 0.5
    place = (centre + swing[:2]) * (1 + growth) - centre
    pose = pose.at[0, 3:].set(jnp.array([*place, growth]))
    here = warp.grid(32, 32)[None]
    there = rigid_head.moved(pose, here, head.depth, head.weight, head)
    np.testing.assert_allclose(there, here, atol=1e-4)


def test_latents_do_not_depend_on_each_other(vae, portraits, latents, decode, frames):
    state = vae.prepare(portraits)
    assert frames.shape == (2, 12, 128, 128, 3)
    for i in range(3):
        part = decode(vae, state, latents[:, i : i + 1])
        np.testing.assert_allclose(part, frames[:, 4 * i : 4 * i + 4], atol=2e-4)
    beside = vae.prepare(portraits.at[0].multiply(-1)), latents.at[0].add(1)
    found = decode(vae, *beside)
    np.testing.assert_allclose(found[1], frames[1], atol=2e-4)
    assert jnp.abs(found[0] - frames[0]).max() > 1e-2


def test_a_clip_begins_with_its_portrait(vae, portraits, latents, decode, frames):
    first, state = jax.jit(lambda vae, *given: vae.start(*given))(
        vae, portraits[:, None], vae.encode_still(portraits[:, None], 1)
    )
    np.testing.assert_array_equal(first[:, 0], portraits)
    np.testing.assert_allclose(decode(vae, state, latents), frames, atol=2e-4)


def test_a_portrait_that_stands_still_has_the_latent_of_no_motion(vae, portraits):
    video = portraits[:, None]
    still = vae.encode_still(video, 3)
    np.testing.assert_array_equal(still, jnp.repeat(vae.encode(video), 3, 1))
    np.testing.assert_array_equal(still, vae.encode_still(-video, 3))
    moving = jnp.repeat(video, 5, 1).at[:, 1:].multiply(0.5)
    other = vae.encode_clip(portraits, moving.at[:, 0].set(0))
    np.testing.assert_array_equal(other, vae.encode(moving))


def test_other_sizes_show_the_same(vae, portraits, latents, decode, frames):
    for side in (160, 256):
        larger = decode(vae, vae.prepare(warp.enlarged(portraits, side)), latents[:, :1])
        assert larger.shape == (2, 4, side, side, 3)
        small = warp.shrunk(larger.reshape(8, side, side, 3), 128)
        error = jnp.abs(small - frames[:, :4].reshape(small.shape)).mean()
        assert error < 0.4 * jnp.abs(frames - frames.mean()).mean()


def test_a_clip_that_does_not_move_has_the_latent_of_no_motion(vae, portraits):
    video = jnp.repeat(portraits[:, None], 5, 1).at[:, 1:].multiply(0.5)
    latent = vae.encode(video)
    assert latent.shape == (2, 2, 2, 2, 4)
    rest = vae.basis.to_latent(jnp.zeros((1, 4, len(CURVES))))
    np.testing.assert_allclose(latent[:, 0].reshape(2, -1), jnp.repeat(rest, 2, 0), atol=1e-6)
    assert jnp.abs(latent[:, 1] - latent[:, 0]).max() > 1e-3


def test_wrong_shapes_are_refused(vae, portraits):
    with pytest.raises(ValueError, match="of 3 frames of 128x128"):
        vae.encode(jnp.repeat(portraits[:, None], 3, 1))
    with pytest.raises(
        ValueError, match=r"64\*64 pixels: .* squares with even sides of 128 to 2048 pixels"
    ):
        vae.prepare(warp.shrunk(portraits, 64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temporal_stride": 8}, "only 4"),
        ({"scale": (1.0,)}, "1 numbers for 10 curves"),
        ({"leading": ("smile",)}, r"\['smile'\] are none of"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(NANO, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"curves": (*CURVES, "smile"), "scale": (*NANO.scale, 0.3)},
        {"leading": ("jawOpen",)},
        {"latent_shape": (1, 1, 8)},
        {"feature_widths": (4, 4, 8, 4)},
        {"code_width": 8},
        {"flow_width": 8},
        {"frame_width": 8},
        {"face_width": 8},
        {"encoder_widths": (4, 8, 4)},
    ],
)
def test_every_size_is_in_the_weights(settings):
    def shapes(config):
        params = Network.abstract(AnchoredVAE, config).params
        return {name: leaf.shape for name, leaf in flatten(params).items()}

    assert shapes(dataclasses.replace(NANO, **settings)) != shapes(NANO)


def test_curves_are_in_their_own_units():
    pose = NANO.pose(jnp.ones(len(CURVES)))
    np.testing.assert_allclose(pose, NANO.scale[2:8])
    assert AnchoredVAEConfig(**NANO.to_dict()) == NANO


def test_what_is_hidden_is_filled_in_from_around():
    x = warp.grid(32, 32)[None]
    picture = jnp.concatenate([x, x.sum(-1, keepdims=True)], -1)
    known = jnp.ones((1, 32, 32, 1)).at[:, 10:20, 12:22].set(0)
    found = warp.filled(jnp.where(known > 0, picture, 9.0), known)
    np.testing.assert_allclose(found, picture, atol=0.15)
    np.testing.assert_array_equal(found[:, :10], picture[:, :10])
    assert warp.widened(1 - known, 2).sum() == 14 * 14
