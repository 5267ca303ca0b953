"""klfast bench: the suite of bench/, run by pytest in another process."""

from __future__ import annotations

import csv
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import klfast
from klfast.benchkit.suites import SUITES
from klfast.cli import options
from klfast.cli.bench_openvino import bench_openvino
from klfast.cli.console import emit
from klfast.core.errors import KlfastError

# "python -m pytest" would import a pytest.py of the current folder. Without that folder, klfast's must be on the path.
_PYTEST = """
import signal
import sys
try:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let programs in the background ignore it
    own = sys.argv.pop(1)
    sys.path[:] = [p for p in sys.path if p]
    own in sys.path or sys.path.insert(0, own)
    import pytest
    code = pytest.main()
except KeyboardInterrupt:  # before the first test; later pytest says so itself
    code = 130
sys.exit(code)
"""
_OF_OPENVINO = ("devices", "prompt_tokens", "new_tokens")
_OF_SUITES = (
    *("quick", "compare", "device", "isa", "torch_isa", "working_set", "seconds", "shapes", "rows", "models"),
    *("llama_cpp", "gguf"),
)
_OF_ONE_SUITE = {
    "shapes": ("linear",),
    "rows": ("linear",),
    "models": ("decode", "families", "serve"),
    "llama_cpp": ("decode", "families"),
    "gguf": ("decode", "families"),
}
_device = options.one_of("auto", "cpu", "cuda", "xpu")


def _tier(text: str) -> str:
    from klfast.dispatch import pins

    if reason := pins.why_not("scalar"):
        raise KlfastError(f"--isa {text}: {reason}")
    return options.one_of(*pins.CPU_TIERS)(text)


def folder() -> Path:
    """Return the suite's folder: in the package (a wheel) or beside it (a source tree)."""
    package = Path(klfast.__file__).parent
    for found in (package / "bench", package.parent / "bench"):
        if (found / "conftest.py").is_file():
            return found
    raise KlfastError(
        f"the bench suite is missing beside {package}; install klfast's wheel or run from its source tree"
    )


def bench(
    context: typer.Context,
    suites: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SUITE",
            help=f"Some of {', '.join(SUITES)}; all by default. Or openvino, and folders of klfast export.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="One small case per suite and little memory: a quick check of about a minute."),
    ] = False,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for the tables, created if needed; tables of the same suites are replaced.", file_okay=False
        ),
    ] = Path("klfast-bench"),
    compare: Annotated[
        Path | None,
        typer.Option(
            help="Folder of an earlier run; changes are shown and written to compare.md.", exists=True, file_okay=False
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(parser=_device, metavar="NAME", help="cpu, cuda, xpu; auto uses an accelerator if there is one."),
    ] = "auto",
    isa: Annotated[
        str | None, typer.Option(parser=_tier, metavar="TIER", help="Pin klfast to a CPU tier, such as avx2.")
    ] = None,
    torch_isa: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Limit oneDNN in torch and OpenVINO, for example AVX2_VNNI (ONEDNN_MAX_CPU_ISA)."
        ),
    ] = None,
    threads: options.Threads = None,
    working_set: Annotated[
        int | None,
        typer.Option(
            parser=options.parse_bytes,
            callback=options.in_range("working-set", lambda size: size >= 1, "1 byte or more"),
            metavar="SIZE",
            help="Memory that each contender's weights rotate through: 1GB; 64MB with --quick.",
        ),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Time for the rounds of a contender: 0.5; 0.05 with --quick.", min=0.001)
    ] = None,
    shapes: Annotated[
        str | None, typer.Option(metavar="KxN,...", help="Linear layers to time instead of the usual ones.")
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(metavar="M,...", help="Rows of x to time instead of 1,4,8,16,128,512 (GPUs: also 64 and 4096)."),
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...", help="Models of decode, families and serve to time, by the beginnings of their names."
        ),
    ] = None,
    llama_cpp: Annotated[
        Path | None,
        typer.Option(help="llama.cpp's llama-bench, or its folder; a peer for decode and families.", exists=True),
    ] = None,
    gguf: Annotated[
        list[Path] | None,
        typer.Option(
            help="A model for llama-bench, named after the bench's: mamba-130m-bf16.gguf. By default random weights in "
            "Q4_0 are made for each.",
            exists=True,
        ),
    ] = None,
    devices: Annotated[
        str, typer.Option(metavar="NAME,...", help="Devices of openvino: some of CPU, GPU, NPU.")
    ] = "CPU",
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of openvino's prompt.", min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens that openvino writes.", min=2)] = 64,
    as_json: options.Json = False,
) -> None:
    """Time klfast against torch and other peers: linear layers, divergence, scans, sweep, whole models, the server.

    Every result is checked against the reference before it is timed. Weights rotate through more memory than caches
    hold, and klfast takes turns with each peer. Needs klfast's extra "bench"; OpenVINO (extra "peers") takes part if
    installed.

    klfast bench openvino FOLDER ... times folders of klfast export --format openvino on OpenVINO's devices.
    """
    if suites and suites[0] == "openvino":
        options.goes_with(context, "the other suites, not with openvino", *_OF_SUITES)
        bench_openvino(suites[1:], devices, prompt_tokens, new_tokens, threads, out, as_json)
        return
    options.goes_with(context, "openvino", *_OF_OPENVINO)
    if unknown := [name for name in suites or () if name not in SUITES]:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(SUITES)}")
    chosen = suites or SUITES
    for name, its in _OF_ONE_SUITE.items():
        if not set(its) & set(chosen):
            options.goes_with(context, f"the suite {' or '.join(its)}", name)
    _check_sizes("shapes", shapes, 2)
    _check_sizes("rows", rows, 1)
    if missing := [name for name in ("pytest", "pytest_benchmark") if importlib.util.find_spec(name) is None]:
        raise KlfastError(f"bench needs {missing[0]}; pip install 'klfast[bench]'")
    command = [
        sys.executable,
        "-c",
        _PYTEST,
        str(Path(klfast.__file__).parent.parent),
        # Neither settings nor a conftest.py of a project around it.
        *("-c", os.devnull, "--rootdir", str(folder()), "--confcutdir", str(folder())),
        *("-q", "-ra", "-p", "no:cacheprovider", "--benchmark-quiet"),
    ]
    command += [str(folder() / f"test_{suite}.py") for suite in SUITES if suite in chosen]
    command += ["--out", str(out), "--device", device]
    for name, value in {
        "--compare": compare,
        "--isa": isa,
        "--threads": threads,
        "--working-set": working_set,
        "--seconds": seconds,
        "--shapes": shapes,
        "--rows": rows,
        "--models": models,
        "--llama-cpp": llama_cpp,
    }.items():
        command += [] if value is None else [name, str(value)]
    for path in gguf or ():
        command += ["--gguf", str(path)]
    command += ["--quick"] if quick else []
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"KLFAST_STRICT": "1"} | ({} if torch_isa is None else {"ONEDNN_MAX_CPU_ISA": torch_isa})
    tables = {suite: out / f"{suite}.csv" for suite in SUITES if suite in chosen}
    earlier = {suite: _version(path) for suite, path in tables.items()}
    code = _ended(command, env=environment, stdout=2 if as_json else None)
    if code in (130, 143):
        raise typer.Exit(code)
    if code:
        raise KlfastError(f"part of the suite failed (pytest's exit code {code}); see its output above")
    if as_json:
        # A suite that has none of --models writes no table.
        written = [path for suite, path in tables.items() if _version(path) not in (None, earlier[suite])]
        emit({"out": str(out), "rows": [row for path in written for row in _rows(path)]}, "", as_json)


def _ended(command: list[str], **how: Any) -> int:
    """Run a command and return its exit code, or 143 if this process was told to end (SIGTERM), which ends both."""
    process: subprocess.Popen[bytes] | None = None
    told: list[int] = []

    def end(number: int, _frame: object) -> None:
        if process is not None:
            process.send_signal(signal.SIGKILL if told else signal.SIGINT)
        told.append(number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        process = subprocess.Popen(command, **how)
        if told:
            process.kill()
        code = process.wait()
    except BaseException:
        if process is not None:
            process.kill()
            process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return 143 if told else code


def _check_sizes(name: str, text: str | None, numbers: int) -> None:
    if text is not None and not all(
        len(part.split("x")) == numbers and all(n.isdecimal() and int(n) for n in part.split("x"))
        for part in text.split(",")
    ):
        raise typer.BadParameter(
            f"--{name} must be like {'768x3072,1536x80' if numbers == 2 else '1,16'}, got {text!r}"
        )


def _version(path: Path) -> tuple[int, int] | None:
    """Return the inode and time of a file, which tell whether a run has replaced it; None if there is no file."""
    if not path.exists():
        return None
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
