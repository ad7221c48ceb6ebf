"""Trained part of a transformer: all its weights, or an adapter beside a frozen base.

    base, one copy --bind--> parameters of the transformer <-- adapter, trained

An adapter is never added to the base in training. Without one, what is trained are the parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_avatar.models.config import DiTConfig
from jax_avatar.models.lora import adapter_leaves, with_adapter
from jax_avatar.models.network import unflatten
from jax_avatar.shapes import PyTree
from jax_avatar.training.run.placement import place_state

__all__ = ["AdapterConfig", "FrozenBase"]


class FrozenBase:
    """One copy of frozen weights, read or initialised on first access."""

    def __init__(self, make: Callable[[Mesh | None], PyTree]):
        """Keeps what makes them.

        Args:
            make: reads or draws them, for a mesh or for this host.
        """
        self._make, self._placed = make, None

    def on(self, mesh: Mesh | None = None) -> PyTree:
        """Weights, sharded over the mesh of the first call."""
        if self._placed is None:
            # Kept, so it must be numbers, also when first asked for while something is traced.
            with jax.ensure_compile_time_eval():
                made = self._make(mesh)
                # Host arrays go straight to their places: one device may be too small for all.
                on_one = mesh is None
                self._placed = (
                    jax.tree.map(jnp.asarray, made) if on_one else place_state(made, mesh)
                )
        return self._placed

    def on_host(self) -> PyTree:
        """Host arrays of all of them, for writing."""
        # As they lie on the devices of all hosts they are not one host's to fetch.
        return jax.device_get(self.on() if jax.process_count() == 1 else self._make(None))


@dataclass(frozen=True)
class AdapterConfig:
    """Size of the adapters; part of the settings of a stage.

    Attributes:
        adapter_rank: of the adapters beside one frozen base; 0 trains whole copies of the weights.
        adapter_alpha: adapters are scaled by this over their rank.

    Source: Hu et al., "LoRA", arXiv 2106.09685.
    """

    adapter_rank: int = 0
    adapter_alpha: float = 64.0

    def __post_init__(self):
        if self.adapter_rank < 0:
            raise ValueError(f"task.adapter_rank {self.adapter_rank} must be 0 (none) or more.")

    @property
    def adapter_fields(self) -> dict[str, Any]:
        """Rank, and what the product of the factors is multiplied by, as stored with them."""
        return {"scaling": self.adapter_alpha / self.adapter_rank, "rank": self.adapter_rank}

    def adapted(self, model: DiTConfig) -> DiTConfig:
        """Size of the transformer that takes what `bind` gives."""
        if not self.adapter_rank:
            return model
        fields = self.adapter_fields
        return model.replace(adapter_rank=fields["rank"], adapter_scaling=fields["scaling"])

    def trained(self, base: PyTree) -> PyTree:
        """Shapes of what is trained, from those of the base."""
        rank = self.adapter_rank
        return unflatten(adapter_leaves(base, rank)) if rank else base

    def bind(self, base: PyTree) -> Callable[[PyTree], PyTree]:
        """Returns `trained weights -> parameters of the transformer`; nothing is computed."""
        if not self.adapter_rank:
            return lambda weights: weights
        return lambda adapter: with_adapter(base, adapter)

    def stored(
        self, base: FrozenBase, weights: PyTree
    ) -> tuple[PyTree, tuple[PyTree, dict[str, Any]] | None]:
        """Exported parts: parameters, and the adapter with `adapter_fields` if any."""
        if not self.adapter_rank:
            return weights, None
        return base.on_host(), (weights, self.adapter_fields)
