"""Trains one stage: `python launch/train.py --config=configs/small_cpu.py:vae --workdir runs/vae`.

Repeating the command continues where the run stopped. Settings are changed as
`--config.loop.num_steps=100`; `--dry_run` prints them and checks without training.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from absl import app, flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", help_string="Config file and stage.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and weights.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print and check the settings, then stop.")
FORCE = flags.DEFINE_bool("force", False, "Resume although the settings differ.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"{argv[1:]}: only --flags are expected")
    # Late, so that --help and misspelt flags answer at once.
    from jax_avatar.training.loop import train
    from jax_avatar.training.stages import build_stage

    settings = CONFIG.value.to_dict()
    try:
        build_task, loop = build_stage(settings)
        if DRY_RUN.value:
            print(CONFIG.value)
            return
        state = train(build_task(), loop, WORKDIR.value, settings=settings, force=FORCE.value)
    except ValueError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"{WORKDIR.value}: step {int(state.step)} of {loop.num_steps}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
