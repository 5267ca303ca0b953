"""Text of tokens that arrive one at a time: the pieces make up the tokenizer's text of the whole."""

import re
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import KINDS, TEXT, tokenizer

from klfast.generation.text_stream import TextStream


def streamed(words, ids, prompt=()):
    stream = TextStream(words, list(prompt))
    return [*map(stream.push, ids), stream.end()]


def whole_text(kind, ids):
    """Return the tokenizer's text, but runs of bytes end with each ASCII byte."""
    words = tokenizer(kind)
    if kind != "BPE with byte fallback":
        return words.decode(ids, skip_special_tokens=True)
    special = {i for i, token in words.added_tokens_decoder.items() if token.special}
    text, run = "", b""
    for name in [*words.convert_ids_to_tokens([i for i in ids if i not in special]), ""]:
        byte = re.fullmatch("<0x(..)>", name)
        if byte:
            run += bytes.fromhex(byte[1])
        if run and (not byte or run.isascii() or run[-1] < 0x80):
            try:
                text += run.decode()
            except UnicodeDecodeError:
                text += "\ufffd" * len(run)
            run = b""
        text += "" if byte else name.replace("▁", " ")
    return text.removeprefix(" ")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_make_up_the_whole(kind, data):
    words = tokenizer(kind)
    some = st.integers(0, len(words) - 1)
    few = st.sampled_from(sorted(data.draw(st.sets(some, min_size=1, max_size=4))))  # runs of the same tokens or bytes
    ids = data.draw(st.lists(st.one_of(some, few), max_size=90))
    assert "".join(streamed(words, ids)) == whole_text(kind, ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", sorted(set(TEXT)))
def test_text_follows_its_prompt(kind, text):
    words = tokenizer(kind)
    ids = words(text)["input_ids"]
    for cut in range(1, len(ids)):
        before = words.decode(ids[:cut], skip_special_tokens=True)
        whole = words.decode(ids, skip_special_tokens=True)
        if whole.startswith(before) and not before.endswith("\ufffd"):  # a prompt that decodes on its own
            assert before + "".join(streamed(words, ids[cut:], ids[:cut])) == whole


def test_emoji_appear_with_their_last_byte():
    words = tokenizer("byte-level BPE")
    ids = words("🐙🐙 a", add_special_tokens=False)["input_ids"]
    pieces = [piece for piece in streamed(words, ids) if piece]
    assert pieces[:2] == ["🐙", "🐙"] and len(ids) > 4


def test_ascii_bytes_appear_at_once():
    words = tokenizer("BPE with byte fallback")
    letter = [f"<0x{byte:02X}>" for byte in "中".encode()]
    names = ["<0x0A>", *letter, "<0x0A>", "<0x0A>", *letter, "▁boat", "<0xFF>", "<0x41>", "<0xFF>"]
    pieces = ["\n", "", "", "", "中\n", "\n", "", "", "", "中 boat", "", "\ufffd\ufffd", "", "\ufffd"]
    for prompt in ([], ["▁boat"], ["▁boat", "<0x0A>"], [*letter, "<0x0A>"]):
        assert streamed(words, words.convert_tokens_to_ids(names), words.convert_tokens_to_ids(prompt)) == pieces


def complete_text(kind, ids):
    """Return the tokenizer's text without a part of a character at the end."""
    if kind != "BPE with byte fallback":
        return tokenizer(kind).decode(ids).rstrip("\ufffd")
    names = [name.replace("▁", " ") for name in tokenizer(kind).convert_ids_to_tokens(ids)]
    raw = b"".join(bytes.fromhex(name[3:5]) if name.startswith("<0x") else name.encode() for name in names)
    return raw.decode(errors="ignore").removeprefix(" ")


@pytest.mark.parametrize("kind", KINDS)
def test_counts_the_characters_in_front_of_each_token(kind):
    words = tokenizer(kind)
    ids = words(TEXT[2] + TEXT[3], add_special_tokens=False)["input_ids"]
    stream = TextStream(words)
    for i, token in enumerate(ids):
        assert stream.written == len(complete_text(kind, ids[:i]))
        stream.push(token)


@pytest.mark.parametrize(("kind", "most"), [("byte-level BPE", 0), ("WordPiece", 0), ("Unigram", 2), ("WordLevel", 2)])
def test_words_are_not_held_back(kind, most):
    words = tokenizer(kind)
    ids = words("The boat and the sea", add_special_tokens=False)["input_ids"]
    for end in range(1, len(ids)):
        assert len(streamed(words, ids[:end])[-1]) <= most


def test_cost_per_token_is_constant():
    words = tokenizer("byte-level BPE")
    decoded = []
    counting = SimpleNamespace(
        decode=lambda ids, **options: decoded.append(len(ids)) or words.decode(ids, **options),
        all_special_ids=words.all_special_ids,
        added_tokens_decoder=words.added_tokens_decoder,
        convert_tokens_to_ids=words.convert_tokens_to_ids,
        unk_token_id=None,
    )
    streamed(counting, words(TEXT[1])["input_ids"] * 100, words(TEXT[0])["input_ids"] * 100)
    assert max(decoded) <= 25


def test_runs_of_bytes_that_turn_out_invalid():
    """ByteFallback writes each byte of an invalid run as a replacement, even those of a valid letter at its start."""
    words = tokenizer("BPE with byte fallback")
    letter = words.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in "中".encode()])
    wrong, space = words.convert_tokens_to_ids(["<0xFF>", "▁"])
    long = [*letter * 12, wrong, space] * 2
    for ids in (
        [*letter, space],
        [*letter, wrong, space],
        [space, *letter, *letter, wrong],
        long,
        [space] * 9 + letter * 12,
    ):
        assert "".join(streamed(words, ids)) == words.decode(ids, skip_special_tokens=True)
    assert "".join(streamed(words, [*letter, wrong])) == "\ufffd" * 4
