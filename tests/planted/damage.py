"""Mistakes in what finds damage: weights, downloads, clients, segments of a room."""

from tests.planted.mistake import Mistake, tests_in

__all__ = ["DAMAGE"]

loop = tests_in("training/run/test_loop")
prepare = tests_in("launch/test_prepare_data")
checksums = tests_in("weights/test_checksums")
writer = tests_in("weights/test_checkpoint_writer")
base = tests_in("training/test_base_weights")
adapters = tests_in("training/test_adapters")
session = tests_in("streaming/test_session")
server = tests_in("serving/test_server")
room = tests_in("serving/test_livekit")
downloads = tests_in("conversion/test_broken_downloads")

FILES = checksums("every_file_of_an_orbax_folder_counts")
OLDER = checksums("an_older_folder_loads_and_its_nan_is_named")
NAN = checksums("nan_and_infinity_are_found_wherever_they_are")
STAGES = base("every_stage_refuses_a_merged_adapter")
INDEX = downloads("a_strange_index_is_named_by_every_command")
SHARD = downloads("a_shard_that_is_something_else_is_named")
HOSTILE = server("no_text_causes_a_traceback")

# fmt: off
DAMAGE = tuple(Mistake("input", *row) for row in (
    ("a file is not compared with its checksum", "weights/files.py",
     "    check_files(folder, [path.name])\n", "", checksums("every_byte_of_a_file_counts")),
    ("an Orbax folder's numbers are not compared", "weights/orbax.py",
     'files = [f"{self.folder.name}/params/{name}/" for name in names]', 'files = ["-"]', FILES),
    ("one leaf is read without its checksum", "weights/orbax.py",
     "self._verify(f\"{self.folder.name}/params/{path.replace('/', '.')}/\")", "pass",
     checksums("one_leaf_read_alone_is_checked_too")),
    ("NaN in a file is not looked for", "weights/files.py",
     "    check_finite(path, flat)  # first: it names the tensor\n", "", OLDER),
    ("NaN on devices is not looked for", "weights/finite.py",
     "    if placed:\n", "    if False:\n", OLDER),
    ("infinity in bfloat16 is not found", "weights/finite.py",
     "(np.uint16, 0x7F80)", "(np.uint16, 0x7FC0)", NAN),
    ("NaN beyond the first piece is not found", "weights/finite.py",
     "range(0, flat.size, _PIECE)", "range(0, _PIECE, _PIECE)", NAN),
    ("checksums stay as they were", "weights/checksums.py",
     "_exchange(folder, name, dict(zip(files, digests, strict=True)))",
     "_exchange(folder, name, before)",
     checksums("checksums_follow_what_is_written")),
    ("weights of any type fit", "weights/networks.py",
     "{'float' if is_wide else dtype}", "", checksums("weights_of_another_type_are_named")),
    ("an adapter's shapes are not compared", "weights/folder.py",
     "check_fit(factors, expected, ", "check_fit(expected, expected, ",
     checksums("an_adapter_of_another_size_is_named")),
    ("output that is not finite is shown", "streaming/decode.py",
     "if not np.asarray(is_finite):", "if False:",
     session("finite_weights_whose_output_is_not_end_the_stream")),
    ("two conversions write the same network", "weights/checkpoint_writer.py",
     "return take_lock(", "return (lambda folder: lambda: None)(",
     writer("two_conversions_cannot_write_the_same_network")),
    ("a Git LFS pointer is text like any other", "weights/whole_file.py",
     'if head.startswith((b"version https://git-lfs"', 'if head.startswith((b"-"', INDEX),
    ("a web page is text like any other", "weights/whole_file.py",
     "(!doctype|html|head|", "(", INDEX),
    ("bytes behind the last tensor pass", "weights/safetensors_file.py",
     "if size > expected:", "if False:", SHARD),
    ("a cut file passes", "weights/safetensors_file.py", "if size < expected:", "if False:", SHARD),
    ("a merged adapter is no reason to stop", "training/base_weights.py",
     'if record.get("merged"):', "if False:", STAGES),
    ("a student's own weights may have an adapter merged in", "training/base_weights.py",
     '"teacher", "student"):', '"teacher"):', STAGES),
    ("an adapter goes on beside any base", "weights/networks.py",
     'if base and history.get("base", "") not in', 'if False and history.get("base", "") not in',
     adapters("an_adapter_beside_another_base_is_refused")),
    ("halves of surrogate pairs reach the session", "serving/messages.py",
     r"\ud800-\udfff]", "]", HOSTILE),
    ("values of another type are converted", "serving/messages.py",
     "strict=True", "strict=False", HOSTILE),
    ("unknown fields of a message pass", "serving/messages.py",
     'extra="forbid"', 'extra="ignore"', HOSTILE),
    ("a token that is no Unicode is compared as text", "serving/access.py",
     '.encode(errors="surrogatepass")', ".encode()", HOSTILE),
    ("a setting may be NaN", "weights/fields.py",
     "    if is_number and not math.isfinite(value):\n", "    if False:\n",
     loop("a_value_of_another_type_is_named")),
    ("sizes that are none end in a traceback", "weights/networks.py",
     "except (ValueError, TypeError, ArithmeticError, MemoryError)", "except MemoryError",
     checksums("damaged_sizes_of_a_network_are_named")),
    ("a stream of no frames a second is taken", "weights/settings.py",
     "if self.fps < 1 or", "if False or", checksums("a_damaged_config_is_named")),
    ("a setting may be below 0", "weights/fields.py",
     "if isinstance(value, int | float) and not 0", "if False and not 0",
     loop("a_value_of_another_type_is_named")),
    ("an average may grow without end", "training/run/step.py",
     '    "ema_decay": 1.0,\n', "", loop("a_setting_that_would_spoil_a_run_is_refused")),
    ("clips are written over the videos they are cut from", "launch/prepare_data.py",
     'cli.refuse_input_as_output("out", arguments.out, **given)', "pass",
     prepare("what_cannot_be_made_is_one_line")),
    ("what the system refuses is a traceback", "launch/cli.py",
     "except (ValueError, OSError) as error:", "except ValueError as error:",
     prepare("what_cannot_be_made_is_one_line")),
    ("a key may stand twice", "serving/messages.py",
     "if len(dict(pairs)) < len(pairs):", "if False:", HOSTILE),
    ("a limit ends a session without a word", "serving/conversation.py",
     "reason, last = str(closed), closed.error", "reason = str(closed)",
     server("limits_that_end_a_session_are_errors_first")),
    ("only the first of several cleared segments is told",
     "serving/links/livekit/segments.py",
     "for number in range(self._num_open):", "for number in range(min(1, self._num_open)):",
     room("a_clear_before_any_sound_is_answered_at_once")),
    ("the runner's account of segments is taken", "serving/links/livekit/video.py",
     "self._finish(length_s)\n", "pass\n", room("segments_in_quick_succession_are_finished_each")),
))
# fmt: on
