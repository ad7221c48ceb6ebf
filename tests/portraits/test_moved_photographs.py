"""Real photographs of installed packages, moved by the anchored VAE that ships; none is kept."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import cbook

pytest.importorskip("numba", reason="curves of rendered people need numba")

from jax_avatar.data.talking_people.head_motion import CURVES, LIDS, SCALE, index
from jax_avatar.io.image import load_image
from jax_avatar.models.network import Network
from jax_avatar.models.vae.anchored import AnchoredVAE, AnchoredVAEConfig
from jax_avatar.pixels import from_uint8, to_uint8
from jax_avatar.portraits.faces import track_face
from jax_avatar.portraits.measures import measure
from jax_avatar.portraits.portrait import frame_portrait
from jax_avatar.weights.files import load_weights

ASSETS = Path(__file__).parents[2] / "jax_avatar" / "assets"
FRAMES = 48


@pytest.fixture(scope="module")
def move():
    """Portraits [H W 3] and curves [T c] -> frames."""
    params, fields, _ = load_weights(ASSETS / "anchored", "vae")
    network = Network.abstract(AnchoredVAE, AnchoredVAEConfig(**fields))

    @jax.jit
    def decode(params, portrait, windows):
        vae = network.bind(params)
        latents = vae.basis.to_latent(windows).reshape(1, -1, *network.config.latent_shape)
        return vae.decode_next(vae.prepare(portrait), latents)[0]

    def frames(portrait, curves):
        windows = jnp.asarray((curves / SCALE).reshape(-1, 4, len(CURVES)), jnp.float32)
        return to_uint8(np.asarray(decode(params, from_uint8(portrait)[None], windows)[0]))

    return frames


def photograph(name):
    if name == "astronaut":
        return pytest.importorskip("skimage.data", reason="needs scikit-image").astronaut()
    return load_image(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("hopper", 0.9), ("astronaut", 0.75)])
def test_mouth_and_lids_of_a_photograph_follow(move, name, least):
    # The astronaut smiles with teeth, which the VAE closes only in part.
    curves = np.zeros((FRAMES, len(CURVES)), np.float32)
    time = np.arange(FRAMES) / 25
    jaw = 0.25 * (1 - np.cos(2 * np.pi * 1.5 * time))
    lids = np.interp(np.arange(FRAMES) % 24, [0, 14, 16, 18, 21], [0, 0, 1, 1, 0])
    curves[:, index("jawOpen")], curves[:, index(*LIDS)] = jaw[:, None], lids[:, None]
    frames = move(frame_portrait(photograph(name), 256).pixels, curves)
    faces = track_face(frames)
    assert None not in faces
    found = [measure(frame, face) for frame, face in zip(frames, faces, strict=True)]
    assert np.corrcoef([m.mouth for m in found], jaw)[0, 1] > least
    assert np.corrcoef([np.mean(m.eyes) for m in found], lids)[0, 1] < -0.85
