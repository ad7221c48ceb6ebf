"""Mistakes in what a run tells and leaves behind: logs, records, caches, times, loading."""

from tests.planted.mistake import Mistake, tests_in

__all__ = ["OPERATIONS"]

clock = tests_in("training/run/test_clock")
loader = tests_in("training/run/test_loader")
loggers = tests_in("training/run/test_loggers")
loop = tests_in("training/run/test_loop")
norms = tests_in("training/run/test_norms")
pixels = tests_in("test_pixels")
statistics = tests_in("data/test_statistics")
train = tests_in("launch/test_train")
videos = tests_in("data/test_videos")

RATES = clock("rates_are_of_the_interval_without_compilation_and_evaluation")
WORK = clock("work_of_a_step_follows_batch_clips_adapters_and_hardware")
TRACED = clock("steps_are_traced_where_asked")
RESUMED = loggers("metrics_go_to_every_logger_and_a_resumed_run_is_the_same_one_there")
STARTS = loggers("every_start_is_recorded")

# fmt: off
OPERATIONS = tuple(Mistake("run", *row) for row in (
    ("a resumed run is another one at W&B", "training/run/loggers.py",
     "if note.exists() else", "if False else", RESUMED),
    ("the project of W&B is ignored", "training/run/journal.py",
     "        if wandb:", "        if False:", RESUMED),
    ("missing event files are not told", "training/run/journal.py",
     "except ImportError:\n            warn(", "except ImportError:\n            str(",
     loggers("missing_event_files_are_told")),
    ("what W&B refuses takes several lines", "training/run/loggers.py",
     "{' '.join(str(error).split())}", "{error}",
     loggers("a_missing_or_refusing_library_is_one_clear_line_before_the_first_step")),
    ("the record of a resumed run replaces the first one", "training/run/run_record.py",
     '(workdir / RUNS).open("a")', '(workdir / RUNS).open("w")', STARTS),
    ("the record of a run leaves out its bookkeeping", "training/run/loop.py",
     '"loop": dataclasses.asdict(config), ', '"loop": {}, ', STARTS),
    ("training compiles again after every start", "launch/train.py",
     "    keep_compiled()\n", "", train("training_keeps_what_it_compiles")),
    ("norms of a skipped update are those of one that was made", "training/run/norms.py",
     "jnp.where(cause == 0, value, 0.0)", "value",
     norms("a_step_tells_the_norms_of_what_it_did[1]")),
    ("speech layers count as attention", "training/run/norms.py",
     '"injectors": "audio"', '"injectors": "attention"',
     norms("every_parameter_of_a_transformer_belongs_to_one_family")),
    ("the distance of the average is that of the gradient", "training/run/step.py",
     "average_distance(state.ema, state.params)", "average_distance(grads, state.params)",
     norms("a_step_tells_the_norms_of_what_it_did[None]")),
    ("levels are of the first samples, not of the clip's", "data/statistics.py",
     "np.mean(np.square(wave.astype(np.float64)))",
     "np.mean(np.square(wave[:1].astype(np.float64)))",
     statistics("raw_clips_are_counted_and_measured")),
    ("a sample is the first clips", "data/statistics.py",
     "np.linspace(0, total - 1, min(sample, total))", "np.arange(min(sample, total))",
     statistics("a_sample_counts_all_clips_and_opens_some")),
    ("what cannot be measured is left out silently", "data/statistics.py",
     """missing["faces"] = f'""", """missing["fps"] = f'""",
     statistics("what_cannot_be_measured_here_is_named")),
    ("every part is rejected for a reason of its own", "data/statistics.py",
     'return re.sub(r"\\d+(\\.\\d+)?", "#", named)', "return named",
     videos("statistics_tell_what_was_kept_and_why_the_rest_was_not")),
    ("an undetermined language is one", "data/videos/footage.py",
     'if self.language == "und"', "if False", videos("the_language_is_what_the_file_says[und-]")),
    ("a full disk is what TensorStore says of it", "training/run/checkpoints.py",
     "if text in str(error)), None)", "if False), None)",
     loop("a_full_disk_is_one_line_and_the_checkpoint_before_it_is_gone_on_from")),
    ("processes begin with another step than asked for", "training/run/loader.py",
     "grain.MapDataset.range(first, last)", "grain.MapDataset.range(0, last)",
     loader("batches_depend_on_their_step_alone")),
    ("the number of processes is ignored", "training/run/loader.py",
     "grain.MultiprocessingOptions(workers,", "grain.MultiprocessingOptions(1,",
     loader("as_many_processes_as_asked_for_make_them")),
    ("the setting of processes is ignored", "training/run/loop.py",
     "workers=config.workers)", "workers=0)", loader("settings_that_cannot_be_kept_are_named")),
    ("a batch that cannot be made costs the steps before it", "training/run/loop.py",
     "        except DataError:", "        except KeyError:",
     loader("a_batch_that_cannot_be_made_costs_no_step")),
    ("a wait counts although the devices are at work", "training/run/clock.py",
     "max(0.0, end - max(start, self._finished))", "end - start",
     clock("waiting_for_data_counts_only_while_the_devices_are_idle[0.15-0.03]")),
    ("a step begins before the one ahead of it has ended", "training/run/clock.py",
     "        start = max(start, self._finished)\n", "",
     clock("waiting_for_data_counts_only_while_the_devices_are_idle[0.01-0.1]")),
    ("evaluations slow the steps down", "training/run/clock.py",
     ' - seconds["evaluation"]', "", RATES),
    ("a step that compiles counts like others", "training/run/clock.py",
     "        self._kinds.add(kind)\n", "        self._kinds.add(kind)\n        self._steps += 1\n",
     RATES),
    ("rates are means since the start", "training/run/clock.py",
     "        self._steps, self._started = 0, time.monotonic()",
     "        self._steps, self._started = 0, self.__dict__.get('_started', time.monotonic())",
     RATES),
    ("a backend that does not count memory ends the run", "training/run/clock.py",
     "device.memory_stats() or {}", "device.memory_stats()",
     clock("memory_is_left_out_where_a_backend_does_not_count")),
    ("MFU leaves out the gradient", "planning/work.py",
     "(2 if rank else 3) * weights + 3 * attention", "weights + attention", WORK),
    ("MFU takes an unknown device for a known one", "planning/work.py",
     "if hardware else 0.0", "if hardware else 1e12", WORK),
    ("a trace is a step too long", "training/run/profile.py",
     "step >= self._range[1]", "step > self._range[1]", TRACED),
    ("a trace may go beyond the run", "training/run/step.py",
     "traced[1] > self.num_steps", "False", clock("a_range_that_cannot_be_traced_is_named")),
    ("pixels are cut off instead of rounded", "pixels.py",
     "* 127.5).round()", "* 127.5)", pixels("all_pixels_survive_the_range_of_the_networks")),
    ("PSNR is of the whole picture wherever it is asked for", "pixels.py",
     "(error * where).sum((1, 2)) / where.sum((1, 2))", "error.mean((1, 2))",
     pixels("psnr_counts_squared_errors_where_it_is_told_to")),
))
# fmt: on
