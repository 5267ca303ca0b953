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
            help="Check every kernel on cpu, cuda or xpu instead, then time some; compiling may take minutes.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="With --device: write all of it into this text file, too.", dir_okay=False)
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="With --device: time for the bench, 60 by default; 0 leaves it out.", min=0.0)
    ] = None,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Show what this machine can run and why not the rest, and check every op against its reference."""
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
        from klfast.diagnostics import device_report as of_device

        found = of_device.run(device, 60.0 if seconds is None else seconds, out, lambda line: say(line, as_json))
        if as_json:
            emit(found.as_dict(), "", as_json)
        failed = bool(found.failed)
    if failed:
        print("klfast: a check failed; the report names it", file=sys.stderr)
        raise typer.Exit(1)
