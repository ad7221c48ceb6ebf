"""The small model at 128x128, for a GPU: more people, wider, longer clips.

    bash benchmarks/gpu/3_data.sh
    bash benchmarks/gpu/4_encoders.sh
    bash benchmarks/gpu/5_dit.sh

Times and order are in `benchmarks/GPU.md`; none of it has been run yet.
"""

import os

from ml_collections import ConfigDict

from configs import diffusion_forcing, speech, vae

WORK = os.environ.get("WORK", "runs/small_128")


def get_config(stage: str = "dit") -> ConfigDict:
    """Settings of one stage: "speech", "vae" or "dit"."""
    stages = {"speech": speech, "vae": vae, "dit": diffusion_forcing}
    config = stages[stage].get_config("small")
    if stage == "speech":
        config.task.update(cache=f"{WORK}/corpus", num_sentences=3000, batch=32)
        config.loop.update(num_steps=4000)
        return config
    config.data = f"{WORK}/people"
    if stage == "vae":
        config.task.update(batch_size=16, frames=25)
        config.loop.update(
            num_steps=15_000, learning_rate=1e-3, warmup_steps=300, ema_decay=0.999,
            evaluate_every=2500, checkpoint_every=1000,
        )  # fmt: skip
        return config
    config.latents = f"{WORK}/latents"
    config.weights.update(speech=f"{WORK}/speech", vae=f"{WORK}/vae", start="")
    config.model.update(width=256, ffn_width=1024, num_layers=8, unroll=2, ring_blocks=4)
    config.model.audio_inject_layers = [0, 2, 4, 6]
    config.task.update(batch_size=64, latents=21)
    config.loop.update(
        num_steps=14_000, learning_rate=4e-4, warmup_steps=500, ema_decay=0.999,
        evaluate_every=2000, checkpoint_every=500,
    )  # fmt: skip
    return config
