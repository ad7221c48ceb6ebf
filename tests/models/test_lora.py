import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_avatar.models.lora import adapted_kernels, add_adapter, init_adapter
from jax_avatar.models.network import flatten, unflatten
from jax_avatar.testing import make_network


def test_a_fresh_adapter_changes_nothing():
    params = make_network().params
    adapter = init_adapter(params, 2, jax.random.key(0))
    merged = flatten(add_adapter(params, adapter, 0.5))
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(merged[path], leaf)


def test_every_adapted_kernel_gets_its_own_product_and_nothing_else_moves():
    params = make_network().params
    adapter = flatten(init_adapter(params, 2, jax.random.key(0)))
    adapter = {path: leaf if path.endswith("/a") else leaf + 0.1 for path, leaf in adapter.items()}
    merged = flatten(add_adapter(params, unflatten(adapter), 0.5))
    kernels = adapted_kernels(params)
    assert len(kernels) == 4 + 4 + 2 + 4
    for path, leaf in flatten(params).items():
        if path in kernels:
            update = jnp.einsum("lir,lro->lio", adapter[f"{path}/a"], adapter[f"{path}/b"])
            np.testing.assert_allclose(merged[path], leaf + 0.5 * update, atol=1e-6)
        else:
            np.testing.assert_array_equal(merged[path], leaf)


def test_an_adapter_for_another_network_is_refused():
    params = make_network().params
    stray = {"blocks": {"nose": {"kernel": {"a": jnp.ones((2, 4, 2)), "b": jnp.ones((2, 2, 4))}}}}
    with pytest.raises(ValueError, match=r"another network: \['blocks/nose/kernel'\]"):
        add_adapter(params, stray, 1.0)
