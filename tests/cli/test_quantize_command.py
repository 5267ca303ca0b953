"""klfast quantize: refusals before the work, and models without a tokenizer."""

import errno
import os

import pytest
import tiny_folder
from typer.testing import CliRunner

import klfast
from klfast.checkpoint import by_name
from klfast.cli import app
from klfast.models.linears import linears
from klfast.rounding.rounded import Kept


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_folder.save_model(tmp_path_factory.mktemp("model"))


def quantize(model, *arguments):
    return CliRunner().invoke(app, ["quantize", str(model), "--uniform", "int4-g32-sym", *map(str, arguments)])


def test_model_without_a_tokenizer(model, tmp_path):
    bare = tiny_folder.save_model(tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    result = quantize(bare, "--out", tmp_path / "small")
    assert result.exit_code == 0, result.output
    assert f"{bare} holds no tokenizer, so {tmp_path / 'small'} gets none." in " ".join(result.output.split())
    assert not list((tmp_path / "small").glob("tokenizer*")) and klfast.load_quantized(tmp_path / "small") is not None
    with_json = quantize(bare, "--out", tmp_path / "again", "--json")
    assert with_json.exit_code == 0 and with_json.stdout.lstrip().startswith("{")


def test_damaged_tokenizer_is_an_error(tmp_path):
    folder = tiny_folder.save_model(tmp_path / "model")
    (folder / "tokenizer.json").write_text("{")
    result = quantize(folder, "--out", tmp_path / "small")
    assert result.exit_code == 1 and "tokenizer.json is not valid JSON" in result.stderr
    assert not (tmp_path / "small").exists()


@pytest.fixture
def untouched(tmp_path, monkeypatch):
    """Create a file, a foreign folder and a folder that cannot be written; fail if anything is loaded or changed."""
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
    yield tmp_path
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "home", "letter", "locked"]


@pytest.mark.parametrize(
    ("out", "force", "message"),
    [
        ("file", False, "exists"),
        ("file", True, "is a file; name a folder with --out"),
        ("home", False, "exists"),
        ("home", True, "did not write"),
        *(("locked/small", force, "Permission denied: '{out}'") for force in (False, True)),
        *(("absent/small", force, "does not exist") for force in (False, True)),
    ],
)
def test_impossible_targets_are_refused_before_the_model_is_loaded(model, untouched, out, force, message):
    result = quantize(model, "--out", untouched / out, *["--force"] * force)
    assert result.exit_code == 1 and message.format(out=untouched / out) in result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr


@pytest.mark.parametrize("command", [["sweep", "m"], ["plan", "s.json", "--mean-bits", "5"]], ids=["sweep", "plan"])
def test_other_commands_check_their_files_first(tmp_path, command):
    (tmp_path / "folder").mkdir()
    result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "folder"), "--force"])
    assert result.exit_code == 1
    assert f"{tmp_path / 'folder'} is a folder; name a file with --out" in result.stderr


def test_gptq_writes_a_model_that_is_nearer(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The sea was calm, and the old man slept. " * 60)
    small, plain = tmp_path / "small", tmp_path / "plain"
    options = ("--rounding", "gptq", "--calibration", text, "--length", 32, "--windows", 40)
    for out, chosen in ((small, options), (plain, ())):
        result = quantize(model, "--out", out, *chosen)
        assert result.exit_code == 0, result.output
    teacher, ids = (
        klfast.load_model(str(model)),
        klfast.token_batches(text, by_name.load_tokenizer(str(model)), vocab_size=257),
    )
    found = {out: klfast.load_quantized(out) for out in (small, plain)}
    assert {layer.rounding for layer in linears(found[small]).values()} == {"gptq"}
    kl = {out: klfast.evaluate(one, ids, teacher=teacher).kl for out, one in found.items()}
    assert kl[small] < 0.7 * kl[plain]
    sizes = {out: (out / "model.safetensors").stat().st_size for out in found}
    assert sizes[small] == sizes[plain]


def test_gptq_replaces_the_current_folder(model, tmp_path, monkeypatch):
    (tmp_path / "small").mkdir()
    monkeypatch.chdir(tmp_path / "small")
    result = quantize(model, "--out", ".", "--force", "--rounding", "gptq", "--length", 16, "--windows", 4)
    assert result.exit_code == 0, result.output
    assert klfast.load_quantized(tmp_path / "small") is not None and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (("--calibration", "calibration"), "--calibration"),
        (("--windows", "64"), "--windows"),
        (("--length", "512"), "--length"),
        (("--resume",), "--resume/--no-resume"),
        (("--no-resume",), "--resume/--no-resume"),
    ],
)
def test_options_of_gptq_are_refused_without_it(model, untouched, given, named):
    result = quantize(model, "--out", untouched / "small", *given)
    assert result.exit_code == 2 and f"{named} goes with --rounding gptq" in " ".join(result.stderr.split())


def test_an_unknown_rounding_is_wrong_usage(model, tmp_path):
    result = quantize(model, "--out", tmp_path / "small", "--rounding", "up")
    assert result.exit_code == 2 and "nearest, gptq" in result.stderr


def test_ctrl_c_while_gptq_rounds_says_how_to_continue(model, tmp_path, monkeypatch):
    write = Kept.write

    def interrupted(*args):
        write(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(Kept, "write", interrupted)
    command = ("--out", tmp_path / "small", "--rounding", "gptq", "--length", 16, "--windows", 4)
    for flag, again in (([], "the same command"), (["--no-resume"], "the same command without --no-resume")):
        stopped = quantize(model, *command, *flag)
        kept = f"{tmp_path / 'small.partial'} keeps what is done, and {again} continues from there"
        assert (stopped.exit_code, stopped.stderr) == (130, f"klfast: stopped; {kept}.\n")
    monkeypatch.undo()
    assert quantize(model, *command).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
