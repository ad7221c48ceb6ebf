"""Every setting of the training configs and a fast test that fails where it is ignored.

`test_settings.py` compares this table with the dataclasses; `python -m tests.planted ignored` lets
every setting be ignored in turn and sees that its test fails.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["FILES", "SETTINGS", "Cosmetic", "Noticed"]


FILES = {
    "AnchoredTaskConfig": "training/stages/anchored_vae.py",
    "AnchoredVAEConfig": "models/vae/anchored.py",
    "DiTConfig": "models/config.py",
    "DistillConfig": "training/distill_state.py",
    "DistillWeights": "training/stages/distill.py",
    "EncodeConfig": "data/encode.py",
    "ForcingConfig": "training/stages/flow.py",
    "LightVAEConfig": "models/vae/light.py",
    "LoopConfig": "training/run/step.py",
    "MovedPortraitsConfig": "data/talking_people/moved_portraits.py",
    "RolloutConfig": "training/rollout_plan.py",
    "SamplerConfig": "training/teacher.py",
    "SpeechConfig": "models/speech/mel.py",
    "SpeechTaskConfig": "training/stages/speech.py",
    "StageWeights": "training/base_weights.py",
    "VAELossConfig": "training/stages/light_vae.py",
}
"""Where each config is, in `jax_avatar`."""


@dataclass(frozen=True)
class Noticed:
    """The test that notices a setting.

    Attributes:
        test: file in `tests` without "test_" and ".py", and name without "test_".
        ignored_as: value that an ignored setting has; its default if not given.
    """

    test: str
    ignored_as: Any = None

    @property
    def test_id(self) -> str:
        """As pytest takes it."""
        file, _, name = self.test.partition("::")
        folder, _, stem = file.rpartition("/")
        return f"tests/{folder}/test_{stem}.py::test_{name}"


@dataclass(frozen=True)
class Cosmetic:
    """A setting that changes no result; why."""

    reason: str


def _in(file: str, **names: str) -> dict[str, Noticed]:
    """Fields -> names of tests in a file."""
    return {field: Noticed(f"{file}::{name}") for field, name in names.items()}


def _all_in(file: str, name: str, *fields: str) -> dict[str, Noticed]:
    """Fields that one test notices."""
    return {field: Noticed(f"{file}::{name}") for field in fields}


_ADAPTERS = {
    "adapter_alpha": Noticed("training/adapters::an_adapter_of_another_size_is_named"),
}

_ANCHORED = "training/stages/anchored_vae"
_PORTRAITS = "data/moved_portraits"
_DISTILL = "training/distill_settings"
_FORCING = "training/stages/flow_settings"
_LOOP = "training/run/loop_settings"
_ROLLOUT = "training/rollout_settings"
_STAGE = "training/stages/stage_settings"
_VAE = "training/stages/light_vae_settings"

SETTINGS: dict[str, Mapping[str, Noticed | Cosmetic]] = {
    "DistillConfig": {
        **_ADAPTERS,
        **_in(
            _DISTILL,
            generator_every="both_networks_learn_at_their_own_rate_and_warm_up_in_outer_steps",
            critic_learning_rate="both_networks_learn_at_their_own_rate_and_warm_up_in_outer_steps",
            guidance_scale="the_generator_is_pulled_from_the_critic_to_the_guided_teacher",
            gradient_limit="the_generator_is_pulled_from_the_critic_to_the_guided_teacher",
            timestep_shift="noise_levels_are_drawn_per_clip_within_their_bounds",
            sigma_bounds="noise_levels_are_drawn_per_clip_within_their_bounds",
            normalizer="the_normaliser_is_that_of_a_clip_or_of_a_block",
            clean_limit="updates_on_clips_beyond_the_limit_are_skipped",
            ema_start="the_average_starts_at_its_step_and_keeps_its_decay",
        ),
        **_all_in(
            _DISTILL,
            "monitors_are_reviewed_as_often_as_told_and_add_critic_steps_up_to_the_limit",
            "monitor_every",
            "max_critic_steps",
        ),
        **_all_in(
            _STAGE,
            "a_batch_of_distillation_has_as_many_clips_as_long_as_told",
            "batch_size",
            "latents",
        ),
        **_in(
            "training/distillation",
            adapter_rank="the_exported_folder_is_a_model_with_the_student",
            replay_limit="a_replay_that_strays_changes_nothing",
        ),
        "critic_schedule": Noticed("training/run/schedules::both_networks_follow_the_outer_step"),
        "schedule_counts": Noticed(
            "training/run/schedules::each_optimiser_can_count_its_own_updates"
        ),
        **_in(
            "training/conditions",
            text_guidance_scale="a_critic_that_is_the_teacher_guided_apart_leaves_no_gradient",
            guidance_bounds="only_levels_within_the_band_are_guided",
        ),
    },
    "DistillWeights": {
        "model": Noticed(f"{_STAGE}::distillation_reads_each_network_from_its_folder", "nowhere"),
        **_all_in(
            _STAGE, "distillation_reads_each_network_from_its_folder", "teacher", "student"
        ),
    },
    "RolloutConfig": {
        **_in(
            _ROLLOUT,
            sampler="renoising_takes_new_noise_for_every_block_and_step",
            cache="with_one_history_every_step_sees_that_of_the_exit",
            refresh="a_clean_history_is_that_of_the_finished_block",
            refresh_sigma="a_fixed_history_is_noised_anew_to_its_level",
            kv_noise="the_sink_gets_noise_if_told",
            kv_noise_on="keys_and_values_get_noise_relative_to_their_size_where_told",
            kv_noise_sink="the_sink_gets_noise_if_told",
            sigmas="every_step_sees_history_at_its_own_level",
            sink_distance="places_are_drawn_from_their_whole_ranges",
            shift_max="places_are_drawn_from_their_whole_ranges",
            gradient="exits_are_repeated_one_by_one_or_differentiated_in_the_rollout",
        ),
        **_in(
            "training/rollout",
            sink_distance_per="chance_depends_on_the_key_and_stays_in_its_ranges",
            audio_context="a_rollout_hears_what_a_stream_hears",
        ),
    },
    "ForcingConfig": {
        **_ADAPTERS,
        "adapter_rank": Noticed("training/adapters::stage_2_goes_on_with_the_adapter"),
        **_in(
            _FORCING,
            batch_size="a_batch_has_as_many_clips_as_long_as_told",
            latents="a_batch_has_as_many_clips_as_long_as_told",
            shift="levels_are_shifted_as_told_and_rescaled_above_the_smallest",
            shared_share="levels_are_shifted_as_told_and_rescaled_above_the_smallest",
            smallest_sigma="levels_are_shifted_as_told_and_rescaled_above_the_smallest",
            audio_dropout="each_condition_is_dropped_as_often_as_told_and_for_itself",
            text_dropout="each_condition_is_dropped_as_often_as_told_and_for_itself",
            reference_dropout="each_condition_is_dropped_as_often_as_told_and_for_itself",
            reference_noise=(
                "the_portraits_noise_is_at_most_as_told_and_of_its_own_strength_in_every_clip"
            ),
            shift_max="clips_start_and_portraits_stand_within_their_ranges",
            reference_frames="clips_start_and_portraits_stand_within_their_ranges",
            weight="the_weight_of_a_level_is_in_the_loss",
            mouth_weight="an_error_at_the_mouth_counts_as_often_as_told",
            mouth_probe_weight="lips_that_are_read_count_as_told_where_speech_is_heard",
        ),
        **_in(
            "training/stages/flow",
            still_share="only_the_stillest_windows_of_every_person_are_kept",
            form="a_block_sees_a_window_of_the_past_and_a_teacher_everything",
            sink="the_portrait_follows_the_clip_or_stays",
            audio_context="a_block_sees_a_window_of_the_past_and_a_teacher_everything",
            motion_frames="motion_latents_are_seen_and_move_with_the_clip",
        ),
    },
    "StageWeights": {
        "model": Noticed(f"{_STAGE}::flow_matching_reads_each_network_from_its_folder", "nowhere"),
        **_all_in(
            _STAGE,
            "flow_matching_reads_each_network_from_its_folder",
            *("vae", "speech", "start"),
        ),
    },
    "SamplerConfig": {
        **_all_in(
            _STAGE,
            "a_teacher_samples_with_its_steps_shift_and_seed",
            *("num_steps", "shift", "seed"),
        ),
        "guidance": Noticed(
            "training/teacher::"
            "guidance_leads_away_from_a_clip_without_speech_but_with_the_portrait"
        ),
    },
    "LoopConfig": {
        "num_steps": Noticed(
            f"{_LOOP}::the_rate_rises_to_its_top_and_falls_to_its_share_of_it", 30
        ),
        **_all_in(
            _LOOP,
            "a_step_is_adamw_at_the_rate_of_its_number_and_its_average_follows",
            *("weight_decay", "betas", "max_grad_norm", "ema_decay"),
        ),
        **_in(
            _LOOP,
            learning_rate="the_rate_rises_to_its_top_and_falls_to_its_share_of_it",
            warmup_steps="the_rate_rises_to_its_top_and_falls_to_its_share_of_it",
            final_learning_rate="the_rate_rises_to_its_top_and_falls_to_its_share_of_it",
            accumulate="a_batch_is_cut_into_the_parts_and_over_the_devices_that_are_told",
            mesh="a_batch_is_cut_into_the_parts_and_over_the_devices_that_are_told",
            seed="a_run_is_another_with_another_seed",
            keep="as_many_of_the_latest_checkpoints_stay_as_told",
            evaluate_every="checkpoints_evaluations_and_lines_come_as_often_as_told",
            checkpoint_every="checkpoints_evaluations_and_lines_come_as_often_as_told",
            log_every="checkpoints_evaluations_and_lines_come_as_often_as_told",
        ),
        "schedule": Noticed("training/run/schedules::a_schedule_warms_up_and_stays_or_falls"),
        **_all_in(
            "training/run/guards",
            "the_latest_the_round_and_the_last_good_checkpoint_stay",
            "keep_every",
        ),
        "validation_clips": Noticed(
            "training/stages/validation::clips_that_are_not_there_or_not_asked_for_are_left_out"
        ),
        "evaluate_clips": Noticed("launch/train::an_evaluation_streams_as_many_clips_as_told"),
        "workers": Noticed("training/run/loader::settings_that_cannot_be_kept_are_named"),
        "max_minutes": Noticed("training/run/loop::the_time_limit_saves"),
        "profile": Noticed("training/run/clock::steps_are_traced_where_asked"),
        "wandb": Noticed(
            "training/run/loggers::"
            "metrics_go_to_every_logger_and_a_resumed_run_is_the_same_one_there"
        ),
    },
    "EncodeConfig": {
        **_in(
            "data/encode",
            phases="a_folder_becomes_a_set_that_trains",
            clips_per_shard="an_interrupted_encoding_goes_on_to_the_same_set",
            store_features="features_and_the_negative_prompt_are_stored_as_told",
            reference_repeats="a_repeated_portrait_keeps_its_last_latent",
            negative_prompt="features_and_the_negative_prompt_are_stored_as_told",
        ),
    },
    "SpeechTaskConfig": {
        **_all_in(
            "training/stages/speech",
            "corpus_and_clips_are_as_many_and_as_long_as_told",
            *("cache", "flite", "hibari", "kokoro", "num_checks", "clip_frames", "batch"),
        ),
        "seed": Noticed(
            "training/stages/speech::another_seed_makes_other_sentences_and_other_clips"
        ),
    },
    "SpeechConfig": {
        **_all_in(
            "models/audio",
            "every_size_is_in_the_weights",
            *("bands", "width", "kernel", "dilations", "units"),
        ),
        **_all_in(
            "models/audio",
            "rates_and_frequencies_are_those_of_the_settings",
            *("sample_rate", "fps", "lookahead_ms", "min_hz", "max_hz"),
        ),
        **_all_in(
            "models/audio",
            "bands_are_normalised_before_the_network",
            *("mel_mean", "mel_std"),
        ),
    },
    "VAELossConfig": {
        **_all_in(
            _VAE,
            "every_part_of_the_loss_has_its_weight",
            *("mouth_weight", "square_weight", "gradient_weight", "motion_weight"),
            "latent_weight",
        ),
        **_in(
            _VAE,
            basis_mouth_weight="the_basis_is_fitted_with_its_own_weight_of_the_mouth",
            latent_noise="noise_of_a_latent_is_at_most_as_told_and_of_its_own_strength",
            colour_jitter="colours_are_changed_by_at_most_as_told_and_alike_in_a_clip",
            train_encoder="the_encoder_is_a_parameter_only_if_it_is_trained",
        ),
        **_all_in(
            _VAE,
            "batches_are_as_large_and_as_often_cropped_as_told",
            *("batch_size", "frames", "crop", "crop_share"),
        ),
        "start_from": Noticed("training/stages/light_vae::export_holds_what_was_evaluated"),
    },
    "AnchoredTaskConfig": {
        **_all_in(
            _ANCHORED,
            "every_part_of_the_loss_has_its_weight",
            *("edge_weight", "flow_weight", "mask_weight", "paint_weight", "shape_weight"),
            *("motion_weight", "face_weight", "eye_weight", "latent_noise", "colour_jitter"),
        ),
        **_all_in(
            _ANCHORED,
            "batches_are_as_large_as_told_and_draw_from_more_and_more_people",
            *("people", "first_people", "new_people", "batch_size", "frames"),
        ),
        "cache": Noticed(f"{_ANCHORED}::a_mirrored_row_is_the_mirrored_picture", "elsewhere"),
        "held_out_people": Noticed(
            f"{_ANCHORED}::evaluation_looks_at_as_many_held_out_people_as_told"
        ),
        "start_from": Noticed(
            f"{_ANCHORED}::export_holds_what_was_evaluated_and_is_gone_on_with"
        ),
    },
    "AnchoredVAEConfig": {
        **_all_in(
            "models/anchored_vae",
            "every_size_is_in_the_weights",
            *("curves", "leading", "latent_shape", "feature_widths", "code_width", "flow_width"),
            *("frame_width", "face_width", "encoder_widths"),
        ),
        "scale": Noticed("models/anchored_vae::curves_are_in_their_own_units", (1.0,) * 10),
        "temporal_stride": Cosmetic("any value but the default is refused"),
    },
    "MovedPortraitsConfig": {
        **_all_in(
            _PORTRAITS,
            "pictures_are_as_many_and_as_large_as_told",
            *("size", "count", "texture_size"),
        ),
        **_all_in(_PORTRAITS, "plain_sets_are_whole_windows_of_a_clip", "is_plain", "fps"),
        "movement": Noticed(f"{_PORTRAITS}::movement_scales_the_head"),
    },
    "LightVAEConfig": {
        **_all_in(
            "models/light_vae",
            "every_size_is_in_the_weights",
            *("z_dim", "latent_width", "frame_width", "stem_width"),
            *("encoder_blocks", "latent_blocks", "frame_blocks"),
        ),
        "latent_mean": Noticed("models/light_vae::latents_are_normalised", (0.0,) * 5),
        "latent_std": Noticed("models/light_vae::latents_are_normalised", (1.0,) * 5),
        "spatial_stride": Cosmetic("any value but the default is refused"),
        "temporal_stride": Cosmetic("any value but the default is refused"),
    },
    "DiTConfig": {
        **{
            field: Noticed("models/dit::every_size_is_in_the_weights", value)
            for field, value in {
                "width": 24, "ffn_width": 32, "num_layers": 2, "freq_width": 8, "text_width": 4,
                "latent_channels": 4, "pose_channels": 4, "audio_width": 6, "audio_layers": 2,
                "num_audio_tokens": 2, "framepack": False,
            }.items()
        },
        **_all_in(
            "models/dit",
            "every_size_is_in_the_weights",
            *("audio_inject_layers", "adapter_rank", "param_dtype"),
        ),
        "num_heads": Noticed("models/dit::every_switch_is_in_the_program", 2),
        **_all_in(
            "models/dit",
            "every_switch_is_in_the_program",
            *("eps", "dtype", "unroll", "rematerialise", "audio_history", "adapter_scaling"),
            *("rope_theta", "half_rotary", "reference_frame"),
        ),
        "zero_init": Noticed("models/dit::pose_starts_at_zero_if_told"),
        "text_len": Noticed("models/dit::wrong_audio_length_and_prompt_are_named"),
        "frames_per_block": Noticed(
            "data/latents::clips_that_do_not_fit_the_model_are_named", 2
        ),
        "ring_blocks": Noticed(
            "training/stages/flow::"
            "a_block_sees_a_window_of_the_past_and_a_teacher_everything"
        ),
        "weights": Noticed("models/quantise::rounded_parameters_fit_the_network_and_its_leaves"),
        "attention": Cosmetic("kernels compute the same; tests/models/test_attention.py"),
    },
}  # fmt: skip
