"""Every stage at toy size, to see the machinery run; the result talks to nobody.

    python launch/prepare_data.py people --out data/nano --people 8 --clips_per_person 2
    python launch/train.py --config=configs/nano.py:vae --workdir runs/nano/vae

Minutes on a laptop, each stage.
"""

from ml_collections import ConfigDict

from configs import small_cpu


def get_config(stage: str = "dit") -> ConfigDict:
    """Settings of one stage: "speech", "vae" or "dit"."""
    config = small_cpu.get_config(stage)
    config.loop.update(
        num_steps=60, warmup_steps=10, log_every=10, checkpoint_every=30, evaluate_every=0
    )
    if stage == "speech":
        config.task.update(cache="data/nano_corpus", num_sentences=16, num_check_sentences=4)
        return config
    config.data = "data/nano"
    if stage == "vae":
        config.model.update(latent_width=24, frame_width=16, stem_width=16, frame_blocks=1)
        config.task.batch_size = 2
        return config
    config.latents = "data/nano_latents"
    config.weights.update(speech="runs/nano/speech", vae="runs/nano/vae")
    config.model.update(width=48, ffn_width=96, num_heads=4, num_layers=2, unroll=1)
    config.model.audio_inject_layers = [0]
    config.task.batch_size = 2
    return config
