"""klfast bench openvino: folders of ``klfast export --format openvino`` on OpenVINO's devices."""

from __future__ import annotations

import csv
import dataclasses
import io
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

import klfast
from klfast.cli.console import emit, say
from klfast.core.io import write_atomic

if TYPE_CHECKING:
    from klfast.benchkit.openvino_devices import Timed


def bench_openvino(
    folders: Sequence[str], devices: str, prompt: int, tokens: int, threads: int | None, out: Path, as_json: bool
) -> None:
    """Time each folder on each device; print a table in Markdown, and write it and a CSV to ``out``."""
    if not folders:
        raise typer.BadParameter("name folders: klfast bench openvino FOLDER [FOLDER ...] --devices CPU,GPU,NPU")
    from klfast.export.openvino.write import require_package

    require_package()
    from klfast.benchkit.openvino_devices import require_devices, require_folder, timed

    names = devices.upper().split(",")
    require_devices(names)
    for folder in folders:
        require_folder(Path(folder))
    rows: list[Timed] = []
    for folder in folders:
        say(f"{folder} on {', '.join(names)} ...", as_json=True)
        rows += timed(Path(folder), names, prompt, tokens, threads)
    import openvino

    from klfast.core.machine import cpu_name

    versions = f"klfast {klfast.__version__}, OpenVINO {openvino.__version__.split('-')[0]}, {platform.system()}"
    text = _markdown(rows, prompt, tokens, f"{cpu_name()}; {versions}")
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "openvino.md", f"# openvino\n\n{text}")
    write_atomic(out / "openvino.csv", _csv(rows))
    emit({"out": str(out), "rows": [dataclasses.asdict(row) for row in rows]}, text.rstrip("\n"), as_json)


def _markdown(rows: Sequence[Timed], prompt: int, tokens: int, machine: str) -> str:
    lines = [
        f"{machine}. A prompt of {prompt} tokens, then {tokens} greedy ones; OpenVINO's own settings for latency.",
        "",
        f"| model | device | MB | load, s | first token, ms | ms a token | tokens/s | same tokens of {tokens} |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        figures = [f"{row.load_seconds:.1f}", f"{1e3 * row.first_seconds:.1f}", f"{1e3 * row.token_seconds:.2f}"]
        figures += [f"{1 / row.token_seconds:.1f}" if row.token_seconds else "", str(row.same_tokens)]
        shown = ["", "", "", "", ""] if row.error else figures
        lines.append(f"| {row.folder} | {row.device} | {row.megabytes:.1f} | {' | '.join(shown)} |")
    lines += [f"\n{row.folder} does not run on {row.device}: {row.error}" for row in rows if row.error]
    return "\n".join(lines) + "\n"


def _csv(rows: Sequence[Timed]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(rows[0])], lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(row) for row in rows)
    return text.getvalue()
