"""klfast doctor."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from klfast.cli import options
from klfast.cli.console import emit, say


def doctor(
    device: Annotated[
        str | None,
        typer.Option(
            parser=options.device_name,
            metavar="NAME",
            help="Instead check every kernel on cpu, cuda or xpu, then time some; compiling may take minutes.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="With --device: also write the report to this text file.", dir_okay=False)
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="With --device: time for the bench, 60 by default; 0 skips it.", min=0.0)
    ] = None,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Show what this machine can run and why not the rest, and check every op against the reference."""
    if device is None:
        if out is not None or seconds is not None or force:
            raise typer.BadParameter("--out, --seconds and --force go with --device")
        import klfast

        found = klfast.doctor()
        emit(found.as_dict(), str(found), as_json)
        failed = not found.passed
    else:
        if out is not None:
            options.require_free(out, force)
        from klfast.diagnostics import device_report

        report = device_report.run(device, 60.0 if seconds is None else seconds, out, lambda line: say(line, as_json))
        if as_json:
            emit(report.as_dict(), "", as_json)
        failed = bool(report.failed)
    if failed:
        print("klfast: a check failed; see the report", file=sys.stderr)
        raise typer.Exit(1)
