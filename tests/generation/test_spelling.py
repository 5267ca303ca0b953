"""The text and the bytes of single tokens."""

import pytest
from tokenizer_kinds import KINDS, TEXT, tokenizer

from klfast.generation.spelling import Spelling

BYTES_KNOWN = ("byte-level BPE", "BPE with byte fallback")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", sorted(set(TEXT)))
def test_texts_make_up_the_whole(kind, text):
    words = tokenizer(kind)
    spelling, ids = Spelling(words), words(text, add_special_tokens=False)["input_ids"]
    made = "".join(map(spelling.text, ids)).removeprefix(" ")
    assert "\ufffd" in made or made in (words.decode(ids), words.decode(ids, clean_up_tokenization_spaces=False))


@pytest.mark.parametrize("kind", BYTES_KNOWN)
@pytest.mark.parametrize("text", [*sorted(set(TEXT)), "漢🦜", "".join(map(chr, range(1, 400)))])
def test_bytes_make_up_the_whole(kind, text):
    words = tokenizer(kind)
    spelling, ids = Spelling(words), words(text, add_special_tokens=False)["input_ids"]
    made = b"".join(map(spelling.utf8, ids))
    assert made.decode().removeprefix(" ") == text.removeprefix(" ")


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_text_where_it_is_whole(kind):
    words = tokenizer(kind)
    spelling = Spelling(words)
    for token in range(len(words)):
        text, raw = spelling.text(token), spelling.utf8(token)
        if "\ufffd" not in text:
            assert raw == text.encode()
        else:
            assert kind in BYTES_KNOWN and raw.decode(errors="replace") == text
    assert spelling.utf8(words.bos_token_id).strip() == b"<s>"


def test_bytes_that_the_tokenizer_does_not_tell():
    words = tokenizer("WordLevel")
    words = type(words)(tokenizer_object=words.backend_tokenizer, unk_token="<unk>")
    words.add_tokens(["\ufffd"])
    assert Spelling(words).utf8(len(words) - 1) is None
