"""The small model at 128x128, for a GPU: more people, wider, longer clips, the whole chain.

    bash benchmarks/gpu/3_data.sh
    bash benchmarks/gpu/4_encoders.sh
    bash benchmarks/gpu/5_dit.sh

Times and order are in `benchmarks/GPU.md`; none of it has been run yet.
"""

import os

from ml_collections import ConfigDict

from configs import diffusion_forcing, dmd, speech, teacher, vae

WORK = os.environ.get("WORK", "runs/small_128")
STAGES = {
    "speech": speech,
    "vae": vae,
    "teacher": teacher,
    "diffusion_forcing": diffusion_forcing,
    "dmd": dmd,
}


def get_config(stage: str = "dmd") -> ConfigDict:
    """Settings of one of the `STAGES`."""
    config = STAGES[stage].get_config("small")
    config.loop.update(evaluate_every=2000, checkpoint_every=500)
    if stage == "speech":
        config.task.update(cache=f"{WORK}/corpus", flite=3000, hibari=0, kokoro=0, batch=32)
        config.loop.update(num_steps=4000, evaluate_every=0)
        return config
    config.data = f"{WORK}/people"
    if stage == "vae":
        config.task.update(
            batch_size=16, frames=25, square_weight=4.0, gradient_weight=0.5, motion_weight=2.0
        )
        config.loop.update(
            num_steps=15_000, learning_rate=1e-3, warmup_steps=300, ema_decay=0.999,
            checkpoint_every=1000,
        )  # fmt: skip
        return config
    config.latents = f"{WORK}/latents"
    config.model.update(width=256, ffn_width=1024, num_layers=8, unroll=2, ring_blocks=4)
    config.model.audio_inject_layers = [0, 2, 4, 6]
    config.task.update(batch_size=64, latents=21)
    if stage == "dmd":
        config.weights = {"model": f"{WORK}/diffusion_forcing", "teacher": f"{WORK}/teacher"}
        config.weights.student = f"{WORK}/diffusion_forcing"
        # As the student that ships, with the clips per update that one could not afford.
        config.task.update(batch_size=32, ema_start=200)
        config.loop.update(num_steps=1000, warmup_steps=20, ema_decay=0.99, evaluate_every=200)
        return config
    start = f"{WORK}/teacher" if stage == "diffusion_forcing" else ""
    config.weights.update(speech=f"{WORK}/speech", vae=f"{WORK}/vae", start=start)
    steps = 10_000 if stage == "teacher" else 4000
    config.loop.update(num_steps=steps, learning_rate=4e-4, warmup_steps=500, ema_decay=0.999)
    return config
