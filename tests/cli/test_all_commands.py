"""What all commands do: unwritable output, closed streams, errors, help, completion, printed commands."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import fails, klf, silent
from tokenizer_kinds import tokenizer
from writing_model import writing_model

import klfast
from klfast.checkpoint import by_name
from klfast.cli.console import command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Create a folder with a model that writes letters."""
    made, words = tmp_path_factory.mktemp("model"), tokenizer("byte-level BPE")
    writing_model(words).save_pretrained(made)
    words.save_pretrained(made)
    return made


def process(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "klfast", *map(str, arguments)], timeout=120, stdin=subprocess.DEVNULL, **options
    )


def environment(**more):
    return {**os.environ, **more}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize(
    "arguments", [("--help",), ("--version",), ("generate", "{}", "Once", "--max-new-tokens", "2"), ("bench", "--help")]
)
def test_output_that_cannot_be_written(folder, arguments):
    arguments = [a.format(folder) for a in arguments]
    with open("/dev/full", "w") as full:
        done = process(*arguments, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr.startswith("klfast: ") and done.stderr.count("\n") == 1, done.stderr
    assert "No space left" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("--help",), ("generate", "{}", "Once", "--max-new-tokens", "40")])
def test_reader_that_closes_the_pipe(folder, arguments):
    arguments = [a.format(folder) for a in arguments]
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        done = process(*arguments, stdout=pipe, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("closed", "arguments", "code"),
    [
        (">&-", "--help", 0),
        ("2>&-", "--help", 0),
        (">&-", "generate {plain} Once --max-new-tokens 2", 0),
        (">&- 2>&-", "plan x", 2),
    ],
)
def test_closed_streams(folder, closed, arguments, code):
    command = f"{sys.executable} -m klfast {arguments.format(plain=folder)} {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.returncode == code and silent(done.stderr)
    assert bool(done.stdout) == (closed == "2>&-")


@pytest.mark.slow
def test_characters_that_the_encoding_lacks(folder):
    ascii_only = environment(PYTHONIOENCODING="ascii")
    command = ("generate", folder, "Ü 🦜", "--max-new-tokens", "2")
    done = process(*command, capture_output=True, env=ascii_only)
    assert done.returncode == 0 and silent(done.stderr.decode()) and done.stdout.startswith(rb"\xdc \U0001f99c")
    assert process("--help", capture_output=True, env=ascii_only).returncode == 0
    lost = process("eval", folder, "--text", b"no\xff".decode(errors="surrogateescape"), capture_output=True)
    assert lost.returncode == 1 and lost.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory; use a smaller model"),
        (MemoryError("1 TB"), "out of memory; use a smaller model"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory; use a smaller"),
        (torch.OutOfMemoryError("GPU"), "out of memory; use a smaller model"),
        (OSError("a disk\nfailed"), "klfast: a disk failed"),
    ],
    ids=["bare", "MemoryError", "torch", "GPU", "OSError"],
)
def test_system_errors_are_one_line(folder, monkeypatch, error, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(by_name, "load_model", fail)
    assert message in fails("generate", folder, "Once")


UNEXPECTED = """
import sys
from klfast import cli
from klfast.checkpoint import by_name
def broken(*_, **__):
    raise ZeroDivisionError("of all things")
by_name.load_model = broken
sys.argv = ["klfast", "generate", sys.argv[1], "Once"]
cli.main()
"""


@pytest.mark.slow
def test_unexpected_errors_ask_for_a_report(folder):
    command = [sys.executable, "-c", UNEXPECTED, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and lines[0].startswith("Traceback") and lines[-2].endswith("of all things")
    assert lines[-1].startswith("klfast: ") and "report" in lines[-1] and "klfast doctor" in lines[-1]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "demo",
        "sweep",
        "plan",
        "pareto",
        "quantize",
        "eval",
        "compare",
        "generate",
        "bench",
        "report",
        "study",
        "doctor",
    ],
)
def test_help_shows_flags_without_a_value(name):
    shown = klf(*([name] if name else []), "--help").stdout
    assert "<bool>" not in shown and "BOOL" not in shown.upper().replace("BOOLEAN VALUE", ""), shown
    assert "--help" in shown


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_of_shells(monkeypatch, shell):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    assert "_KLFAST_COMPLETE" in process("--show-completion", shell, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("words", "found"), [("klfast ge", "generate"), ("klfast generate --num-r", "--num-return-sequences")]
)
def test_completion_of_words(words, found):
    asked = environment(_KLFAST_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(len(words.split()) - 1))
    done = subprocess.run(
        [sys.executable, "-c", "from klfast.cli import main; main()"], capture_output=True, text=True, env=asked
    )
    assert done.stdout.split() == [found]


OPTIONS = """
def pytest_addoption(parser):
    for name in ("--out", "--device"):
        parser.addoption(name)
    parser.addoption("--quick", action="store_true")
"""


SCAN = """
import pathlib

import klfast

def test_it(request):
    print(klfast.__version__)
    table = pathlib.Path(request.config.getoption("--out")) / "scan.csv"
    table.parent.mkdir(exist_ok=True)
    table.write_text("run\\nthis one\\n")
"""


BENCH = """
import sys
sys.path[:] = [p for p in sys.path if p]
sys.path.append(sys.argv.pop(1))
from pathlib import Path
from klfast.cli import bench, main
suite = Path(sys.argv.pop(1))
bench.folder = lambda: suite
main()
"""


@pytest.fixture
def suite(tmp_path):
    """Create a bench suite of two tests; the first writes its table, the second none."""
    made = tmp_path / "suite"
    made.mkdir()
    (made / "conftest.py").write_text(OPTIONS)
    (made / "test_scan.py").write_text(SCAN)
    (made / "test_decode.py").write_text("def test_it():\n    pass\n")
    return made


def bench(suite, *arguments, **more):
    """Run klfast bench on a suite, in another process."""
    own = str(Path(klfast.__file__).parents[1])
    kept = {name: value for name, value in environment(**more).items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", BENCH, own, str(suite), "bench", "--quick", *map(str, arguments)],
        cwd=suite.parent,
        capture_output=True,
        text=True,
        timeout=120,
        env=kept,
    )


def test_bench_ignores_modules_of_the_current_folder(suite):
    for name in ("pytest", "csv", "klfast", "conftest", "torch"):
        (suite.parent / f"{name}.py").write_text("print('from the current folder'); raise SystemExit(0)")
    done = bench(suite, "scan")
    output = done.stdout + done.stderr
    assert done.returncode == 0 and "1 passed" in output, output
    assert "from the current folder" not in output and "Warning" not in output, output


def test_bench_ignores_settings_of_pytest(suite):
    for folder in (suite, suite.parent):
        (folder / "pyproject.toml").write_text('[tool.pytest.ini_options]\naddopts = "--no-such-option"\n')
    done = bench(suite, "scan", PYTEST_ADDOPTS="--none-such", PYTEST_PLUGINS="no_such_plugin")
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


def test_bench_shows_the_tables_of_this_run(suite, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("scan", "decode"):
        (out / f"{name}.csv").write_text("run\nan earlier one\n")
    done = bench(suite, "scan", "decode", "--json", "--out", out)
    assert done.returncode == 0 and json.loads(done.stdout)["rows"] == [{"run": "this one"}], done.stderr
    (out / "decode.csv").unlink()
    done = bench(suite, "scan", "decode", "--json", "--out", out)
    assert done.returncode == 0 and json.loads(done.stdout)["rows"] == [{"run": "this one"}], done.stderr


def test_bench_interrupted_before_its_first_test(suite):
    (suite / "conftest.py").write_text("raise KeyboardInterrupt\n")
    done = bench(suite, "scan")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_printed_commands_are_quoted():
    words = ["klfast", "eval", "my models/it's $HOME", "--teacher", "a;b"]
    assert shlex.split(command(*words)) == words
    assert command("klfast", "plan", "s.json", "--max-bytes", "SIZE") == "klfast plan s.json --max-bytes SIZE"
