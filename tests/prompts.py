"""Prompt encoders and tokenizers for tests: small, random."""

from flax import nnx

from jax_avatar.models.config import UMT5Config
from jax_avatar.models.network import Network
from jax_avatar.models.text import UMT5Encoder
from jax_avatar.weights.fields import plain_fields
from jax_avatar.weights.files import load_json, save_json, save_weights

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
    values = dict(vocab_size=64, width=4, ffn_width=8, num_heads=2, head_dim=2, num_layers=2)
    config = UMT5Config(**(values | changes))
    fields = plain_fields(config)
    params = Network.of(UMT5Encoder(config, rngs=nnx.Rngs(7))).params
    save_weights(folder, "text", params, fields)
    save_json(folder / "config.json", load_json(folder / "config.json") | {"text": "umt5"})
    save_tokenizer(folder / "text_tokenizer", kind)
    return folder
