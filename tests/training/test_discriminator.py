"""The patch discriminator: which gradient goes where."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_avatar.training.discriminator import discriminator_losses, init_discriminator


def test_each_side_learns_from_its_own_loss():
    params = init_discriminator(jax.random.key(0))
    real, decoded = jax.random.normal(jax.random.key(1), (2, 1, 3, 16, 16, 3))

    def gradient_sizes(which):
        grads = jax.grad(lambda p, d: discriminator_losses(p, real, d)[which], (0, 1))(
            params, decoded
        )
        return [sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(g)) for g in grads]

    judge, picture = gradient_sizes(0)
    assert judge > 0 and picture == 0
    for which in (1, 2):
        judge, picture = gradient_sizes(which)
        assert judge == 0 and picture > 0


def test_a_perfect_picture_has_no_distance():
    params = init_discriminator(jax.random.key(0))
    real = jax.random.normal(jax.random.key(1), (1, 3, 16, 16, 3))
    np.testing.assert_allclose(discriminator_losses(params, real, real)[2], 0.0, atol=1e-6)
