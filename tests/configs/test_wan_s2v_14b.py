"""The published model by its sizes: no weights, every tensor."""

import json
from pathlib import Path

import numpy as np
import pytest

from configs.wan_s2v_14b import get_config
from conversion import wan_dit, wan_vae
from conversion.cases_manifests import manifest_shapes
from conversion.rules import check
from jax_avatar.diffusion.schedule import euler_schedule
from jax_avatar.io.image import fit_size
from jax_avatar.models.config import UMT5Config, wan_s2v_14b
from jax_avatar.models.network import flatten
from jax_avatar.models.speech.wav2vec2 import Wav2Vec2Config
from jax_avatar.planning.programs import abstract_model

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def model():
    return abstract_model(get_config().to_dict())


def count(network):
    return sum(int(np.prod(leaf.shape)) for leaf in flatten(network.params).values())


def test_every_tensor_of_the_official_transformer_has_its_place(model):
    manifest = json.loads((GOLDEN / "dit" / "manifest_wan_s2v_14b.json").read_text())
    shapes = manifest_shapes(manifest)
    assert len(shapes) == 1260
    check(shapes, wan_dit.TABLE, flatten(model.dit.params))
    assert count(model.dit) == 16_295_755_609
    assert model.dit.config == wan_s2v_14b(half_rotary=True)


def test_every_tensor_of_the_official_vae_has_its_place(model):
    manifest = json.loads((GOLDEN / "vae" / "manifest_wan21_vae.json").read_text())
    shapes = {name: tuple(shape) for name, shape in manifest.items()}
    assert len(shapes) == 194
    check(shapes, wan_vae.TABLE, flatten(model.vae.params))
    assert count(model.vae) == 126_892_531


def test_it_is_streamed_as_the_release_does(model):
    settings = model.settings
    np.testing.assert_allclose(settings.sigmas, euler_schedule(4, shift=3.0).sigmas, rtol=1e-7)
    assert settings.fps == 25 and settings.warmup_latents == 7
    for sides, pixels in [((400, 720), (384, 704)), ((720, 400), (704, 384))]:
        assert fit_size(*sides, settings.max_area, settings.multiple) == pixels
    assert 4 * model.dit.config.ring_frames == 48


def test_the_published_encoders_fit():
    config = get_config().to_dict()
    speech, text = Wav2Vec2Config(**config["speech"]), UMT5Config(**config["text"])
    dit, vae = config["dit"], config["vae"]
    assert (dit["audio_width"], dit["audio_layers"]) == (speech.width, speech.num_states)
    assert dit["text_width"] == text.width and dit["latent_channels"] == vae["z_dim"]
