"""Time of a run by phase, and rates: steps, clips and tokens per second, MFU, memory.

    batch arrives --data--> step is asked for --step--> its results are there --save, evaluation

Steps run ahead of the host, which is never made to wait: a thread notes when the results of a step
are there. A wait counts only while the devices had nothing to do.
"""

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import jax

__all__ = ["PHASES", "StepClock", "Work", "is_timing", "memory_peak"]

PHASES = ("step", "data", "save", "evaluation", "compile")
"""Parts of the time between two log lines; what is left is the host's own."""

_RATES = ("steps_per_s", "clips_per_s", "tokens_per_s", "mfu", "memory_peak_gb")
Item = TypeVar("Item")
_END = object()


@dataclass(frozen=True)
class Work:
    """Work of one step; 0 is unknown.

    Attributes:
        clips: of a batch.
        tokens: noisy tokens of a batch.
        flops: floating-point operations of the model, without those of recomputed layers.
        peak_flops: FLOP/s that all devices of the run have at most, together.
    """

    clips: int = 0
    tokens: int = 0
    flops: float = 0.0
    peak_flops: float = 0.0


class StepClock:
    """Adds up the seconds of every phase between two readings."""

    def __init__(self, work: Work | None = None):
        """Starts.

        Args:
            work: of a step, for rates.
        """
        self._work = work or Work()
        self._watcher = ThreadPoolExecutor(1, "step clock")
        self._last: Future | None = None
        self._finished = time.monotonic()  # when the last step was, as the watcher saw it
        self._kinds: set[Any] = set()
        self._clear()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._watcher.shutdown(wait=False)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time within as one of `PHASES`, except while the devices are at work."""
        start = time.monotonic()
        try:
            yield
        finally:
            end = time.monotonic()
            if self._last is None or (self._last.done() and not self._last.exception()):
                self._seconds[name] += max(0.0, end - max(start, self._finished))

    def waiting(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, the wait for each of them counted as `data`."""
        iterator = iter(items)
        while True:
            with self.phase("data"):
                item = next(iterator, _END)
            if item is _END:
                return
            yield item

    @contextlib.contextmanager
    def step(self, batch: Any) -> Iterator[list]:
        """A step, made within; its results are to be put into the list that this yields.

        The first step with batches of a kind compiles and counts as `compile` as a whole.
        """
        kind = jax.tree.structure(batch), tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        results, start = [], time.monotonic()
        if kind in self._kinds:
            yield results
            self._last = self._watcher.submit(self._watch, results, start)
            self._steps += 1
            return
        with self.phase("compile"):
            yield results
            jax.block_until_ready(results)
        self._kinds.add(kind)
        self._finished = time.monotonic()

    def read(self) -> dict[str, float]:
        """Seconds of the phases since the last reading, as `time/...`, and rates.

        Rates are of the steps since then without those that compiled, and of the time without
        compilation and evaluation; MFU is left out where operations or peak are not known, and all
        rates where every step compiled.

        Source: "PaLM" (arXiv 2204.02311), appendix B, for MFU.
        """
        if self._last:
            self._last.result()
        seconds, steps, work = self._seconds, self._steps, self._work
        wall = time.monotonic() - self._started
        values = {f"time/{name}": value for name, value in seconds.items()}
        training = wall - seconds["compile"] - seconds["evaluation"]
        if steps:
            rate = steps / max(training, 1e-9)
            values["steps_per_s"] = rate
            for name, count in (("clips", work.clips), ("tokens", work.tokens)):
                values |= {f"{name}_per_s": rate * count} if count else {}
            if work.flops and work.peak_flops:
                values["mfu"] = rate * work.flops / work.peak_flops
        peak = memory_peak(jax.local_devices())
        values |= {} if peak is None else {"memory_peak_gb": peak}
        self._clear()
        return values

    def _clear(self) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._steps, self._started = 0, time.monotonic()

    def _watch(self, results: list, start: float) -> None:
        jax.block_until_ready(results)
        # It could not begin before the step ahead of it had ended.
        start = max(start, self._finished)
        self._finished = time.monotonic()
        self._seconds["step"] += self._finished - start


def is_timing(name: str) -> bool:
    """True for metrics that depend on the machine, which no other run repeats."""
    return name in _RATES or name.startswith("time/")


def memory_peak(devices: Sequence[Any]) -> float | None:
    """Most memory that one of the devices has had in use since the start, in 10^9 bytes.

    Args:
        devices: of this host.

    Returns:
        None where the backend does not count, as that of CPUs.
    """
    peaks = []
    for device in devices:
        try:
            peaks.append((device.memory_stats() or {})["peak_bytes_in_use"])
        except (AttributeError, KeyError, NotImplementedError, RuntimeError):
            continue
    return max(peaks) / 1e9 if peaks else None
