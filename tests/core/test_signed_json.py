"""JSON with a digest: every flipped bit is either detected or harmless."""

import hashlib
import json

import pytest

from klfast.core import signed_json
from klfast.core.errors import CheckpointError

DATA = {"schema": "x/1", "specs": {"b": "int4", "a": "int8"}, "values": [0.1, 1e-300, -0.0, 7, None, True, "Straße"]}


def read(source):
    return signed_json.read(source, "a plan", "make a new one")


def test_round_trip(tmp_path):
    path = tmp_path / "x.json"
    text = signed_json.write(DATA, path)
    assert path.read_text() == text
    for source in (path, str(path), text):
        data, origin = read(source)
        assert list(data) == [*DATA, "sha256"] and {**data, "sha256": None} == {**DATA, "sha256": None}
        assert origin == ("the JSON text" if source is text else str(path))
    canonical = json.dumps(DATA, sort_keys=True, separators=(",", ":"))
    assert json.loads(text)["sha256"] == hashlib.sha256(canonical.encode()).hexdigest()
    assert signed_json.write(json.loads(text)) == text  # writing again does not sign twice


def test_every_flipped_bit_is_detected_or_harmless(tmp_path):
    whole = signed_json.write(DATA).encode()
    path = tmp_path / "x.json"
    errors = []
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            data, _ = read(path)
        except CheckpointError as error:
            errors.append(str(error))
        else:
            assert {name: data[name] for name in DATA} == DATA
    assert all(e.startswith((str(path), "cannot read a plan from")) and "\n" not in e for e in errors)
    assert len(errors) > 4 * len(whole)


def test_layout_does_not_matter_and_old_files_have_no_digest(tmp_path):
    data = json.loads(signed_json.write(DATA))
    assert read(json.dumps(dict(reversed(data.items())), indent=4))[0] == data
    assert read(json.dumps(DATA))[0] == DATA
    path = tmp_path / "bom.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(DATA).encode())
    assert read(path)[0] == DATA
    assert read("[1]")[0] == [1]


def test_edited_file_is_refused_with_a_remedy():
    data = json.loads(signed_json.write(DATA))
    data["specs"]["b"] = "int8"
    with pytest.raises(
        CheckpointError,
        match=r'the JSON text is damaged .* "sha256"\); make a new one, or remove that entry if you edited the file',
    ):
        read(json.dumps(data))
    del data["sha256"]
    assert read(json.dumps(data))[0]["specs"]["b"] == "int8"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b"[" * 100_000, b'{"sha256": ' + b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_invalid_json(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.json"):
        read(path)


@pytest.mark.parametrize("name", ["none.json", "nul\0.json", "long" * 2000, "."], ids=["none", "nul", "long", "folder"])
def test_unreadable_path(tmp_path, name):
    with pytest.raises(CheckpointError, match="cannot read a plan from"):
        read(f"{tmp_path}/{name}")
