"""Batches ahead of the step that needs them: made by threads or processes, put on the devices.

    step --source, here or in one of `workers` processes--> host arrays --thread--> device arrays

A batch depends on its step alone, so that nothing about it depends on who makes it, or when.
"""

import gc
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cloudpickle
import grain
import jax
import numpy as np

from jax_avatar.training.run.guards import RunError

__all__ = ["DataError", "load_batches"]

_AHEAD = 2  # batches that each process, or the thread, has ready


class DataError(RunError):
    """A batch could not be made; the steps before it are not concerned."""


def load_batches(
    source: Callable[[int], Any],
    place: Callable[[Any], Any],
    first: int,
    last: int,
    *,
    workers: int = 0,
) -> Iterator[tuple[int, Any]]:
    """Steps with their batches on the devices.

    Args:
        source: step -> batch, host arrays; goes to the processes if there are any, so it must be
            picklable then, and should not use JAX.
        place: batch of `source` -> batch on the devices.
        first: step to begin with.
        last: the step after the last.
        workers: processes that make batches, each another one; with 0 a thread of this process
            makes them. Grain looks at absl's flags then, so the program must have parsed its own
            (`absl.app.run`, or `absl.flags.FLAGS.mark_as_parsed()`).

    Raises:
        ValueError: the source cannot be sent to other processes.
        DataError: a batch could not be made.
    """
    if first >= last:
        return
    batches = grain.MapDataset.range(first, last).map(source)
    batches = batches.to_iter_dataset(grain.ReadOptions(1, _AHEAD))
    if workers:
        _check_picklable(source, workers)
        options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=_AHEAD)
        batches = batches.mp_prefetch(options, worker_init_fn=_start_worker)
    batches = iter(batches)

    def prepare():
        batch = next(batches)
        # Of shared memory, which devices that are CPUs would go on using in place.
        return place(jax.tree.map(np.array, batch) if workers else batch)

    with ThreadPoolExecutor(1) as pool:
        try:
            following = pool.submit(prepare)
            for step in range(first, last):
                try:
                    batch = following.result()
                except Exception as error:  # whatever the source raises
                    cause = " ".join(str(error).split()) or type(error).__name__
                    raise DataError(f"the batch of step {step} cannot be made: {cause}") from error
                if step + 1 < last:
                    following = pool.submit(prepare)
                yield step, batch
        finally:
            following.cancel()
            pool.shutdown(wait=True)
            batches.close()
            if workers:
                # Grain's last batches, in cycles of references, are unlinked while it still can.
                del batches, prepare, following
                gc.collect()


def _check_picklable(source: Any, workers: int) -> None:
    try:
        cloudpickle.dumps(source)  # as grain does
    except Exception as error:  # whatever its parts raise
        raise ValueError(
            f"loop.workers={workers}: this run's data cannot be sent to other processes ({error}); "
            "encode the clips with their speech features, or set loop.workers=0."
        ) from error


def _start_worker(index: int, count: int) -> None:
    """A process that only reads: it leaves accelerators alone, and Ctrl-C to the main process."""
    jax.config.update("jax_platforms", "cpu")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
