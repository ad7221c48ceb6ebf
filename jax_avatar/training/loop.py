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
import numpy as np
import optax
import orbax.checkpoint as ocp
from tqdm import tqdm

from jax_avatar.shapes import Array, PyTree
from jax_avatar.training.state import TrainState, config_differences, start_state, update_state

__all__ = [
    "LoopConfig",
    "OwnStepTask",
    "Task",
    "learning_rate",
    "make_optimiser",
    "make_step",
    "restore",
    "train",
]

Batch = Mapping[str, Any]
Step = Callable[[Any, Batch, Array], tuple[Any, dict[str, Array]]]


@runtime_checkable
class Task(Protocol):
    """What a stage of training provides; the loop does the rest.

    A task may also have `evaluate(params, step) -> {name: value}`, called with the EMA weights,
    and `export(params, folder, metadata)`, called with them at the end.
    """

    name: str

    def init(self, key: Array) -> PyTree:
        """Parameters to start from, nested dictionaries of arrays."""

    def loss(self, params: PyTree, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
        """Loss and metrics, all scalars; pure, compiled by the loop."""

    def batches(self, step: int) -> Batch:
        """The batch of a step; the same for the same step, whoever asks."""


@runtime_checkable
class OwnStepTask(Protocol):
    """A stage that trains more than one network: with a state and a step of its own.

    The state has `step`, `ema` and `skipped`, whatever else; `evaluate` and `export` are as for a
    `Task`.
    """

    name: str

    def start(self, config: "LoopConfig", key: Array) -> PyTree:
        """The state before the first step."""

    def make_step(self, config: "LoopConfig") -> Step:
        """The compiled `(state, batch, key) -> (state, metrics)`, with `loss` in the metrics."""

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
        seed: of initialisation and of the loss's random numbers.
        log_every: steps between lines in `metrics.jsonl`.
        evaluate_every: steps between evaluations; 0 for none.
        checkpoint_every: steps between checkpoints; the last step is always kept.
        keep: checkpoints kept.
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
    seed: int = 0
    log_every: int = 20
    evaluate_every: int = 0
    checkpoint_every: int = 500
    keep: int = 2
    max_minutes: float = 0.0

    # Free to change between the parts of a run.
    BOOKKEEPING = ("log_every", "evaluate_every", "checkpoint_every", "keep", "max_minutes")

    def __post_init__(self):
        object.__setattr__(self, "betas", tuple(self.betas))
        if self.num_steps < 1 or not 0 <= self.warmup_steps < self.num_steps:
            raise ValueError(
                f"num_steps {self.num_steps} with warmup_steps {self.warmup_steps}: at least one "
                "step and a shorter warm-up are expected."
            )
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


def make_step(task: Task | OwnStepTask, config: LoopConfig) -> Step:
    """Returns the compiled `(state, batch, key) -> (state, metrics)`; the state is donated.

    The key is the run's; the step number is folded in here.
    """
    if isinstance(task, OwnStepTask):
        return task.make_step(config)
    optimiser, schedule = make_optimiser(config), learning_rate(config)

    def step(state, batch, key):
        key = jax.random.fold_in(key, state.step)
        (loss, metrics), grads = jax.value_and_grad(task.loss, has_aux=True)(
            state.params, batch, key
        )
        norm = optax.global_norm(grads)
        is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        extra = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        state = update_state(state, grads, is_finite, optimiser, config.ema_decay)
        return state, {**metrics, **extra, "skipped": state.skipped}

    return jax.jit(step, donate_argnums=0)


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
        ValueError: the checkpoint was made with other settings.
    """
    workdir = Path(workdir).resolve()
    settings = json.loads(json.dumps(_semantic(settings or {}, config)))
    root, init_key = jax.random.split(jax.random.key(config.seed))
    with ocp.CheckpointManager(
        workdir / "checkpoints",
        item_names=("state", "settings"),
        options=ocp.CheckpointManagerOptions(
            max_to_keep=config.keep, enable_async_checkpointing=True
        ),
    ) as manager:
        _check_settings(manager, settings, force)
        state = _restore_or_start(manager, lambda: _start(task, config, init_key))
        try:
            with _Log(workdir, int(state.step)) as log, _until_interrupted() as interrupted:
                run = (task, config, state, root, manager, settings, log, progress)
                state = _run(*run, interrupted)
        finally:
            manager.wait_until_finished()
    if int(state.step) >= config.num_steps and hasattr(task, "export"):
        task.export(state.ema, workdir, {"step": int(state.step), "skipped": int(state.skipped)})
    return state


def restore(workdir: str | Path, like: PyTree = None) -> tuple[PyTree, dict]:
    """The latest checkpoint of a run and its settings.

    Args:
        workdir: folder given to `train`.
        like: a state of the same structure; without it the fields of a `TrainState` come back as
            the plain dictionaries they were stored as, and another state as one dictionary.
    """
    with ocp.CheckpointManager(
        Path(workdir).resolve() / "checkpoints", item_names=("state", "settings")
    ) as manager:
        step = manager.latest_step()
        if step is None:
            raise ValueError(f"{workdir} holds no checkpoint; train there first.")
        found = manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(like), settings=ocp.args.JsonRestore()
            ),
        )
    state = found["state"]
    if isinstance(state, Mapping) and set(state) == set(TrainState.__dataclass_fields__):
        state = TrainState(**state)
    return state, found["settings"]


def _start(task: Task | OwnStepTask, config: LoopConfig, key: Array) -> PyTree:
    if isinstance(task, OwnStepTask):
        return task.start(config, key)
    return start_state(task.init(key), make_optimiser(config))


def _run(task, config, state, root, manager, settings, log, progress, interrupted):
    step_fn = make_step(task, config)
    started, first = time.monotonic(), int(state.step)
    bar = tqdm(total=config.num_steps, initial=first, disable=not progress, desc=task.name)
    pending = []

    def save(step, state):
        if manager.latest_step() != step:
            manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), settings=ocp.args.JsonSave(settings)
                ),
            )

    try:
        for step, batch in _prefetch(task, first, config.num_steps):
            state, metrics = step_fn(state, batch, root)
            step += 1
            pending.append(metrics)
            bar.update()
            if step % config.log_every == 0 or step == config.num_steps:
                values = _mean(pending)
                values["steps_per_s"] = (step - first) / (time.monotonic() - started)
                pending = []
                log.write(step, values)
                bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
            if config.evaluate_every and step % config.evaluate_every == 0:
                log.write(step, {f"eval/{k}": v for k, v in task.evaluate(state.ema, step).items()})
            if step % config.checkpoint_every == 0 or step == config.num_steps:
                save(step, state)
            if config.max_minutes and time.monotonic() - started > 60 * config.max_minutes:
                break
            if interrupted():
                break
    finally:
        bar.close()
    save(int(state.step), state)
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


def _prefetch(task: Task | OwnStepTask, first: int, last: int) -> Iterator[tuple[int, Batch]]:
    """Steps with their batches, the next one prepared while the current one is used."""
    if first >= last:
        return
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(task.batches, first)
        for step in itertools.count(first):
            batch = following.result()
            if step + 1 < last:
                following = pool.submit(task.batches, step + 1)
            yield step, batch
            if step + 1 == last:
                return


def _restore_or_start(manager, start: Callable[[], PyTree]) -> PyTree:
    step = manager.latest_step()
    if step is None:
        return start()
    like = jax.eval_shape(start)
    found = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like)))
    # Copied, because restored buffers may be shared and the state is donated.
    return jax.tree.map(jnp.array, found["state"])


def _check_settings(manager, settings, force: bool) -> None:
    step = manager.latest_step()
    if step is None or force:
        return
    found = manager.restore(step, args=ocp.args.Composite(settings=ocp.args.JsonRestore()))
    differences = config_differences(found["settings"], settings)
    if differences:
        raise ValueError(
            f"{manager.directory} was trained to step {step} with other settings "
            f"({'; '.join(differences)}). Use another workdir, restore the settings, or pass force."
        )


def _semantic(settings: Mapping[str, Any], config: LoopConfig) -> dict[str, Any]:
    """Settings that change the result; bookkeeping is left out."""
    loop = {
        name: getattr(config, name)
        for name in config.__dataclass_fields__
        if name not in config.BOOKKEEPING
    }
    return {**{key: value for key, value in settings.items() if key != "loop"}, "loop": loop}


def _mean(pending: list[dict[str, Array]]) -> dict[str, float]:
    fetched = jax.device_get(pending)
    values = {}
    # Some steps may measure more than others.
    for name in dict.fromkeys(name for metrics in fetched for name in metrics):
        column = np.array([metrics[name] for metrics in fetched if name in metrics], np.float64)
        finite = column[np.isfinite(column)]
        # Counters and rates are reported as they stand, measurements as means.
        is_last = name in ("skipped", "generator_updates", "learning_rate")
        values[name] = float(column[-1] if is_last or not finite.size else finite.mean())
    return values


class _Log:
    """Appends to `metrics.jsonl` and, where tensorboardX is installed, to event files."""

    def __init__(self, workdir: Path, first_step: int):
        workdir.mkdir(parents=True, exist_ok=True)
        self._path = workdir / "metrics.jsonl"
        self._drop_after(first_step)
        try:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(workdir / "events"))
        except ImportError:
            self._events = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._events:
            self._events.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._events:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def _drop_after(self, step: int) -> None:
        """Forgets lines written after the checkpoint that the run continues from."""
        if self._path.exists():
            lines = self._path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            self._path.write_text("".join(kept))
