"""Training of the anchored VAE: its code of motion, the mean person, batches, loss, weights."""

import dataclasses
import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("numba")

from configs.anchored_vae import get_config
from jax_avatar.data.talking_people.head_motion import CURVES, GAZE, LIDS, POSE, index
from jax_avatar.data.talking_people.moved_portraits import load_moved_portrait
from jax_avatar.models.vae.anchored import AnchoredVAEConfig
from jax_avatar.training.stages import anchored_vae
from jax_avatar.training.stages.anchored_basis import fit_code
from jax_avatar.training.stages.anchored_vae import AnchoredTask
from jax_avatar.training.stages.build import read_sections
from jax_avatar.weights.files import load_weights

pytestmark = pytest.mark.skipif(shutil.which("flite") is None, reason="flite is not installed")

SECTIONS = read_sections(get_config("tiny").to_dict())[0]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("moved_portraits")


def make_task(cache, *, model=SECTIONS["model"], pictures=SECTIONS["people"], **settings):
    settings = {"people": 3, "cache": str(cache), **settings}
    return AnchoredTask(model, dataclasses.replace(SECTIONS["task"], **settings), pictures)


@pytest.fixture(scope="module")
def task(cache):
    return make_task(cache)


@pytest.fixture(scope="module")
def params(task):
    return task.init(jax.random.key(0))


def windows(count=400):
    """Smooth random curves."""
    rng = np.random.default_rng(0)
    level, slope = rng.normal(size=(2, count, 1, len(CURVES)))
    times = np.arange(4).reshape(1, 4, 1) - 1.5
    return (level + 0.1 * slope * times).astype(np.float32)


def test_the_code_keeps_slopes_of_head_and_gaze_and_every_frame_of_the_lids():
    curves = windows()
    lids, small = index(*LIDS), index(*POSE, *GAZE)
    curves[..., lids] = np.random.default_rng(1).random((len(curves), 4, 1))
    basis = fit_code(SECTIONS["model"], curves)
    latent = (curves.reshape(len(curves), -1) - basis["mean"]) @ basis["analysis"]
    back = (latent @ basis["synthesis"] + basis["mean"]).reshape(curves.shape)
    assert latent.shape == (len(curves), 48)
    is_head = np.abs(basis["synthesis"].reshape(48, 4, -1)[..., index(*POSE)]).max((1, 2)) > 1e-6
    assert is_head.sum() == 12
    np.testing.assert_allclose(((latent / np.where(is_head, 3, 1)) ** 2).mean(), 1, rtol=1e-3)
    np.testing.assert_allclose(back[..., [*small, *lids]], curves[..., [*small, *lids]], atol=1e-4)
    rest = [i for i in range(len(CURVES)) if i not in (*small, *lids)]
    assert np.abs(back - curves)[..., rest].mean() < 0.1


def test_the_mean_person_has_a_head_on_shoulders(task):
    basis = task.model_params({})["basis"]
    middle, corner = basis["head_weight"][30, 32], basis["head_weight"][63, 2]
    assert corner < 0.3 < 0.9 < middle
    assert basis["depth"][30, 32] > basis["depth"][30, 12]
    assert 3 < basis["camera"][3] < 7


def test_batches_depend_on_the_step_alone(task):
    batch, again = task.batches(1), task.batches(1)
    for name, value in batch.items():
        np.testing.assert_array_equal(value, again[name])
    assert (batch["portrait"] != task.batches(2)["portrait"]).any()


def test_a_mirrored_row_is_the_mirrored_picture(task):
    person = load_moved_portrait(task.settings.cache, 0, task.pictures)
    rows = [anchored_vae.training_row(person, np.array([1]), is_flipped=f) for f in (False, True)]
    plain, flipped = rows
    np.testing.assert_array_equal(flipped["frames"][:, :, ::-1], plain["frames"])
    np.testing.assert_array_equal(flipped["surface"][:, :, ::-1], plain["surface"])
    np.testing.assert_allclose(flipped["flow"][:, :, ::-1] * [-1, 1], plain["flow"])
    left, right = plain["boxes"][0, 0, [0, 2]]
    np.testing.assert_allclose(flipped["boxes"][0, 0, [2, 0]], [1 - left, 1 - right], atol=1e-6)


def test_batches_are_as_large_as_told_and_draw_from_more_and_more_people(cache):
    task = make_task(cache, first_people=1, new_people=0.1, batch_size=2, frames=3)
    asked = []

    def load(folder, seed, config):
        asked.append(seed)
        return load_moved_portrait(folder, 0, config)

    with mock.patch.object(anchored_vae, "load_moved_portrait", load):
        batch = task.batches(5)
        assert asked == [0, 0]
        for step in range(10, 60):
            task.batches(step)
    assert batch["portrait"].shape == (2, 128, 128, 3)
    assert batch["frames"].shape == (2, 3, 128, 128, 3)
    assert set(asked) == {0, 1, 2}  # of three people


def test_every_part_of_the_loss_has_its_weight(task, params):
    batch = task.batches(0)

    def measured(**settings):
        other = object.__new__(AnchoredTask)
        vars(other).update(vars(task))
        other.settings = dataclasses.replace(task.settings, **settings)
        total, terms = jax.jit(other.loss)(params, batch, jax.random.key(0))
        return float(total), {name: float(term) for name, term in terms.items()}

    weights = {
        "edge_weight": (0.3, ("edges",)),
        "flow_weight": (0.7, ("flow", "coarse")),
        "mask_weight": (1.1, ("mask", "outline", "surface")),
        "paint_weight": (1.9, ("paint",)),
        "shape_weight": (2.3, ("shape",)),
        "motion_weight": (3.1, ("motion",)),
    }
    total, terms = measured(**{name: weight for name, (weight, _) in weights.items()})
    parts = [weight * sum(terms[name] for name in names) for weight, names in weights.values()]
    assert min(parts) > 1e-4
    assert total == pytest.approx(terms["pixel"] + sum(parts), rel=1e-4)
    for weight in ("face_weight", "eye_weight"):
        assert measured(**{weight: 0.0})[1]["pixel"] < terms["pixel"]
    for noise in ("latent_noise", "colour_jitter"):
        assert measured(**{noise: 0.0})[1]["pixel"] != terms["pixel"]


def test_the_basis_is_no_parameter_and_gradients_reach_all_others(task, params):
    assert "basis" not in params
    grads, _ = jax.jit(jax.grad(task.loss, has_aux=True))(
        jax.tree.map(lambda p: p + 0.01, params), task.batches(0), jax.random.key(0)
    )
    assert all(bool(jnp.any(g != 0)) for g in jax.tree.leaves(grads))


def test_export_holds_what_was_evaluated_and_is_gone_on_with(task, params, tmp_path):
    task.export(params, tmp_path, {"step": 7})
    weights, config, metadata = load_weights(tmp_path, "vae")
    assert AnchoredVAEConfig(**config) == task.model
    assert metadata["step"] == 7 and set(metadata["held_out_scores"]) == {
        *("psnr", "face_psnr", "still_psnr"),
    }
    assert metadata["task"]["cache"] is None
    with mock.patch.object(anchored_vae, "fit_basis", side_effect=AssertionError):
        later = make_task(task.settings.cache, start_from=str(tmp_path))
    basis = task.model_params({})["basis"]
    for name, value in later.model_params({})["basis"].items():
        np.testing.assert_allclose(value, basis[name], atol=1e-3, rtol=1e-3)
    np.testing.assert_array_equal(
        later.init(jax.random.key(1))["encoder"]["out"]["bias"], weights["encoder"]["out"]["bias"]
    )
    with pytest.raises(ValueError, match="make the model settings equal"):
        wide = dataclasses.replace(task.model, code_width=4)
        make_task(task.settings.cache, model=wide, start_from=str(tmp_path))


def test_evaluation_looks_at_as_many_held_out_people_as_told(task, params):
    seen = []

    def load(folder, seed, config):
        seen.append((seed, config.is_plain))
        return load_moved_portrait(folder, anchored_vae.HELD_OUT_SEED, config)

    task.settings, before = dataclasses.replace(task.settings, held_out_people=2), task.settings
    with mock.patch.object(anchored_vae, "load_moved_portrait", load):
        scores = task.evaluate(params, 0)
    task.settings = before
    assert seen == [(5000, True), (5001, True)]
    assert all(np.isfinite(value) for value in scores.values())


def test_more_people_than_there_are_are_refused(cache):
    with pytest.raises(ValueError, match="people=2, first_people=3"):
        make_task(cache, people=2, first_people=3)
