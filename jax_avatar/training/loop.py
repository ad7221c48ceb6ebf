"""The training loop: any task's loss or step, checkpoints that resume exactly.

    batches(step) --> loss(params, batch, key) --> gradient --> AdamW, EMA --> metrics, checkpoints

A step depends on the seed, the step number and the state alone, so a resumed run continues the
interrupted one bit by bit.
"""

import contextlib
import itertools
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from tqdm import tqdm

from jax_avatar.models.sharding import constrain_params
from jax_avatar.shapes import Array, PyTree
from jax_avatar.training.accumulate import accumulated, clip_keys
from jax_avatar.training.checkpoints import (
    check_settings,
    open_manager,
    restore_or_start,
    roll_back,
    save,
)
from jax_avatar.training.guards import (
    TooManySkips,
    check_skips,
    is_passed,
    judge,
    rate_factor,
    report,
)
from jax_avatar.training.journal import Journal, NoJournal, mean_of
from jax_avatar.training.mesh import (
    fetched,
    gathered_values,
    local_rows,
    make_training_mesh,
    parse_training_mesh,
    place_batch,
    shared,
)
from jax_avatar.training.state import start_state, update_state

__all__ = [
    "LoopConfig",
    "OwnStepTask",
    "Task",
    "compiled_step",
    "learning_rate",
    "make_optimiser",
    "make_step",
    "mesh_of",
    "on_mesh",
    "train",
]

Batch = Mapping[str, Any]
Step = Callable[[Any, Batch, Array], tuple[Any, dict[str, Array]]]


@runtime_checkable
class Task(Protocol):
    """What a stage of training provides; the loop does the rest.

    A task may also have `evaluate(params, step) -> {name: value}`, called with the EMA weights,
    and `export(params, folder, metadata)`, called with them at the end. To run on several devices
    it has `batch_size`, the clips of a batch, on the leading axis of all its arrays. With `by_clip`
    true, the loss is asked for one clip at a time, with a key of that clip, and the mean is taken:
    then no layout of devices and no accumulation changes it. What `frozen(mesh)` returns, weights
    that are not trained, is the loss's fourth argument.
    """

    name: str

    def init(self, key: Array) -> PyTree:
        """Parameters to start from, nested dictionaries of arrays."""

    def loss(self, params: PyTree, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
        """Loss and metrics, all scalars; pure, compiled by the loop."""

    def batches(self, step: int) -> Batch:
        """The batch of a step; the same for the same step, whoever asks.

        On several hosts it is called with `rows`, too, numbers of the clips that this host needs.
        """


@runtime_checkable
class OwnStepTask(Protocol):
    """A stage that trains more than one network: with a state and a step of its own.

    The state has `step`, `ema` and `guard`, whatever else; `evaluate`, `export` and `batch_size`
    are as for a `Task`.
    """

    name: str

    def start(self, config: "LoopConfig", key: Array) -> PyTree:
        """The state before the first step."""

    def make_step(self, config: "LoopConfig", mesh: Mesh | None = None) -> Step:
        """The compiled `(state, batch, key) -> (state, metrics)`.

        Among the metrics are `loss` and those of `guards.report`.
        """

    def batches(self, step: int) -> Batch:
        """As of a `Task`."""


@dataclass(frozen=True)
class LoopConfig:
    """Optimiser, length and bookkeeping of a run.

    Attributes:
        num_steps: optimiser steps; the cosine ends there.
        learning_rate: after the warm-up.
        final_learning_rate: share of `learning_rate` left at the end of the cosine.
        warmup_steps: linear warm-up.
        weight_decay: decoupled, of AdamW, on arrays with two or more axes.
        betas: of AdamW.
        max_grad_norm: global-norm clip.
        ema_decay: of the averaged weights.
        accumulate: parts that a batch is computed in, one after the other, to save memory.
        mesh: devices, DATAxMODEL as in "4x2"; "" takes all for data if the batch divides, else one.
        seed: of initialisation and of the loss's random numbers.
        log_every: steps between lines in `metrics.jsonl`.
        evaluate_every: steps between evaluations; 0 for none.
        checkpoint_every: steps between checkpoints; the last step is always kept.
        keep: latest checkpoints kept. The last good one stays, too: none of the 100 steps before it
            was skipped, and where there are evaluations, it passed one.
        keep_every: checkpoints of steps that this divides stay for good; 0 for none.
        max_minutes: stop (and save) after so long, to resume later; 0 for no limit.
    """

    num_steps: int
    learning_rate: float = 1e-3
    final_learning_rate: float = 0.05
    warmup_steps: int = 100
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    accumulate: int = 1
    mesh: str = ""
    seed: int = 0
    log_every: int = 20
    evaluate_every: int = 0
    checkpoint_every: int = 500
    keep: int = 3
    keep_every: int = 500
    max_minutes: float = 0.0

    # Free to change between the parts of a run.
    BOOKKEEPING = (
        *("accumulate", "mesh"),
        *("log_every", "evaluate_every", "checkpoint_every", "keep", "keep_every", "max_minutes"),
    )

    def __post_init__(self):
        object.__setattr__(self, "betas", tuple(self.betas))
        if self.num_steps < 1 or not 0 <= self.warmup_steps < self.num_steps:
            raise ValueError(
                f"num_steps {self.num_steps} with warmup_steps {self.warmup_steps}: at least one "
                "step and a shorter warm-up are expected."
            )
        if self.mesh:
            parse_training_mesh(self.mesh)
        if self.accumulate < 1:
            raise ValueError(f"loop.accumulate {self.accumulate} must be at least 1.")
        if self.log_every < 1 or self.checkpoint_every < 1 or self.keep < 1:
            raise ValueError("log_every, checkpoint_every and keep must be at least 1")


def learning_rate(config: LoopConfig) -> optax.Schedule:
    """Linear warm-up, then a cosine."""
    return optax.warmup_cosine_decay_schedule(
        0.0 if config.warmup_steps else config.learning_rate,
        config.learning_rate,
        max(1, config.warmup_steps),
        config.num_steps,
        config.learning_rate * config.final_learning_rate,
    )


def make_optimiser(
    config: LoopConfig, schedule: optax.Schedule | None = None
) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW.

    Args:
        config: of the run.
        schedule: learning rate after so many updates; `learning_rate` if not given.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            schedule or learning_rate(config),
            *config.betas,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        ),
    )


def make_step(task: Task | OwnStepTask, config: LoopConfig, mesh: Mesh | None = None) -> Step:
    """Returns the compiled `(state, batch, key) -> (state, metrics)`; the state is donated.

    The key is the run's; the step number is folded in here.
    """
    if isinstance(task, OwnStepTask):
        return task.make_step(config, mesh)
    step = compiled_step(task, config, mesh)
    frozen = task.frozen(mesh) if hasattr(task, "frozen") else None
    return lambda state, batch, key: step(state, batch, key, frozen)


def compiled_step(task: Task, config: LoopConfig, mesh: Mesh | None = None) -> Callable:
    """The step of a `Task` as one program: `(state, batch, key, frozen) -> (state, metrics)`."""
    optimiser, schedule = make_optimiser(config), learning_rate(config)

    def step(state, batch, key, frozen):
        key = jax.random.fold_in(key, state.step)

        def measure(part):
            rows, part = part
            slope = jax.value_and_grad(_mean_loss(task, config, frozen), has_aux=True)
            (loss, metrics), grads = slope(state.params, part, key, rows)
            return constrain_params(grads), {**metrics, "loss": loss}, ()

        rows = jnp.arange(max(len(leaf) for leaf in jax.tree.leaves(batch) if leaf.ndim))
        grads, metrics, _ = accumulated(measure, (rows, batch), config.accumulate)
        loss = metrics["loss"]
        cause, norm = judge(loss, grads)
        rate = jnp.asarray(schedule(state.step), jnp.float32) * rate_factor(state.guard)
        extra = {"loss": loss, "grad_norm": norm, "learning_rate": rate}
        state = update_state(state, grads, cause, optimiser, config.ema_decay)
        metrics = {**metrics, **extra, **report(state.guard, state.step - 1)}
        return constrain_params(state), metrics

    return jax.jit(on_mesh(step, mesh), donate_argnums=0)


def on_mesh(function: Callable, mesh: Mesh | None) -> Callable:
    """The function, to be compiled, in sight of the mesh that its constraints speak of."""
    if mesh is None:
        return function

    def call(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return call


def _mean_loss(task, config, frozen):
    """`(params, batch, key, rows) -> (loss, metrics)`, means over the clips of a part."""
    more = () if frozen is None else (frozen,)
    if not getattr(task, "by_clip", False):

        def whole(params, batch, key, rows):
            # One part has the step's own key.
            own = key if config.accumulate == 1 else jax.random.fold_in(key, rows[0])
            return task.loss(params, batch, own, *more)

        return whole

    def mean(params, batch, key, rows):
        def one(clip, key):
            return task.loss(params, jax.tree.map(lambda leaf: leaf[None], clip), key, *more)

        each = jax.vmap(one, spmd_axis_name="data")(batch, clip_keys(key, rows))
        return jax.tree.map(jnp.mean, each)

    return mean


def train(
    task: Task | OwnStepTask,
    config: LoopConfig,
    workdir: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    force: bool = False,
    progress: bool = True,
) -> PyTree:
    """Runs a task to `num_steps`, from the latest checkpoint in `workdir` if there is one.

    An interruption (Ctrl-C) or the time limit saves and returns early; the same call continues.

    Args:
        task: the stage to train.
        config: optimiser and bookkeeping.
        workdir: folder for checkpoints, `metrics.jsonl`, TensorBoard events, exported weights.
        settings: the run's whole config as plain values. It is stored, and a run that resumes
            with other settings is refused.
        force: resume although the settings differ.
        progress: show a progress bar.

    Returns:
        The last state, a `TrainState` or the task's own.

    Raises:
        ValueError: the checkpoint was made with other settings, or too many steps were skipped
            although the run went back twice.
    """
    workdir = Path(workdir).resolve()
    mesh = mesh_of(task, config)
    settings = _semantic(settings or {}, config)
    if getattr(task, "content_hash", ""):
        settings["data_hash"] = task.content_hash  # other data, another run
    settings = json.loads(json.dumps(settings))
    root, init_key = jax.random.split(jax.random.key(config.seed))
    with open_manager(workdir, keep=config.keep, keep_every=config.keep_every) as manager:
        check_settings(manager, settings, force=force)
        start, step_fn = lambda: _start(task, config, init_key), make_step(task, config, mesh)
        state, pending = restore_or_start(manager, start, manager.latest_step(), mesh)
        try:
            make_journal = Journal if jax.process_index() == 0 else NoJournal
            with make_journal(workdir, int(state.step)) as journal, _until_interrupted() as is_over:
                run = _Run(task, config, mesh, step_fn, root, manager, settings, journal, is_over)
                while True:
                    try:
                        state = run.on(state, pending, progress)
                        break
                    except TooManySkips as trouble:
                        state, pending = roll_back(manager, start, mesh, journal, trouble)
        finally:
            manager.wait_until_finished()
    if int(state.step) >= config.num_steps and hasattr(task, "export"):
        weights, skipped = fetched(state.ema), int(state.guard.total)
        if jax.process_index() == 0:
            task.export(weights, workdir, {"step": int(state.step), "skipped": skipped})
    return state


def mesh_of(task: Task | OwnStepTask, config: LoopConfig) -> Mesh:
    """The mesh that a run of this task takes.

    Raises:
        ValueError: devices, batch and heads do not divide.
    """
    return make_training_mesh(
        config.mesh,
        getattr(task, "batch_size", None),
        accumulate=config.accumulate,
        num_heads=getattr(getattr(task, "model", None), "num_heads", None),
    )


def _start(task: Task | OwnStepTask, config: LoopConfig, key: Array) -> PyTree:
    if isinstance(task, OwnStepTask):
        return task.start(config, key)
    return start_state(task.init(key), make_optimiser(config))


@dataclass(frozen=True)
class _Run:
    """What stays the same from step to step."""

    task: Any
    config: LoopConfig
    mesh: Mesh
    step_fn: Step
    root: Array
    manager: Any
    settings: Mapping[str, Any]
    journal: Journal | NoJournal
    is_over: Callable[[], bool]

    def on(self, state: PyTree, pending: list, progress: bool) -> PyTree:
        """From a state to the last step, or until it has to stop early."""
        task, config, journal = self.task, self.config, self.journal
        started, first = time.monotonic(), int(state.step)
        # After going back, other chance.
        root = jax.random.fold_in(self.root, state.guard.rollbacks)
        hidden = not progress or jax.process_index() > 0
        bar = tqdm(
            total=config.num_steps, initial=first, disable=hidden, desc=task.name, unit="step"
        )

        try:
            for step, batch in _prefetch(task, self.mesh, first, config.num_steps):
                state, metrics = self.step_fn(state, batch, root)
                step += 1
                pending.append(metrics)
                bar.update()
                is_last, scores = step == config.num_steps, None
                is_saved = step % config.checkpoint_every == 0 or is_last
                if is_logged := step % config.log_every == 0 or is_last:
                    values = mean_of(pending)
                    values["steps_per_s"] = (step - first) / (time.monotonic() - started)
                    journal.write(step, values)
                    bar.set_postfix(loss=f"{values['loss']:.4f}", **journal.alarming, refresh=False)
                if is_logged or is_saved:
                    check_skips(jax.device_get(pending), step)
                if is_logged:
                    pending = []
                if config.evaluate_every and step % config.evaluate_every == 0:
                    scores = _evaluated(task, state.ema, step)
                    journal.write(step, {f"eval/{k}": v for k, v in scores.items()})
                if is_saved or is_passed(scores):
                    is_good = not config.evaluate_every or is_passed(scores)
                    is_good = is_good and not metrics["recent_skips"]
                    save(self.manager, step, state, self.settings, pending, is_good=is_good)
                minutes = (time.monotonic() - started) / 60
                is_late = 0 < config.max_minutes < minutes
                if _anywhere(is_late or self.is_over()):
                    break
        finally:
            bar.close()
        save(self.manager, int(state.step), state, self.settings, pending, is_good=False)
        return state


@contextlib.contextmanager
def _until_interrupted() -> Iterator[Callable[[], bool]]:
    """Yields whether Ctrl-C or a polite kill has come; both let the step under way finish.

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


def _evaluated(task, weights, step):
    """Scores, on every host those of the first."""
    if jax.process_count() == 1:
        return task.evaluate(weights, step)
    weights = fetched(weights)
    return shared(task.evaluate(weights, step) if jax.process_index() == 0 else None)


def _anywhere(flag: bool) -> bool:
    """Whether it is so on any host, since all must stop together."""
    return flag if jax.process_count() == 1 else any(gathered_values(flag))


def _prefetch(
    task: Task | OwnStepTask, mesh: Mesh, first: int, last: int
) -> Iterator[tuple[int, Batch]]:
    """Steps with their batches on the devices, the next one prepared while one is used."""
    if first >= last:
        return
    share = {}
    if jax.process_count() > 1:
        share["rows"] = local_rows(task.batch_size, mesh)

    def make(step):
        return place_batch(task.batches(step, **share), mesh)

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(make, first)
        for step in itertools.count(first):
            batch = following.result()
            if step + 1 < last:
                following = pool.submit(make, step + 1)
            yield step, batch
            if step + 1 == last:
                return


def _semantic(settings: Mapping[str, Any], config: LoopConfig) -> dict[str, Any]:
    """Settings that change the result; bookkeeping is left out."""
    loop = {
        name: getattr(config, name)
        for name in config.__dataclass_fields__
        if name not in config.BOOKKEEPING
    }
    return {**{key: value for key, value in settings.items() if key != "loop"}, "loop": loop}
