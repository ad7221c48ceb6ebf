"""Maps (seed, step, row) to an example.

The state of such an iterator is the step, so a checkpoint needs no other. A resumed run goes on
exactly, and hosts that make different rows of a batch make different examples, however many they
are.
"""

from dataclasses import dataclass
from functools import cached_property

import grain

__all__ = ["Order"]


@dataclass(frozen=True)
class Order:
    """An endless order of examples, shuffled anew in every epoch.

    Attributes:
        count: examples; each comes once per epoch.
        batch_size: rows of a step.
        seed: of the order, 0 or larger.
    """

    count: int
    batch_size: int
    seed: int

    def __post_init__(self):
        if self.count < 1 or self.batch_size < 1:
            raise ValueError(
                f"{self.count} examples in batches of {self.batch_size}: at least one of each is "
                "expected; give longer clips, or ask for shorter windows."
            )

    @cached_property
    def _examples(self) -> grain.MapDataset:
        return grain.MapDataset.range(self.count).seed(self.seed).shuffle().repeat()

    def position(self, step: int, row: int) -> int:
        """Place of a row in the order, counted over all epochs."""
        return step * self.batch_size + row

    def example(self, step: int, row: int) -> int:
        """The example in a row of a step."""
        return self._examples[self.position(step, row)]
