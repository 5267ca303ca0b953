"""Tokenizers in GGUF files: the same ids as the tokenizer that was written, read by transformers."""

import json

import pytest
import tokenizer_kinds
from exported_models import exportable
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import klfast
from klfast.export.gguf.pre_tokenizers import pre_tokenizer_name
from klfast.export.gguf.write import export_gguf

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def exported(path, tokenizer):
    return export_gguf(exportable("llama", vocabulary=len(tokenizer) + 3), path / "m.gguf", tokenizer)


@pytest.mark.parametrize("kind", ["byte-level BPE", "BPE with byte fallback"])
def test_ids(tmp_path, kind):
    tokenizer = tokenizer_kinds.tokenizer(kind)
    assert not exported(tmp_path, tokenizer).notes
    found = klfast.load_tokenizer(tmp_path / "m.gguf")
    for text in tokenizer_kinds.TEXT[:4]:
        assert found(text, add_special_tokens=False)["input_ids"] == tokenizer(text)["input_ids"], text
    assert (found.bos_token_id, found.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


@pytest.mark.parametrize(
    ("steps", "ignores_merges", "name"),
    [
        ([GPT2], False, "gpt-2"),
        ([pre_tokenizers.Digits(individual_digits=True), GPT2], False, "smollm"),
        ([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES], True, "llama-bpe"),
        ([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES], False, "dbrx"),
        ([pre_tokenizers.Split(Regex(LLAMA3.replace("{1,3}", "")), "isolated"), BYTES], False, "qwen2"),
    ],
)
def test_ways_to_split(steps, ignores_merges, name):
    made = Tokenizer(models.BPE(ignore_merges=ignores_merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    assert pre_tokenizer_name(json.loads(made.to_str()), "") == name


def refused(path, tokenizer, match):
    with pytest.raises(klfast.InvalidInputError, match=match):
        exported(path, tokenizer)
    assert not list(path.iterdir())


def test_what_gguf_cannot_say(tmp_path):
    refused(tmp_path, tokenizer_kinds.tokenizer("Unigram"), "BPE tokenizers into GGUF files, this one is Unigram")
    made = Tokenizer(models.BPE({"a": 0, "aa": 1}, []))
    refused(tmp_path, PreTrainedTokenizerFast(tokenizer_object=made), "loads no BPE without merges")
    made = Tokenizer(models.BPE({"a": 0, "aa": 1}, [("a", "a")]))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("a+"), "isolated"), BYTES])
    strange = PreTrainedTokenizerFast(tokenizer_object=made)
    refused(tmp_path, strange, "name it with --pre-tokenizer")
    export_gguf(exportable("llama"), tmp_path / "m.gguf", strange, pre_tokenizer="gpt-2")
    (tmp_path / "m.gguf").unlink()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    refused(tmp_path, PreTrainedTokenizerFast(tokenizer_object=made), "neither on bytes nor with bytes")


def test_more_tokens_than_the_model(tmp_path):
    with pytest.raises(klfast.InvalidInputError, match=r"the tokenizer has \d+ tokens more than the model, 61"):
        export_gguf(exportable("llama"), tmp_path / "m.gguf", tokenizer_kinds.tokenizer("byte-level BPE"))
