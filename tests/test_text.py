"""Text and token files as batches."""

import json

import numpy as np
import pytest
import tiny_folder as tiny
import torch

from klfast.core.errors import InvalidInputError
from klfast.text import token_batches


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny.save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def bos_tokenizer(tmp_path_factory):
    return tiny.save_tokenizer(tmp_path_factory.mktemp("bos"), bos=True)


def write(folder, content, name="text.txt"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_text_is_cut_from_its_start_and_the_rest_is_dropped(tmp_path, tokenizer):
    text = "The quick brown fox jumps over it."
    batches = token_batches(write(tmp_path, text), tokenizer, vocab_size=257, length=10, batch_size=2)
    assert [tuple(b.shape) for b in batches] == [(2, 10), (1, 10)]
    assert all(b.dtype == torch.int64 for b in batches)
    assert tokenizer.decode(torch.cat(batches).flatten()) == text[:30]


def test_windows_limit_what_is_read(tmp_path, tokenizer):
    path = write(tmp_path, b"abcdefgh" * 5000 + b"\xff")  # the end is not UTF-8
    (batch,) = token_batches(path, tokenizer, vocab_size=257, length=8, windows=3, batch_size=4)
    assert tokenizer.batch_decode(batch) == ["abcdefgh"] * 3


def test_reads_on_if_tokens_take_many_characters(tmp_path):
    class Words:  # one token per 200 characters
        bos_token_id = None

        def __call__(self, text, **_):
            return {"input_ids": [7] * (len(text) // 200)}

    batches = token_batches(write(tmp_path, "a" * 20_000), Words(), vocab_size=8, length=10, windows=9, batch_size=9)
    assert tuple(batches[0].shape) == (9, 10)


@pytest.mark.parametrize("windows", [1_000_000, 10**30])
def test_more_windows_than_the_text_has(tmp_path, tokenizer, windows):
    path = write(tmp_path, "abcdefgh" * 1000)
    found = torch.cat(token_batches(path, tokenizer, vocab_size=257, length=2048, windows=windows))
    assert len(found) == 3
    assert torch.equal(found, torch.cat(token_batches(path, tokenizer, vocab_size=257, length=2048)))


def test_byte_order_marks_are_skipped(tmp_path, tokenizer):
    (batch,) = token_batches(write(tmp_path, b"\xef\xbb\xbfabcd"), tokenizer, vocab_size=257, windows=1)
    assert tokenizer.decode(batch[0]) == "abcd"
    (batch,) = token_batches(write(tmp_path, b"\xef\xbb\xbf[1, 2, 3]", "ids.json"), vocab_size=257)
    assert batch.tolist() == [[1, 2, 3]]


def npy(header):
    """Return a .npy file of version 1.0 with that header and three numbers."""
    header = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(24)


def test_damaged_npy_files_are_refused(tmp_path):
    path = tmp_path / "ids.npy"
    whole = npy("{'descr': '<i8', 'fortran_order': False, 'shape': (3,), }")
    path.write_bytes(whole)
    assert token_batches(path, vocab_size=7)[0].tolist() == [[0, 0, 0]]
    errors = []
    for bit in range(0, 8 * len(whole), 3):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            token_batches(path, vocab_size=7)
        except InvalidInputError as error:
            errors.append(str(error))
    assert errors and all("ids.npy" in error and "\n" not in error for error in errors)


def test_short_text_becomes_one_short_window(tmp_path, tokenizer):
    (batch,) = token_batches(write(tmp_path, "abc"), tokenizer, vocab_size=257, length=512)
    assert tuple(batch.shape) == (1, 3)


def test_each_window_starts_with_bos_if_the_tokenizer_adds_one(tmp_path, bos_tokenizer):
    (batch,) = token_batches(write(tmp_path, "abcdefg"), bos_tokenizer, vocab_size=257, length=4)
    assert batch[:, 0].tolist() == [256, 256]
    assert bos_tokenizer.batch_decode(batch[:, 1:]) == ["abc", "def"]


@pytest.mark.parametrize("name", ["ids.npy", "ids.json"])
@pytest.mark.parametrize(
    ("ids", "expected"),
    [([1, 2, 3, 4, 5], [[1, 2], [3, 4]]), ([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 5, 6]])],
    ids=["list", "matrix"],
)
def test_token_files(tmp_path, name, ids, expected):
    path = tmp_path / name
    if name.endswith("npy"):
        np.save(path, np.array(ids, dtype=np.uint16))
    else:
        path.write_text(json.dumps(ids))
    assert torch.cat(token_batches(path, vocab_size=7, length=2)).tolist() == expected


def test_bundled_texts_differ(tokenizer):
    calibration, evaluation = (
        torch.cat(token_batches(n, tokenizer, vocab_size=257, length=64, windows=8))
        for n in ("calibration", "evaluation")
    )
    assert calibration.shape == evaluation.shape == (8, 64)
    assert not torch.equal(calibration, evaluation)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("", "text.txt", "is empty"),
        (" \n\t ", "text.txt", "is empty"),
        ("a", "text.txt", "holds 1 tokens"),
        (b"abc\xff\xfe", "text.txt", "not UTF-8"),
        ("[]", "ids.json", "is empty"),
        ("[1, 2", "ids.json", "cannot be read"),
        pytest.param("[" * 200_000, "ids.json", "cannot be read", id="deeply nested"),
        ("[[1, 2], [3]]", "ids.json", "cannot be read"),
        ("[1.5, 2.5]", "ids.json", "must hold integers"),
        ('{"ids": [1, 2]}', "ids.json", "must hold integers"),
        ("[1, 300]", "ids.json", "token id 300"),
        ("[1, -1]", "ids.json", "token id -1"),
        (b"\x93NUMPY", "ids.npy", "cannot be read"),
        pytest.param(
            npy("{'descr': '<i8', 'fortran_order': False, 'shape': (10000000000000,), }"),
            "ids.npy",
            r"ids\.npy cannot be read",
            id="73 TiB",
        ),
        pytest.param(
            npy("{'descr': '<i8', 'fortran_order': False, 'shape': (3,"),
            "ids.npy",
            r"ids\.npy cannot be read",
            id="tokenize.TokenError",
        ),
        pytest.param(
            npy("{'descr': '<i8', 'fortran_order': False, 'shape': (3, 1), }"),
            "ids.npy",
            "holds windows of 1 tokens; at least 2",
            id="width 1",
        ),
        pytest.param(
            npy("{'descr': '<u8', 'fortran_order': False, 'shape': (3,), }")[:-1] + b"\xff",
            "ids.npy",
            "token id 18374686479671623680, which no",
            id="uint64",
        ),
        ("[18446744073709551615, 1]", "ids.json", r"ids\.json (must|holds token id)"),
    ],
)
def test_bad_content(tmp_path, tokenizer, content, name, message):
    with pytest.raises(InvalidInputError, match=message) as caught:
        token_batches(write(tmp_path, content, name), tokenizer, vocab_size=257)
    assert "\n" not in str(caught.value)


def test_never_unpickles(tmp_path):
    np.save(tmp_path / "ids.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(InvalidInputError, match="allow_pickle"):
        token_batches(tmp_path / "ids.npy", vocab_size=257)


@pytest.mark.parametrize(("name", "value"), [("length", 1), ("windows", 0), ("batch_size", 0)])
def test_sizes_below_their_minimum(tmp_path, tokenizer, name, value):
    with pytest.raises(InvalidInputError, match=f"{name} must be at least"):
        token_batches(write(tmp_path, "abc"), tokenizer, vocab_size=257, **{name: value})


def test_missing_file_or_tokenizer(tmp_path, tokenizer):
    with pytest.raises(InvalidInputError, match="no file"):
        token_batches(tmp_path / "none.txt", tokenizer, vocab_size=257)
    with pytest.raises(InvalidInputError, match="no tokenizer"):
        token_batches(write(tmp_path, "abc"), vocab_size=257)
