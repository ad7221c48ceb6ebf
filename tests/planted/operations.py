"""Mistakes in what a run tells and leaves behind: logs, records, caches, times, loading."""

from tests.planted.mistake import Mistake, tests_in

__all__ = ["OPERATIONS"]

loggers = tests_in("training/test_loggers")
train = tests_in("launch/test_train")

RESUMED = loggers("metrics_go_to_every_logger_and_a_resumed_run_is_the_same_one_there")
STARTS = loggers("every_start_is_recorded")

# fmt: off
OPERATIONS = tuple(Mistake("run", *row) for row in (
    ("a resumed run is another one at W&B", "training/loggers.py",
     "if note.exists() else", "if False else", RESUMED),
    ("the project of W&B is ignored", "training/journal.py",
     "        if wandb:", "        if False:", RESUMED),
    ("missing event files are not told", "training/journal.py",
     "except ImportError:\n            warn(", "except ImportError:\n            str(",
     loggers("missing_event_files_are_told")),
    ("what W&B refuses is a traceback", "training/loggers.py",
     "except wandb.errors.Error as error:", "except KeyError as error:",
     loggers("a_missing_or_refusing_library_is_one_clear_line_before_the_first_step")),
    ("the record of a resumed run replaces the first one", "training/run_record.py",
     '(workdir / RUNS).open("a")', '(workdir / RUNS).open("w")', STARTS),
    ("the record of a run leaves out its bookkeeping", "training/loop.py",
     '"loop": dataclasses.asdict(config)}', '"loop": {}}', STARTS),
    ("training compiles again after every start", "launch/train.py",
     "    keep_compiled()\n", "", train("training_keeps_what_it_compiles")),
))
# fmt: on
