import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_avatar.models.network import Network, flatten, unflatten

CONFIG = "a size"


class Two(nnx.Module):
    """Two layers in a list, whose keys are numbers inside flax."""

    def __init__(self, config, *, rngs):
        self.config = config
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])

    def run(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_network_computes_what_its_module_does():
    module, x = Two(CONFIG, rngs=nnx.Rngs(0)), jnp.ones((1, 4))
    network = Network.of(module)
    assert network.config is CONFIG and network.module_class is Two
    np.testing.assert_array_equal(network.bind().run(x), module.run(x))
    out = jax.jit(lambda network, x: network.bind().run(x))(network, x)
    np.testing.assert_allclose(out, module.run(x), atol=1e-6)


def test_an_abstract_network_has_the_structure_and_shapes_and_no_numbers():
    network, whole = Network.abstract(Two, CONFIG), Network.of(Two(CONFIG, rngs=nnx.Rngs(1)))
    assert network.structure == whole.structure
    shapes = {path: leaf.shape for path, leaf in flatten(whole.params).items()}
    assert {path: leaf.shape for path, leaf in flatten(network.params).items()} == shapes
    assert "layers/0/kernel" in shapes
    assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(network))


def test_other_parameters_can_be_bound():
    network, x = Network.of(Two(CONFIG, rngs=nnx.Rngs(0))), jnp.ones((1, 4))
    zeros = jax.tree.map(jnp.zeros_like, network.params)
    for bound in (network.bind(zeros), network.with_params(zeros).bind()):
        assert not bound.run(x).any()
    bare = network.without_params()
    assert not jax.tree.leaves(bare) and bare.bind(network.params).run(x).any()
    assert unflatten(flatten(network.params)).keys() == network.params.keys()
