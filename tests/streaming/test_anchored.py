"""Streams of a VAE that is anchored in the portrait: one set of weights, pictures of all sizes."""

import jax
import numpy as np
import pytest
from PIL import Image

from jax_avatar.layout import make_training_mesh
from jax_avatar.pixels import from_uint8, to_uint8
from jax_avatar.streaming.batch import BatchStream
from jax_avatar.streaming.session import AvatarSession
from jax_avatar.testing import save_model
from jax_avatar.training.run.placement import place_state
from jax_avatar.weights.folder import export_model, load_model
from jax_avatar.weights.hashes import content_hash

RATE = 16_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return save_model(folder, vae="anchored", sigmas=[1.0, 0.5, 0.0], decode_latents=1)


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


def make_portrait(side, seed=0):
    """A smooth picture, the same one at every size."""
    coarse = np.random.default_rng(seed).integers(256, size=(16, 16, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((side, side), Image.Resampling.BILINEAR)
    return from_uint8(np.asarray(picture))[None, None]


@pytest.fixture(scope="module")
def session(model):
    return AvatarSession(model, make_portrait(128))


@pytest.fixture(scope="module")
def voice():
    return 0.1 * np.random.default_rng(1).normal(size=RATE).astype(np.float32)


def frames_of(session, samples):
    return np.concatenate([*session.push(samples), *session.finish()])


@pytest.fixture(scope="module")
def shown(session, voice):
    """Latents of a stream, and its frames."""
    latents, push = [], session.decoder.push

    def noted(block):
        latents.append(np.asarray(block))
        push(block)

    session.decoder.push = noted
    frames = frames_of(session, voice)
    del session.decoder.push  # the class's again
    return np.concatenate(latents, 1), frames


def test_a_stream_shows_its_latents_from_the_end_of_the_first_on(session, shown):
    latents, frames = shown
    assert frames.shape == (16, 128, 128, 3) and session.portrait_error == 0

    @jax.jit
    def decode(vae, portrait, latents):
        network = vae.bind()
        return network.decode_next(network.start(portrait, latents[:, :1])[1], latents)[0]

    whole = to_uint8(np.asarray(decode(session.model.vae, session.portrait, latents)[0]))
    np.testing.assert_allclose(frames, whole[3 : 3 + len(frames)], atol=1)
    assert np.abs(np.diff(frames.astype(int), axis=0)).mean() > 1


def test_the_state_stays_where_it_is_from_piece_to_piece(session, shown):
    def places():
        return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(session.decoder.state)]

    session.reset()
    before, latents = places(), shown[0]
    session.decoder.decode(jax.device_put(latents[:, :1]))
    assert places() == before


def test_another_portrait_moves_alike(session, shown, voice):
    session.reset(make_portrait(128, seed=1))
    other = frames_of(session, voice)
    assert np.abs(other.astype(int) - shown[1]).mean() > 10
    session.reset(make_portrait(128))
    np.testing.assert_array_equal(frames_of(session, voice), shown[1])
    with pytest.raises(ValueError, match="for a session made for"):
        session.reset(make_portrait(192))


@pytest.mark.parametrize("layout", ["3", *(pytest.param(n, marks=pytest.mark.slow) for n in "2")])
def test_every_layout_shows_the_same(model, shown, voice, layout):
    frames = frames_of(AvatarSession(model, make_portrait(128), layout), voice)
    np.testing.assert_allclose(frames, shown[1], atol=1)


def test_the_same_weights_make_other_sizes(model, session, shown, voice):
    larger = AvatarSession(model, make_portrait(192))
    np.testing.assert_array_equal(larger.still, session.still)
    frames = frames_of(larger, voice[: RATE // 4])
    assert frames.shape == (4, 192, 192, 3)
    seen = frames[:, 1::3, 1::3].astype(int), shown[1][:4, 1::2, 1::2].astype(int)
    assert np.abs(seen[0] - seen[1]).mean() < 0.5 * np.abs(seen[1] - seen[1].mean()).mean()


def test_sizes_that_the_vae_does_not_make_are_refused(folder, model):
    message = r"squares with even sides of 128 to 2048 pixels, such as 256\*256"
    for height, width in ((96, 96), (128, 192), (129, 129)):
        portrait = np.zeros((1, 1, height, width, 3), np.float32)
        with pytest.raises(ValueError, match=rf"^{height}\*{width} pixels: .* {message}"):
            AvatarSession(model, portrait)
    with pytest.raises(ValueError, match=r"stream\.size of the model in .*: 96\*96 pixels"):
        load_model(folder, size=(96, 96))


def test_an_exported_model_is_whole(tmp_path, folder, model):
    dit = model.dit
    export_model(tmp_path, folder, dit.params, dit.config, {}, stream={"fps": 16}, name="copy")
    again = load_model(tmp_path)
    assert again.name == "copy" and again.settings == model.settings
    assert again.vae.config == model.vae.config
    assert content_hash(tmp_path, "vae") == content_hash(folder, "vae")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["", "2x1"])
def test_a_batch_is_its_sessions(model, shown, voice, mesh):
    """On the mesh of a run, too, with a portrait on each device."""
    portraits = np.stack([to_uint8(make_portrait(128, seed)[0, 0]) for seed in range(2)])
    mesh = make_training_mesh(mesh, None, num_heads=2) if mesh else None
    stream = BatchStream(model, mesh=mesh)
    stream.params = place_state(model.dit.params, mesh) if mesh else model.dit.params
    frames = stream(portraits, np.stack([voice, voice]), 16)
    # The noise of a batch is drawn as one, so its first row is that of a batch of one.
    np.testing.assert_allclose(frames[0], shown[1], atol=1)
    assert np.abs(frames[1].astype(int) - frames[0]).mean() > 10
