"""klfast quantize: what it refuses before the work, and models without a tokenizer."""

import errno
import os

import pytest
import tiny_folder
from typer.testing import CliRunner

import klfast
from klfast.checkpoint import by_name
from klfast.cli import app


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_folder.save_model(tmp_path_factory.mktemp("model"))


def quantize(model, *arguments):
    return CliRunner().invoke(app, ["quantize", str(model), "--uniform", "int4-g32-sym", *map(str, arguments)])


def test_a_model_without_a_tokenizer(model, tmp_path):
    bare = tiny_folder.save_model(tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    result = quantize(bare, "--out", tmp_path / "small")
    assert result.exit_code == 0, result.output
    assert f"{bare} holds no tokenizer, so {tmp_path / 'small'} gets none." in " ".join(result.output.split())
    assert not list((tmp_path / "small").glob("tokenizer*")) and klfast.load_quantized(tmp_path / "small") is not None
    with_json = quantize(bare, "--out", tmp_path / "again", "--json")
    assert with_json.exit_code == 0 and with_json.stdout.lstrip().startswith("{")


def test_a_damaged_tokenizer_is_still_an_error(tmp_path):
    folder = tiny_folder.save_model(tmp_path / "model")
    (folder / "tokenizer.json").write_text("{")
    result = quantize(folder, "--out", tmp_path / "small")
    assert (
        result.exit_code == 1
        and "tokenizer.json is no valid JSON" in result.stderr
        and not (tmp_path / "small").exists()
    )


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_target_that_cannot_be_is_refused_before_the_model_is_loaded(model, tmp_path, monkeypatch, force):
    monkeypatch.setattr(by_name, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setattr(by_name, "find_tokenizer", lambda *_, **__: pytest.fail("the tokenizer was loaded"))
    (tmp_path / "file").write_text("x")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("x")
    real = os.open

    def read_only(path, flags, *rest, **options):
        if flags & os.O_CREAT and str(path).startswith(str(tmp_path / "locked")):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path, flags, *rest, **options)

    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(os, "open", read_only)
    for out, message in (
        (tmp_path / "file", "is a file; name a folder with --out" if force else "exists"),
        (tmp_path / "home", "did not write" if force else "exists"),
        (tmp_path / "locked" / "small", f"Permission denied: '{tmp_path / 'locked' / 'small'}'"),
        (tmp_path / "absent" / "small", "does not exist"),
    ):
        result = quantize(model, "--out", out, *force)
        assert result.exit_code == 1 and message in result.stderr and len(result.stderr.splitlines()) == 1, (
            out,
            result.stderr,
        )
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "home", "letter", "locked"]


def test_other_commands_look_at_their_files_first(tmp_path):
    (tmp_path / "folder").mkdir()
    for command in (["sweep", "m"], ["plan", "s.json", "--mean-bits", "5"]):
        result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "folder"), "--force"])
        assert (
            result.exit_code == 1 and f"{tmp_path / 'folder'} is a folder; name a file with --out" in result.stderr
        ), result.stderr
