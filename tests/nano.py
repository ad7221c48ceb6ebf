"""The smallest networks that still have every part; shared by the tests."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_avatar.models.conditions import Conditions
from jax_avatar.models.config import DiTConfig
from jax_avatar.models.dit import DiT
from jax_avatar.models.network import Network

CONFIG = DiTConfig(
    width=24,
    ffn_width=32,
    num_heads=2,
    num_layers=2,
    freq_width=8,
    text_width=4,
    text_len=3,
    latent_channels=4,
    pose_channels=4,
    audio_width=6,
    audio_layers=2,
    num_audio_tokens=2,
    audio_inject_layers=(0,),
    zero_init=False,
)
GRID = (8, 8)  # latent rows and columns: every pool of the motion packer has a token


def make_network(config: DiTConfig = CONFIG, seed: int = 0, kind: type[DiT] = DiT) -> Network:
    """A transformer of random weights, the head's included (it starts at zero)."""
    network = Network.of(kind(config, rngs=nnx.Rngs(seed)))
    kernel = network.params["head"]["kernel"]
    network.params["head"]["kernel"] = 0.1 * jax.random.normal(jax.random.key(seed), kernel.shape)
    return network


def make_dit(config: DiTConfig = CONFIG, seed: int = 0, kind: type[DiT] = DiT):
    """Structure and weights of `make_network`."""
    network = make_network(config, seed, kind)
    return network.structure, network.params


def make_conditions(config: DiTConfig = CONFIG, batch: int = 1, seed: int = 1) -> Conditions:
    """Random portrait, prompt and pose; motion where the network packs it."""
    keys = jax.random.split(jax.random.key(seed), 4)
    latent = (batch, 1, *GRID, config.latent_channels)
    motion = (batch, 19, *GRID, config.latent_channels)
    pose = (batch, config.frames_per_block, *GRID, config.pose_channels)
    return Conditions(
        text=jax.random.normal(keys[0], (batch, 2, config.text_width)),
        reference=jax.random.normal(keys[1], latent),
        motion=jax.random.normal(keys[2], motion) if config.framepack else None,
        pose=jax.random.normal(keys[3], pose),
    )


def make_audio(blocks: int, config: DiTConfig = CONFIG, speakers: int = 1, seed: int = 2):
    """Random speech features, one array per block."""
    frames = 4 * config.frames_per_block
    shape = (blocks, 1, speakers, frames, config.audio_layers, config.audio_width)
    return np.asarray(jax.random.normal(jax.random.key(seed), shape))


def make_latents(frames: int, config: DiTConfig = CONFIG, batch: int = 1, seed: int = 3):
    """Random latents of a clip."""
    shape = (batch, frames, *GRID, config.latent_channels)
    return jnp.asarray(jax.random.normal(jax.random.key(seed), shape))


def save_model(folder, *, name="nano", speech="mel", framepack=False, **stream):
    """Writes a model folder of random nano networks, 16x16... pixels as `GRID` says.

    Args:
        folder: where to.
        name: of the model.
        speech: kind of its front end; "wav2vec2" makes 25 frames per second, "mel" 16.
        framepack: the transformer has the motion packer.
        **stream: settings other than these.
    """
    import dataclasses

    from jax_avatar.models.speech.mel import SpeechConfig, SpeechEncoder
    from jax_avatar.models.speech.wav2vec2 import Wav2Vec2, Wav2Vec2Config
    from jax_avatar.models.vae.light import LightVAE, LightVAEConfig
    from jax_avatar.weights.files import save_json, save_weights

    if speech == "wav2vec2":
        front_end = Wav2Vec2Config(
            width=6, num_layers=1, num_heads=2, ffn_width=8, conv_widths=(4,) * 7,
            position_kernel=16, position_groups=2, look_back_s=0.96,
        )  # fmt: skip
        speech_params = Network.of(jax.jit(lambda: Wav2Vec2(front_end, rngs=nnx.Rngs(6)))()).params
    else:
        front_end = SpeechConfig(bands=8, width=6, dilations=(1,))
        speech_params = Network.of(SpeechEncoder(front_end, rngs=nnx.Rngs(6))).params
    vae = LightVAEConfig(
        z_dim=4, latent_width=8, frame_width=8, stem_width=8, latent_blocks=1, frame_blocks=1
    )
    config = CONFIG.replace(framepack=framepack)
    fields = dataclasses.asdict(config) | {"dtype": "float32", "param_dtype": "float32"}
    _, params = make_dit(config)
    save_weights(folder, "dit", params, fields)
    params = Network.of(LightVAE(vae, rngs=nnx.Rngs(5))).params
    save_weights(folder, "vae", params, dataclasses.asdict(vae))
    fields = dataclasses.asdict(front_end)
    fields |= {key: "float32" for key in ("dtype", "param_dtype") if key in fields}
    save_weights(folder, "speech", speech_params, fields)
    settings = {
        "fps": front_end.fps,
        "size": [8 * GRID[0], 8 * GRID[1]],
        "sigmas": [1.0, 0.75, 0.5, 0.25, 0.0],
        "aas_after_blocks": 4,
        "sink_distance": [16, 16],
        "pose": "reference",
        "warmup_latents": 2,
    }
    kinds = {"name": name, "dit": "wan_s2v", "vae": "light", "speech": speech}
    save_json(folder / "config.json", kinds | {"stream": settings | stream})
    return folder


PROMPTS = ["a man speaks to the camera", "a woman sings in a kitchen, calmly", "café: it's raining"]


def save_tokenizer(folder, kind="json"):
    """Writes a stand-in for T5's tokenizer: `tokenizer.json` or `spiece.model`."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "json":
        import tokenizers
        from tokenizers import models, pre_tokenizers, trainers

        tokenizer = tokenizers.Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=60,
            special_tokens=["<pad>", "</s>", "<unk>"],
            unk_token="<unk>",
            show_progress=False,
        )
        tokenizer.train_from_iterator(PROMPTS * 20, trainer)
        tokenizer.save(str(folder / "tokenizer.json"))
    else:
        import sentencepiece

        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(PROMPTS * 20),
            model_prefix=str(folder / "spiece"),
            vocab_size=40,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
        (folder / "spiece.vocab").unlink()
    return folder


def save_text_encoder(folder, kind="json", **changes):
    """Adds a random prompt encoder and a tokenizer to the model in `folder`."""
    import dataclasses

    from jax_avatar.models.config import UMT5Config
    from jax_avatar.models.text import UMT5Encoder
    from jax_avatar.weights.files import load_json, save_json, save_weights

    values = dict(vocab_size=64, width=4, ffn_width=8, num_heads=2, head_dim=2, num_layers=2)
    config = UMT5Config(**(values | changes))
    fields = dataclasses.asdict(config) | {"dtype": "float32", "param_dtype": "float32"}
    params = Network.of(UMT5Encoder(config, rngs=nnx.Rngs(7))).params
    save_weights(folder, "text", params, fields)
    save_json(folder / "config.json", load_json(folder / "config.json") | {"text": "umt5"})
    save_tokenizer(folder / "text_tokenizer", kind)
    return folder


def save_orbax(folder, params, config, metadata=None):
    """Writes a network's weights to the Orbax folder `folder`, as a conversion does."""
    from jax_avatar.models.network import flatten
    from jax_avatar.weights.checkpoint_writer import ResumableCheckpointWriter

    leaves = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    writer = ResumableCheckpointWriter(folder, leaves, config, metadata or {})
    writer.write("all", {(path, ()): leaf for path, leaf in leaves.items()})
    writer.finish()
