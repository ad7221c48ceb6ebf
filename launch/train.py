"""Trains one stage: `python launch/train.py --config=configs/teacher.py --workdir runs/teacher`.

Repeating the command continues where the run stopped. Config files take a size, as in
`--config=configs/dmd.py:tiny`; settings are changed as `--config.loop.num_steps=100`. `--dry_run`
plans the memory and prints the schedule without training. On several hosts the command is run on
each, with `--multihost`, or with `--coordinator`, `--hosts` and `--host`.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from absl import flags, logging

from launch import cli
from launch.hosts import join_hosts
from launch.overrides import read_config, split_arguments

CONFIG = flags.DEFINE_string("config", None, "config file, and after a colon the size")
WORKDIR = flags.DEFINE_string("workdir", None, "folder for checkpoints, metrics and weights")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "check the settings, plan, then stop")
COMPILE = flags.DEFINE_bool(
    "compile", None, "dry run: compile the step to count its temporaries; else only if small"
)
RESUME = flags.DEFINE_bool("resume", True, "go on in a workdir that holds a run")
SMALL_BATCH = flags.DEFINE_bool(
    "small_batch", False, "distil a large network although the batch is below 32 clips"
)
MULTIHOST = flags.DEFINE_bool(
    "multihost", False, "join other hosts, from the cluster's environment"
)
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of the first host")
HOSTS = flags.DEFINE_integer("hosts", None, "how many hosts run this command")
HOST = flags.DEFINE_integer("host", None, "number of this host, from 0")
FORCE = flags.DEFINE_bool("force", False, "resume although the settings differ")


def evaluations_of(task, settings, loop):
    """Those of a transformer, which stream; other tasks bring their own."""
    from jax_avatar.evaluation.in_training import make_evaluation

    if not loop.evaluate_every or task.streamed is None:
        return []
    folder, mesh = Path(WORKDIR.value) / "samples", task.mesh(loop)
    made = make_evaluation(settings, task, mesh, folder, num_clips=loop.evaluate_clips)
    return [made] if made else []


def work_of(task, settings):
    """Work of a step; empty for a task without batches of clips."""
    from jax_avatar.planning.work import step_work
    from jax_avatar.training.stages.build import read_sections

    if task.batch_size is None:
        return None
    sections, loop = read_sections(settings)
    return step_work(settings["stage"], sections, task.batch_size, task.grid, task.mesh(loop))


def check_workdir() -> None:
    if not WORKDIR.value:
        raise ValueError("--workdir is missing; give a folder for checkpoints and weights.")
    folder = Path(WORKDIR.value)
    if not RESUME.value and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"--noresume: {folder} is not empty, and nothing is overwritten; give another "
            "--workdir, or leave --noresume out to continue."
        )


def run(overrides: dict[str, str]) -> int:
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every checkpoint
    # What its threads raise is raised here again, and told in one line.
    logging.get_absl_handler().addFilter(lambda record: not record.exc_info)
    # Late, so that --help and misspelt flags answer at once.
    from launch.common import keep_compiled

    keep_compiled()
    join_hosts(MULTIHOST.value, COORDINATOR.value, HOSTS.value, HOST.value)
    from jax_avatar.training.run.guards import RunError
    from jax_avatar.training.run.loop import train
    from jax_avatar.training.stages.build import build_stage

    settings = read_config(CONFIG.value or "", overrides)
    build_task, loop = build_stage(settings, small_batch=SMALL_BATCH.value)
    cli.check_devices()
    if DRY_RUN.value:
        from jax_avatar.planning.training import plan_run

        print(json.dumps(settings, indent=2))
        for line in plan_run(settings, compiled=COMPILE.value):
            print(line)
        return cli.DONE
    check_workdir()
    task = build_task()
    try:
        state = train(
            task,
            loop,
            WORKDIR.value,
            evaluations=evaluations_of(task, settings, loop),
            settings=settings,
            work=work_of(task, settings),
            force=FORCE.value,
        )
    except RunError as error:
        cli.say(f"error: {error}")
        return cli.FAILED
    print(f"{WORKDIR.value}: step {int(state.step)} of {loop.num_steps}")
    return cli.DONE


def main() -> None:
    try:
        config, changes, others = split_arguments(sys.argv)
    except ValueError as error:
        cli.say(f"error: {error}")
        sys.exit(cli.BAD_INPUT)
    argv = [*others, *([f"--config={config}"] if config else [])]
    # Ctrl-C outside of the loop, which saves first.
    cli.run_with_flags(lambda: run(changes), argv=argv, hint="repeat the command to go on")


if __name__ == "__main__":
    main()
