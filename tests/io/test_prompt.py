import sys

import numpy as np
import pytest

from jax_avatar.io.prompt import Tokenizer, clean_prompt
from tests.prompts import PROMPTS, save_tokenizer


@pytest.fixture(scope="module", params=["json", "sentencepiece"])
def folder(request, tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize(
    ("written", "cleaned"),
    [
        (" two\t words\r\n\u3000here ", "two words here"),
        ("&amp;lt;b&amp;gt; &amp; A&nbsp;B", "<b> & A B"),
        ("it\u2019s \uff46\uff55\uff4c\uff4c", "it's full"),
        ("Kept, NOT lowered_!", "Kept, NOT lowered_!"),
        ("", ""),
    ],
)
def test_cleaning(written, cleaned):
    assert clean_prompt(written) == cleaned
    assert clean_prompt(cleaned) == cleaned


def test_a_prompt_ends_with_the_end_token_and_is_padded(folder):
    tokenizer = Tokenizer(folder)
    ids, mask = tokenizer(PROMPTS[0], 50)
    count = mask.sum()
    assert 1 < count < 50 and ids.shape == mask.shape == (50,)
    assert ids.dtype == mask.dtype == np.int32
    assert ids[count - 1] == tokenizer.eos_id == 1
    assert (ids[count:] == tokenizer.pad_id).all() and tokenizer.pad_id == 0
    assert (mask == (np.arange(50) < count)).all()
    assert not {tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id} & set(ids[: count - 1])


def test_a_long_prompt_loses_its_end_but_not_the_end_token(folder):
    tokenizer = Tokenizer(folder)
    whole, mask = tokenizer(PROMPTS[1], 50)
    count = int(mask.sum())
    for length in (1, 4, count - 1, count):
        ids, mask = tokenizer(PROMPTS[1], length)
        assert mask.all()
        np.testing.assert_array_equal(ids[:-1], whole[: length - 1])
        assert ids[-1] == tokenizer.eos_id
    with pytest.raises(ValueError, match="no room for the end token"):
        tokenizer(PROMPTS[1], 0)


def test_no_words_are_the_end_token_alone(folder):
    tokenizer = Tokenizer(folder)
    ids, mask = tokenizer("", 3)
    assert ids.tolist() == [1, 0, 0] and mask.tolist() == [1, 0, 0]


def test_what_the_vocabulary_lacks_is_the_unknown_token(folder):
    tokenizer = Tokenizer(folder)
    assert tokenizer.unk_id == 2 and tokenizer.unk_id in tokenizer("\u4e00", 8)[0]


def test_settings_inside_the_file_do_not_pad_or_end_twice(tmp_path):
    import tokenizers
    from tokenizers.processors import TemplateProcessing

    save_tokenizer(tmp_path)
    expected = Tokenizer(tmp_path)(PROMPTS[0], 40)
    path = str(tmp_path / "tokenizer.json")
    tokenizer = tokenizers.Tokenizer.from_file(path)
    tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    tokenizer.enable_padding(length=30)
    tokenizer.enable_truncation(4)
    tokenizer.save(path)
    np.testing.assert_array_equal(Tokenizer(tmp_path)(PROMPTS[0], 40), expected)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"neither tokenizer.json nor spiece.model \(found: no f"):
        Tokenizer(tmp_path / "gone")
    (tmp_path / "other.txt").write_text("")
    with pytest.raises(ValueError, match=r"other\.txt.*umt5-xxl"):
        Tokenizer(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"spiece\.model is not a readable tokenizer"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a readable tokenizer"):
        Tokenizer(tmp_path)


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    import tokenizers
    from tokenizers import models

    words = models.WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>")
    tokenizers.Tokenizer(words).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"has no </s>"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("package", ["ftfy", "tokenizers", "sentencepiece"])
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, package):
    kind = "sentencepiece" if package == "sentencepiece" else "json"
    save_tokenizer(tmp_path, kind)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"package {package}.*jax_avatar\[text\]"):
        clean_prompt("x")
        Tokenizer(tmp_path)
