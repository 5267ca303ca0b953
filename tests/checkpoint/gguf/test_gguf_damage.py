"""GGUF files that cannot be loaded: one line that says why."""

import struct
import sys

import gguf_files
import numpy as np
import pytest

import klfast
from klfast.core.errors import CheckpointError, InvalidInputError, KlfastError

REMEDY = "fetch or (convert|save) it again"


@pytest.fixture
def path(tmp_path):
    """Write a good file."""
    return gguf_files.write(tmp_path / "m.gguf", "llama", gguf_files.tiny("llama"), {"*": "Q8_0"})


def refused(path, match, load=klfast.load_model, kind=CheckpointError, **options):
    with pytest.raises(kind, match=match) as caught:
        load(path, **options)
    assert "\n" not in str(caught.value) and path.name in str(caught.value)


def changed(path, family="llama", **options):
    return gguf_files.write(path, family, gguf_files.tiny(family), **options)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"\x80\x04K\x01.", b"GGUF" + struct.pack("<IQQ", 9, 1, 1)])
def test_other_files(tmp_path, content):
    (tmp_path / "m.GGUF").write_bytes(content)
    for load in (klfast.load_model, klfast.load_tokenizer):
        refused(tmp_path / "m.GGUF", f"cannot load the .*; {REMEDY}", load)


@pytest.mark.parametrize("kept", [0.001, 0.01, 0.03, 0.3, 0.999])
def test_truncated_files(path, kept):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    refused(path, f"cannot load the model of .*; {REMEDY}")


@pytest.mark.parametrize("key", [b"tokenizer.ggml.token_type", b"tokenizer.ggml.tokens"])
def test_arrays_without_end(path, key):
    """The length of an array must not decide how long the reader takes."""
    data = bytearray(path.read_bytes())
    place = data.index(key) + len(key) + 8
    data[place : place + 8] = struct.pack("<Q", 2**61)
    path.write_bytes(data)
    refused(path, f"cannot load the model of .*; {REMEDY}")


@pytest.mark.parametrize("layers", [100_000, 2**32 - 1])
def test_models_without_end(tmp_path, layers):
    path = changed(tmp_path / "m.gguf", metadata={"llama.block_count": layers})
    refused(path, f"describes a far larger model than the 21 tensors stored; {REMEDY}")


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        (
            {"general.architecture": "unheard-of"},
            r"finds no model in .*, architecture 'unheard-of' \(.*\); load the original",
        ),
        ({"general.architecture": "bert"}, r"finds no model in .*, architecture 'bert' \(.*\); load the original"),
        ({"llama.block_count": None}, rf"lacks the tensor model\.layers\.2\..*; {REMEDY}"),
        ({"llama.embedding_length": 512}, rf"must have shape .*; {REMEDY}"),
        ({"llama.block_count": 3}, rf"lacks the tensor model\.layers\.2\..*; {REMEDY}"),
        (
            {"llama.attention.head_count": 0},
            r"finds no model in its metadata, architecture 'llama' .*; load the original",
        ),
        ({"split.count": 3}, r"is one of 3 parts; merge them \(llama-gguf-split --merge\)"),
    ],
)
def test_unfit_metadata(tmp_path, metadata, match):
    refused(changed(tmp_path / "m.gguf", metadata=metadata), match)


def test_a_type_that_gguf_cannot_read(tmp_path):
    path = changed(tmp_path / "m.gguf", extra=np.ones(4))
    refused(path, r"stores extra as F64, which the package gguf cannot read; fetch the model in another type")


def test_without_a_tokenizer(tmp_path):
    path = changed(tmp_path / "m.gguf", metadata={"tokenizer.ggml.tokens": None})
    refused(path, r"m\.gguf has no tokenizer; copy", klfast.load_tokenizer)


def test_without_the_package(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(path, r"needs the package gguf, .*: pip install 'klfast\[gguf\]'", kind=InvalidInputError)


@pytest.mark.parametrize("gguf", ["int5", "", "Exact", None, 4])
def test_arguments(path, gguf):
    with pytest.raises(KlfastError, match=r'^gguf must be "exact", "dense" or a spec such as "int8-g32-asym", got '):
        klfast.load_model(path, gguf=gguf)
