"""The training loop: steps of any task, checkpoints that resume exactly.

    batches(step) --> task.make_step --> metrics, evaluations, checkpoints --> exported weights

A step depends on the seed, the step number and the state alone, so a resumed run continues the
interrupted one bit by bit.
"""

import contextlib
import dataclasses
import functools
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from jax_avatar.shapes import Array, PyTree
from jax_avatar.training.run.checkpoints import (
    GoodSteps,
    check_settings,
    explain_disk_errors,
    open_manager,
    restore_or_start,
    roll_back,
    save,
)
from jax_avatar.training.run.clock import StepClock, Work
from jax_avatar.training.run.evaluation import Evaluation, try_out
from jax_avatar.training.run.guards import (
    RunError,
    TooManySkips,
    check_skips,
    find_strayed_replay,
    is_passed,
)
from jax_avatar.training.run.journal import Journal, NoJournal, mean_of
from jax_avatar.training.run.loader import DataError, load_batches
from jax_avatar.training.run.loggers import check_installed
from jax_avatar.training.run.placement import fetched, gathered_values, local_rows, place_batch
from jax_avatar.training.run.profile import Profiler, step_annotation
from jax_avatar.training.run.run_record import add_run_record, run_record
from jax_avatar.training.run.step import Batch, LoopConfig, Step
from jax_avatar.training.stages.task import Task

__all__ = ["train"]


def train(
    task: Task,
    config: LoopConfig,
    workdir: str | Path,
    *,
    evaluations: Sequence[Evaluation] = (),
    settings: Mapping[str, Any] | None = None,
    work: Work | None = None,
    force: bool = False,
    progress: bool = True,
) -> PyTree:
    """Runs a task to `num_steps`, from the latest checkpoint in `workdir` if there is one.

    An interruption (Ctrl-C) or the time limit saves and returns early; the same call continues.

    Args:
        task: the stage to train.
        config: optimiser and bookkeeping.
        workdir: folder for checkpoints, `metrics.jsonl`, `runs.jsonl` (what every start was
            given), TensorBoard events, exported weights.
        evaluations: made every `evaluate_every` steps, with those of the task.
        settings: the run's whole config as plain values. It is stored, and a run that resumes
            with other settings is refused.
        work: what a step computes, for rates; without it only steps are counted.
        force: resume although the settings differ.
        progress: show a progress bar.

    Returns:
        The last state, a `TrainState` or the task's own.

    Raises:
        ValueError: the checkpoint was made with other settings, an evaluation cannot be made, too
            many steps were skipped although the run went back twice, a replay strayed beyond the
            task's `replay_limit`, a batch could not be made, or the disk is full.
    """
    workdir, settings = Path(workdir).resolve(), settings or {}
    check_installed(config.wandb)
    # With other data it is another run.
    data = {"data_hash": task.content_hash} if task.content_hash else {}
    whole = {**settings, "loop": dataclasses.asdict(config), **data}
    settings = json.loads(json.dumps(_result_settings(settings, config) | data))
    with explain_disk_errors(workdir):
        state = _run_or_resume(
            *(task, config, workdir, whole, settings, evaluations, work),
            force=force,
            progress=progress,
        )
        if int(state.step) >= config.num_steps:
            weights, skipped = fetched(state.ema), int(state.guard.total)
            if jax.process_index() == 0:
                task.export(weights, workdir, {"step": int(state.step), "skipped": skipped})
    return state


def _run_or_resume(
    task: Task,
    config: LoopConfig,
    workdir: Path,
    whole: Mapping[str, Any],
    settings: Mapping[str, Any],
    evaluations: Sequence[Evaluation],
    work: Work | None,
    *,
    force: bool,
    progress: bool,
) -> PyTree:
    """From the latest checkpoint, or the start, to the last step, or until it has to stop early."""
    mesh = task.mesh(config)
    root, init_key = jax.random.split(jax.random.key(config.seed))
    good = GoodSteps(workdir)
    with open_manager(workdir, good, keep=config.keep, keep_every=config.keep_every) as manager:
        check_settings(manager, settings, force=force)
        start, step_fn = lambda: task.start(config, init_key), task.make_step(config, mesh)
        state, pending = restore_or_start(manager, start, manager.latest_step(), mesh)
        evaluations = _evaluations(task, config, mesh, evaluations)
        if int(state.step) < config.num_steps:
            try_out(evaluations, state)
        try:
            journal = _open_journal(workdir, int(state.step), config, whole)
            clock, profiler = StepClock(work), Profiler(config.profile, workdir)
            with journal, clock, profiler, _until_interrupted() as is_over:
                run = _Run(
                    *(task, config, mesh, step_fn, root, evaluations),
                    *(manager, good, settings, journal, is_over),
                    *(clock, profiler),
                )
                return run.to_the_end(state, pending, start, progress)
        finally:
            manager.wait_until_finished()


def _open_journal(
    workdir: Path, first_step: int, config: LoopConfig, settings: Mapping[str, Any]
) -> Journal | NoJournal:
    """The journal of a start, which is recorded; of other hosts than the first, none."""
    if jax.process_index() > 0:
        return NoJournal()
    journal = Journal(workdir, first_step, config.wandb, settings)
    add_run_record(workdir, run_record(settings, first_step))
    return journal


@dataclass(frozen=True)
class _Run:
    """Constants of a run."""

    task: Any
    config: LoopConfig
    mesh: Mesh
    step_fn: Step
    root: Array
    evaluations: Sequence[Evaluation]
    manager: Any
    good: GoodSteps
    settings: Mapping[str, Any]
    journal: Journal | NoJournal
    is_over: Callable[[], bool]
    clock: StepClock
    profiler: Profiler

    def to_the_end(
        self, state: PyTree, pending: list, start: Callable[[], PyTree], progress: bool
    ) -> PyTree:
        """Runs `on` to the last step; goes back to a good checkpoint after too many skips."""
        while True:
            try:
                return self.on(state, pending, progress)
            except TooManySkips as trouble:
                state, pending = roll_back(
                    self.manager, self.good, start, self.mesh, self.journal, trouble
                )

    def on(self, state: PyTree, pending: list, progress: bool) -> PyTree:
        """From a state to the last step, or until it has to stop early."""
        task, config, journal = self.task, self.config, self.journal
        started, first, clock = time.monotonic(), int(state.step), self.clock
        # After a rollback, use a new random stream.
        root = jax.random.fold_in(self.root, state.guard.rollbacks)
        hidden = not progress or jax.process_index() > 0
        bar = tqdm(
            total=config.num_steps, initial=first, disable=hidden, desc=task.name, unit="step"
        )

        try:
            for step, batch in clock.waiting(_batches(task, config, self.mesh, first)):
                self.profiler.before(step)
                with clock.step(batch) as results, step_annotation(step):
                    state, metrics = self.step_fn(state, batch, root)
                    results.append(metrics)
                step += 1
                self.profiler.after(step, metrics)
                pending.append(metrics)
                bar.update()
                is_last = step == config.num_steps
                is_evaluated = bool(self.evaluations) and step % config.evaluate_every == 0
                is_saved = step % config.checkpoint_every == 0 or is_last or is_evaluated
                if is_logged := step % config.log_every == 0 or is_last:
                    values = mean_of(pending) | clock.read()
                    journal.write(step, values)
                    bar.set_postfix(loss=f"{values['loss']:.4f}", **journal.alarming, refresh=False)
                if is_logged or is_saved:
                    self._check(jax.device_get(pending), step, state, is_logged)
                if is_logged:
                    pending = []
                if is_saved:
                    with clock.phase("save"):
                        save(self.manager, step, state, self.settings, pending)
                # An evaluation that fails or is killed must cost no step.
                with clock.phase("evaluation"):
                    has_passed = not self.evaluations or (
                        is_evaluated and self._evaluate(state, step)
                    )
                if is_saved and has_passed and not metrics["recent_skips"]:
                    self.good.add(step)
                minutes = (time.monotonic() - started) / 60
                is_late = 0 < config.max_minutes < minutes
                if _any_host(is_late or self.is_over()):
                    break
        except DataError:
            # The steps so far were made of whole batches. Other hosts, which have theirs, would not
            # come to save with this one.
            if jax.process_count() == 1:
                save(self.manager, int(state.step), state, self.settings, pending)
            raise
        finally:
            bar.close()
        save(self.manager, int(state.step), state, self.settings, pending)
        return state

    def _evaluate(self, state: PyTree, step: int) -> bool:
        """Logs the scores of all evaluations; returns whether all are finite."""
        self.manager.wait_until_finished()
        scores = {}
        for evaluation in self.evaluations:
            scores |= evaluation(state, step)
        self.journal.write(step, {f"eval/{name}": value for name, value in scores.items()})
        return is_passed(scores)

    def _check(self, rows: list, step: int, state: PyTree, is_logged: bool) -> None:
        """Looks for trouble in the metrics of the latest steps."""
        check_skips(rows, step)
        if trouble := find_strayed_replay(rows, step, self.task.replay_limit):
            if not is_logged:
                self.journal.write(step, mean_of(rows))
            # All is told, so that the run that continues does not stop at the same rows again.
            save(self.manager, step, state, self.settings, [])
            raise RunError(trouble)


@contextlib.contextmanager
def _until_interrupted() -> Iterator[Callable[[], bool]]:
    """Yields a test for Ctrl-C or SIGTERM; both let the step under way finish.

    A second one interrupts at once. Raising in the middle of a step would lose the state, whose
    buffers the step has been given.
    """
    came = []

    def note(number, frame):
        came.append(number)
        for signal_number, handler in previous.items():
            signal.signal(signal_number, handler)

    previous = {}
    if threading.current_thread() is threading.main_thread():
        previous = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for signal_number, handler in previous.items():
            signal.signal(signal_number, handler)


def _evaluations(
    task: Task, config: LoopConfig, mesh: Mesh, more: Sequence[Evaluation]
) -> list[Evaluation]:
    """Evaluations of the task, then the others; none if `evaluate_every` is 0."""
    if not config.evaluate_every:
        return []
    return [*task.evaluations(config, mesh), *more]


def _any_host(flag: bool) -> bool:
    """Logical OR over hosts, so that all stop together."""
    return flag if jax.process_count() == 1 else any(gathered_values(flag))


def _batches(task: Task, config: LoopConfig, mesh: Mesh, first: int) -> Iterator[tuple[int, Batch]]:
    """Steps with their batches on the devices, made ahead; of this host's rows only."""
    source = task.source
    if jax.process_count() > 1:
        source = functools.partial(source, rows=local_rows(task.batch_size, mesh))
    place = functools.partial(place_batch, mesh=mesh)
    return load_batches(source, place, first, config.num_steps, workers=config.workers)


def _result_settings(settings: Mapping[str, Any], config: LoopConfig) -> dict[str, Any]:
    """Settings that change the result; bookkeeping is left out."""
    loop = {
        name: getattr(config, name)
        for name in config.__dataclass_fields__
        if name not in config.BOOKKEEPING
    }
    return {**{key: value for key, value in settings.items() if key != "loop"}, "loop": loop}
