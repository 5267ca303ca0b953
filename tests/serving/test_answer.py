"""One answer: stop strings, and what is told of its tokens."""

import pytest
import torch
from tokenizer_kinds import TEXT, tokenizer

from klfast.generation.penalties import Penalties
from klfast.generation.scores import TokenScores
from klfast.generation.settings import Settings
from klfast.generation.spelling import Spelling
from klfast.serving.answer import Answer
from klfast.serving.replies import Chats, Completions, Scored

FALLBACK, LEVEL = "BPE with byte fallback", "byte-level BPE"


def written(kind, ids, *, strings=(), top=None, spelled=()):
    """Return the pieces of an answer with the first of these tokens, after "The sea"."""
    words, pieces = tokenizer(kind), []
    settings = Settings(len(ids), None, Penalties(), [], list(strings), None)
    prompt = words("The sea", add_special_tokens=False)["input_ids"]
    answer = Answer(prompt, settings, words, top_logprobs=top, spelled=spelled, deliver=pieces.append)
    for token in ids:
        if not answer.is_done:
            answer.take(torch.eye(len(words))[token : token + 1] * 9)
    return pieces


def text_of(pieces):
    return "".join(piece.text for piece in pieces)


@pytest.mark.parametrize("before", [[], ["<0xE4>", "<0xB8>", "<0xAD>"]])
def test_a_line_feed_in_a_byte_stops_at_once(before):
    names = ["▁boat", *before, "<0x0A>", "<0x0A>", "▁boat"]
    pieces = written(FALLBACK, tokenizer(FALLBACK).convert_tokens_to_ids(names), strings=["\n"])
    assert len(pieces) == 2 + len(before) and pieces[-1].finish == "stop"
    assert text_of(pieces) == (" boat中" if before else " boat")


@pytest.mark.parametrize(
    ("stop", "text", "finish"),
    [
        ("<s>", " boat", "stop"),
        ("at<s>", " bo", "stop"),
        ("s>", " boat", "stop"),
        ("<s> a", " boat", "stop"),
        ("<s>the", " boat and", "length"),
        ("nd", " boat a", "stop"),
    ],
)
def test_stop_strings_may_spell_special_tokens(stop, text, finish):
    words = tokenizer(LEVEL)
    first, second = (words(part, add_special_tokens=False)["input_ids"] for part in (" boat", " and"))
    pieces = written(LEVEL, [*first, words.bos_token_id, *second], strings=[stop])
    assert (text_of(pieces), pieces[-1].finish) == (text, finish)


def test_special_tokens_that_are_part_of_the_text():
    words = tokenizer(LEVEL)
    first, second = (words(part, add_special_tokens=False)["input_ids"] for part in (" boat", " and"))
    ids = [*first, words.bos_token_id, words.eos_token_id, *second]
    assert text_of(written(LEVEL, ids, spelled=["<s>"])) == " boat<s> and"
    assert text_of(written(LEVEL, ids, spelled=["<s>"], strings=["</s> a"])) == " boat<s>"


def test_a_special_token_settles_what_is_in_front_of_a_stop_string():
    words = tokenizer(LEVEL)
    part = words("漢", add_special_tokens=False)["input_ids"][:1]
    pieces = written(LEVEL, [*part, words.bos_token_id, *part], strings=["<s>"])
    assert (text_of(pieces), pieces[-1].finish, len(pieces)) == ("\ufffd", "stop", 2)


@pytest.mark.parametrize("kind", [FALLBACK, LEVEL])
def test_tokens_and_offsets_fit_the_text(kind):
    words = tokenizer(kind)
    text = "boat didn't move" if kind == FALLBACK else " boat didn't move"  # which puts a space before
    ids = words(text, add_special_tokens=False)["input_ids"]
    pieces = written(kind, ids, top=0)
    scored = [Scored(piece.scores, piece.offset) for piece in pieces]
    found = Completions(Spelling(words)).whole(0, text_of(pieces), scored, "length")
    tokens, offsets = found["logprobs"]["tokens"], found["logprobs"]["text_offset"]
    assert "".join(tokens) == found["text"] == " boat didn't move"
    assert [found["text"][at : at + len(token)] for at, token in zip(offsets, tokens, strict=True)] == tokens


@pytest.mark.parametrize("kind", [FALLBACK, LEVEL])
def test_parts_of_characters(kind):
    words = tokenizer(kind)
    ids = [token for letter in "Ω🦊x" for token in words(letter, add_special_tokens=False)["input_ids"]]
    ids = [token for token in ids if words.convert_ids_to_tokens(token) != "▁"]
    pieces = written(kind, ids, top=0)
    scored = [Scored(piece.scores, piece.offset) for piece in pieces]
    content = Chats(Spelling(words)).whole(0, text_of(pieces), scored, "length")["logprobs"]["content"]
    raw = b"".join(bytes(one["bytes"]) for one in content)
    assert raw.decode().replace(" ", "") == text_of(pieces).replace(" ", "") == "Ω🦊x"
    assert [piece.offset for piece in pieces] == [0, 0, *[1] * (len(ids) - 3), 2]  # "Ω" has two tokens


def test_of_tokens_that_are_spelled_alike_the_best_counts():
    words = tokenizer(FALLBACK)
    ids = words.convert_tokens_to_ids(["<0xE4>", "<0xE5>", "▁boat"])
    scores = TokenScores(ids[0], -1.0, [(ids[0], -1.0), (ids[2], -2.0), (ids[1], -3.0)])
    found = Completions(Spelling(words)).whole(0, "", [Scored(scores, 0)], None)
    assert found["logprobs"]["top_logprobs"] == [{"\ufffd": -1.0, " boat": -2.0}]
    top = Chats(Spelling(words)).whole(0, "", [Scored(scores, 0)], None)["logprobs"]["content"][0]["top_logprobs"]
    assert [one["bytes"] for one in top] == [[0xE4], list(b" boat"), [0xE5]]


def test_text_does_not_depend_on_stop_strings_that_never_come():
    for kind in (FALLBACK, LEVEL):
        ids = tokenizer(kind)(TEXT[3], add_special_tokens=False)["input_ids"]
        assert text_of(written(kind, ids, strings=["<s>", "never"])) == text_of(written(kind, ids))
