"""Mistakes that hide where tests leave settings equal or at their defaults."""

from tests.planted.mistake import Mistake, tests_in

__all__ = ["SETTINGS"]

conditions = tests_in("training/test_conditions")
distill = tests_in("training/test_distill_settings")
forcing = tests_in("training/test_diffusion_forcing")
ablations = tests_in("configs/test_ablations")
sampling = tests_in("diffusion/test_sampling")
schedules = tests_in("training/test_schedules")

CHANCE = distill("nothing_that_is_drawn_shares_a_key")
LEVELS = distill("noise_levels_are_drawn_per_clip_within_their_bounds")
PULLED = distill("the_generator_is_pulled_from_the_critic_to_the_guided_teacher")
RATES = distill("both_networks_learn_at_their_own_rate_and_warm_up_in_outer_steps")

# fmt: off
SETTINGS = tuple(Mistake("setting", *row) for row in (
    ("the critic learns from clips of the averaged generator", "training/distillation.py",
     "params, exit_step = bind(state.generator),", "params, exit_step = bind(state.ema),",
     distill("the_critic_learns_from_the_generator_not_from_its_average")),
    ("noise and level of the scores share the key of the rollout", "training/distillation.py",
     "made, told, keys[1])", "made, told, keys[0])", CHANCE),
    ("the exit is never the first step", "training/distillation.py",
     "randint(key, (), 0, self", "randint(key, (), 1, self",
     distill("every_exit_occurs_in_the_rollouts_of_both")),
    ("bounds of the scores' levels are ignored", "training/distillation.py",
     "settings.timestep_shift, settings.sigma_bounds)", "settings.timestep_shift)", LEVELS),
    ("the critic learns at the generator's rate", "training/distillation.py",
     "learning_rate=settings.critic_learning_rate", "learning_rate=loop.learning_rate",
     RATES),
    ("the generator's warm-up counts its own updates", "training/distillation.py",
     "make_optimiser(self.loop, step)", "make_optimiser(self.loop)", RATES),
    ("the critic's schedule counts its own updates", "training/distillation.py",
     "make_optimiser(self._critic_loop, step)", "make_optimiser(self._critic_loop)",
     schedules("both_networks_follow_the_outer_step")),
    ("the critic has the loop's schedule", "training/distillation.py",
     "schedule=settings.critic_schedule or loop.schedule", "schedule=loop.schedule",
     schedules("both_networks_follow_the_outer_step")),
    ("the ablation of clean history keeps it noisy", "configs/ablations.py",
     '{"rollout.refresh": "clean"}', '{"rollout.refresh": "none"}',
     ablations("an_ablation_changes_what_its_name_says")),
    ("Algorithm 1 as printed is streamed with Euler's steps", "configs/ablations.py",
     '"rollout.sampler": "renoise", "rollout.gradient": "clip"}', '"rollout.gradient": "clip"}',
     ablations("an_ablation_changes_what_its_name_says")),
    ("the window keeps its blocks, whatever their size", "configs/ablations.py",
     "past = 3 * (settings", "past = count * (settings",
     ablations("the_window_follows_the_block")),
    ("a named set of levels forgets its shift", "diffusion/schedule.py",
     "functools.partial(few_step_schedule, shift=3.0)", "few_step_schedule",
     sampling("levels_have_names")),
    ("a named set of levels has four steps in any case", "diffusion/schedule.py",
     "int(count) if colon else 4", "4", sampling("levels_have_names")),
    ("a constant schedule falls", "training/step.py",
     "share = config.final_learning_rate if config.schedule == \"cosine\" else 1.0",
     "share = config.final_learning_rate",
     schedules("a_schedule_warms_up_and_stays_or_falls[constant]")),
    ("skipped steps hold stage 1's schedule back", "training/step.py",
     "make_optimiser(config, state.step)", "make_optimiser(config)",
     schedules("skipped_steps_do_not_hold_a_schedule_back")),
    ("stage 1's window is a block longer than the stream's", "training/diffusion_forcing.py",
     "past_blocks=model.ring_blocks - 1", "past_blocks=model.ring_blocks",
     forcing("a_block_sees_a_window_of_the_past_and_a_teacher_everything")),
    ("the velocity without conditions is the critic's", "training/distillation.py",
     "self._guided(base, cond,", "self._guided(critic, cond,", PULLED),
    ("the velocity without conditions keeps the prompt", "training/distillation.py",
     "guide(cond, ask(text=told.null_text), scale)", "guide(cond, ask(), scale)",
     (*PULLED, *conditions(
         "the_teacher_is_guided_away_from_silence_and_the_negative_prompt"))),
))
# fmt: on
