"""Mistakes in what refuses bad data and bad settings: a check that is gone or looks away."""

from tests.planted.mistake import Mistake, tests_in

__all__ = ["INPUTS"]

adapters = tests_in("training/test_adapters")
encoded = tests_in("data/test_encoded")
encoding = tests_in("training/test_encoding")
latents = tests_in("training/test_latents")
forcing = tests_in("training/test_diffusion_forcing")
loop = tests_in("training/test_loop")
mesh = tests_in("training/test_mesh")
sizes = tests_in("configs/test_sizes")
distillation = tests_in("training/test_distillation")
rollout = tests_in("training/test_rollout")
videos = tests_in("data/test_videos")
audio = tests_in("io/test_audio")
faces = tests_in("io/test_faces")
mixing = tests_in("io/test_mixing")
video = tests_in("io/test_video")
level = tests_in("streaming/test_working_level")
wav2vec2 = tests_in("models/test_wav2vec2")

models = tests_in("streaming/test_model")
streams = tests_in("streaming/test_streams")
commands = tests_in("launch/test_stream")

BROKEN = encoded("records_with_nan_without_sound_or_out_of_step_are_refused")
CLIPS = encoding("clips_that_cannot_be_encoded_are_named")
DAMAGED = encoded("a_damaged_set_is_refused")
DIVIDE = mesh("what_does_not_divide_is_named")
UNLIKE = models("a_stream_unlike_the_training_is_refused_unless_it_is_forced")
FPS = tests_in("training/test_fps")
FIT = latents("clips_that_do_not_fit_the_model_are_named")

# fmt: off
INPUTS = tuple(Mistake("input", *row) for row in (
    ("a record without sound passes", "data/encoded.py",
     "if len(self.wave) <= samples:", "if False:", BROKEN),
    ("a clip without sound is encoded", "training/encoding.py",
     "if not len(clip.wave):", "if False:", CLIPS),
    ("a video without sound is no reason to reject it", "data/videos/clips.py",
     "if not footage.has_sound:", "if False:",
     videos("people_who_talk_are_kept_and_everything_else_has_a_reason")),
    ("clips of another rate than the model's pass", "training/windows.py",
     "if fps and clips.fps not in (0, fps):", "if False:", FIT),
    ("a student goes on at another rate than it was trained at", "training/stages.py",
     "if trained not in (None, fps):", "if False:",
     FPS("a_model_converted_for_25_frames_is_trained_and_exported_at_16")),
    ("a mel encoder makes features at any rate", "models/audio.py",
     "if fps != self.fps:", "if False:",
     FPS("a_speech_encoder_that_was_trained_for_a_rate_keeps_it")),
    ("a clip of another rate than the speech encoder's is encoded", "training/encoding.py",
     "if clip.fps != encoders.fps or height", "if height", CLIPS),
    ("data of another rate than the speech encoder's are encoded", "training/encoding.py",
     "if first.fps != encoders.fps:", "if False:",
     encoding("the_rate_of_data_and_encoder_must_agree")),
    ("clips of several rates make one set", "data/encoded.py",
     "if len(kinds) != 1:", "if False:", encoded("clips_of_different_kinds_make_no_set")),
    ("a shard that was cut off passes", "data/encoded.py",
     'if have != entry["bytes"]:', "if have is None:", DAMAGED),
    ("a missing shard is not missed", "data/encoded.py",
     'if have != entry["bytes"]:', 'if have and have != entry["bytes"]:', DAMAGED),
    ("the hash of a shard is not compared", "data/encoded.py",
     "if with_hash and", "if False and", DAMAGED),
    ("the hash of the index is not compared", "data/encoded.py",
     'if index["hash"] != _hash(index):', "if False:", DAMAGED),
    ("the hash leaves out what the clips are", "data/encoded.py",
     'if key != "hash"}', 'if key not in ("hash", "splits")}',
     encoded("the_hash_is_that_of_the_content")),
    ("an unfinished set passes", "data/encoded.py",
     'if not index["complete"]:', "if False:", DAMAGED),
    ("data of another VAE pass", "training/latents.py",
     "if used.get(name, value) != value and", "if False and",
     latents("data_of_other_weights_are_refused")),
    ("a run goes on with other data", "training/loop.py",
     'settings["data_hash"] = task.content_hash', "pass",
     loop("a_run_does_not_go_on_with_other_data")),
    ("latents that are not numbers pass", "data/encoded.py",
     "not np.isfinite(value.astype(np.float32)).all()", "False", BROKEN),
    ("infinite latents pass", "data/encoded.py",
     "not np.isfinite(value.astype(np.float32)).all()",
     "np.isnan(value.astype(np.float32)).any()", BROKEN),
    ("features need not be as many as the frames", "data/encoded.py",
     "if value is not None and len(value) != frames:", "if False:", BROKEN),
    ("a folder without an index is opened", "data/encoded.py",
     "if not (folder / INDEX).exists():", "if False:", latents("an_empty_folder_is_refused")),
    ("a folder without clips is encoded", "training/encoding.py",
     "if not splits:", "if False:", encoding("a_folder_without_clips_is_refused")),
    ("a folder without videos is cut", "data/videos/clips.py",
     "if not names:", "if False:", videos("a_folder_without_videos_is_refused")),
    ("a mesh may leave devices over", "training/mesh.py",
     "or len(devices) % (data * model):", "or False:", DIVIDE),
    ("a mesh may take more devices than there are", "training/mesh.py",
     "if data * model > len(devices) or len(devices) % (data * model):",
     "if data * model <= len(devices) and len(devices) % (data * model):", DIVIDE),
    ("clips need not divide by devices", "training/mesh.py",
     "if clips is not None and clips % data:", "if False:", DIVIDE),
    ("heads need not divide by devices", "training/mesh.py",
     "if num_heads is not None and num_heads % model:", "if False:", DIVIDE),
    ("a batch need not divide into its parts", "training/mesh.py",
     "if batch_size is not None and batch_size % accumulate:", "if False:", DIVIDE),
    ("an unknown size is taken for the tiny one", "configs/sizes.py",
     "    if size not in sizes:", '    size = size if size in sizes else "tiny"\n    if False:',
     sizes("an_unknown_size_names_the_nearest")),
    ("an unknown setting is left out", "io/fields.py",
     "        if key not in known:", "        if key not in known:\n            continue\n"
     "        if False:", (*loop("a_misspelt_setting_names_the_nearest"),
                          *sizes("a_mistake_is_named"))),
    ("an unknown choice is taken", "diffusion/sampling.py",
     "if getattr(self, name) not in choices:", "if False:",
     rollout("settings_nobody_knows_are_named")),
    ("blocks that follow one another are spread over slices", "streaming/plan.py",
     "if slices == 1 or not sampling.shares_history:", "if True:",
     streams("blocks_that_follow_one_another_are_not_spread_over_slices")),
    ("--force_sampler is not heard", "launch/stream.py",
     'changes["force_sampler"] = FLAGS.force_sampler', 'changes["force_sampler"] = False',
     commands("wrong_flags_get_one_clear_line")),
    ("a stream unlike the training passes", "streaming/model.py",
     "if not force_sampler:", "if False:", UNLIKE),
    ("a stream unlike the training cannot be forced", "streaming/model.py",
     "if not force_sampler:", "if True:", UNLIKE),
    ("another history than the training's passes", "streaming/model.py",
     '"sampler", "cache", "refresh", "refresh_sigma"', '"sampler"', UNLIKE),
    ("another audio context than the training's passes", "streaming/model.py",
     '"refresh_sigma", "audio_context")', '"refresh_sigma")', UNLIKE),
    ("stage 1 may draw levels below those of its network", "training/diffusion_forcing.py",
     'network.check_level("task.smallest_sigma", settings.smallest_sigma)', "pass",
     forcing("no_levels_are_drawn_at_which_the_network_cannot_meet_its_target")),
    ("scores may be asked below the levels of their network", "training/distillation.py",
     'network.check_level("task.sigma_bounds", settings.sigma_bounds[0])', "pass",
     distillation("parts_that_do_not_fit_are_named")),
    ("a student may be asked below the levels of its network", "training/distillation.py",
     'network.check_level("rollout.sigmas", rollout.sigmas[-2])', "pass",
     distillation("parts_that_do_not_fit_are_named")),
    ("a stream may ask below the levels of its network", "streaming/model.py",
     '_KINDS["dit"][content["dit"]][0].check_level("stream.sigmas", settings.sigmas[-2])', "pass",
     models("a_network_is_not_streamed_below_its_smallest_level")),
    ("a small batch is no reason to stop", "training/stages.py",
     "if task.batch_size < _STABLE_BATCH and", "if False and",
     sizes("large_networks_want_large_batches")),
    ("an adapter needs no weights to start from", "training/stages.py",
     "if task.adapter_rank and not weights.start:", "if False:", sizes("a_mistake_is_named")),
    ("an adapter may be scaled otherwise than it was trained", "training/model_folder.py",
     'if stored["scaling"] != fields["scaling"]:', "if False:",
     adapters("an_adapter_of_another_size_is_named")),
    ("a run goes on with other settings", "training/checkpoints.py",
     "    if differences:", "    if False:",
     loop("other_settings_are_refused_by_name_unless_forced")),
    ("integers are not divided by their range", "io/mixing.py",
     "return data / -float(np.iinfo(data.dtype).min)", "return data.astype(np.float64)",
     mixing("every_format_and_layout_is_the_same_sound")),
    ("packed sound is read as if it were planar", "io/mixing.py",
     "    if not frame.format.is_planar:\n        data", "    if False:\n        data",
     mixing("packed_and_planar_channels_are_not_confused")),
    ("the centre counts like the sides", "io/mixing.py",
     '"FC": 2 * _ACROSS', '"FC": 1.0', mixing("channels_are_mixed_as_itu_says")),
    ("silent channels count", "io/mixing.py",
     "heard = self._all * self._active", "heard = self._all",
     mixing("speech_in_one_channel_is_heard_whole_and_told")),
    ("channels may cancel each other", "io/mixing.py",
     "if self._recent_mix < _CANCELLED * parts and", "if False and",
     mixing("channels_out_of_phase_are_not_lost")),
    ("integers in floats are taken for sound", "io/mixing.py",
     "if math.isfinite(peak) and peak", "if False and peak",
     mixing("floats_in_the_range_of_integers_are_divided_by_it")),
    ("quiet sound is not told", "io/mixing.py",
     "self._loudest < _QUIET:", "False:", mixing("quiet_sound_is_told_at_its_end")),
    ("a file on standard input is taken for raw samples", "io/audio.py",
     "if kind := container_kind(data):", "if kind := None:",
     audio("a_file_on_standard_input_is_decoded_as_what_it_is")),
    ("the first read decides what standard input holds", "io/audio.py",
     "while len(head) < wanted and (part", "while not head and (part",
     audio("a_file_on_standard_input_is_decoded_as_what_it_is")),
    ("the first audio track is heard", "io/media.py",
     "return best if best in tracks else next", "return next",
     audio("the_track_that_players_take_is_heard")),
    ("an older video is lost to a part of a new one", "io/video.py",
     "if not is_whole:", "if False:",
     video("a_part_takes_the_name_and_an_older_video_is_kept")),
    ("a video takes its name before it is whole", "io/video.py",
     "part = _unused(part)", "part = target",
     video("an_older_video_stays_until_the_new_one_is_whole")),
    ("pixels are taken for square", "data/videos/footage.py",
     "float(picture.sample_aspect_ratio or 1)", "1.0",
     videos("pixels_that_are_not_square_become_square")),
    ("mirrored videos stay mirrored", "data/videos/footage.py",
     "if a * d - b * c < 0:", "if False:", videos("pictures_stand_as_players_show_them")),
    ("the clock of a file begins at 0", "data/videos/footage.py",
     "self._begin_s = float((picture.start_time or 0) * picture.time_base)", "self._begin_s = 0.0",
     videos("a_file_that_begins_late_begins_with_its_first_picture")),
    ("every picture shows a face", "io/faces.py",
     "best = max(best, _score(", "best = max(1.0, _score(",
     faces("what_shows_no_face_is_told")),
    ("parts of a picture are not searched for faces", "io/faces.py",
     "for top in _starts(height, side):", "for top in []:",
     faces("a_photograph_shows_a_face")),
    ("quiet speech stays quiet for the encoder", "streaming/working_level.py",
     "self.gain = 10 ** (wanted / 20) if wanted else 1.0", "self.gain = 1.0",
     level("quiet_speech_is_brought_to_the_level_of_training")),
    ("a pause is taken for quiet speech", "streaming/working_level.py",
     "_ABOVE_FLOOR_DB = 10.0", "_ABOVE_FLOOR_DB = -100.0",
     level("rooms_and_silence_are_not_taken_for_quiet_speech")),
    ("a wave is normalised in float32", "models/wav2vec2.py",
     "exact = np.asarray(wave, np.float64)", "exact = np.asarray(wave, np.float32)",
     wav2vec2("a_long_quiet_wave_with_an_offset_is_normalised_as_in_float64")),
))
# fmt: on
