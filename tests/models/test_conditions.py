import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_avatar.models.conditions import Conditions, still_pose
from jax_avatar.testing import GRID, NANO

PORTRAIT = np.ones((2, 1, *GRID, NANO.latent_channels), np.float32)


@pytest.mark.parametrize("arrays", [np, jnp], ids=["numpy", "jax"])
def test_the_pose_is_the_portrait_or_zeros_of_its_own_channels(arrays):
    portrait = arrays.asarray(PORTRAIT)
    assert still_pose("reference", portrait, 4) is portrait
    zeros = still_pose("zeros", portrait, 7)
    assert zeros.shape == (2, 1, *GRID, 7) and not zeros.any()
    assert isinstance(zeros, np.ndarray) == (arrays is np)
    with pytest.raises(ValueError, match="pose 'smile' must be one of zeros, reference"):
        still_pose("smile", portrait, 4)


def test_conditions_of_a_portrait_have_a_prompt_of_zeros_unless_given():
    made = Conditions.of_portrait(NANO, PORTRAIT, pose="zeros", motion=PORTRAIT)
    assert made.text.shape == (2, 1, NANO.text_width) and not made.text.any()
    assert made.motion is PORTRAIT and made.audio is None
    told = Conditions.of_portrait(NANO, PORTRAIT, pose="zeros", text=np.ones((2, 1, 4)))
    assert told.text.all()


def test_changed_conditions_keep_all_other_fields():
    names = [field.name for field in dataclasses.fields(Conditions)]
    before = Conditions(**{name: number for number, name in enumerate(names)})
    for name in ("text", "reference", "audio"):
        after = getattr(before, f"with_{name}")(np.float32(-1) * np.ones(3))
        assert [n for n in names if getattr(after, n) is not getattr(before, n)] == [name]


def test_conditions_may_have_axes_in_front():
    made = Conditions.of_portrait(NANO, jnp.asarray(PORTRAIT), pose="reference")
    out = jax.vmap(lambda one: one.with_audio(one.reference))(made)
    assert out.audio.shape == PORTRAIT.shape and out.motion is None
