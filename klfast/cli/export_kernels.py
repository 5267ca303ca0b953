"""klfast export-kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from klfast.cli import options
from klfast.cli.console import emit


def export_kernels(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to create.", show_default=False)],
    as_json: options.Json = False,
) -> None:
    """Write the Triton kernels of recurrent layers as a repository that the package kernels loads without klfast."""
    from klfast.integrations import hub_repository

    hub_repository.write(folder)
    variants = [str(folder / "build" / f"torch-{backend}") for backend in hub_repository.BACKENDS]
    emit({"out": str(folder), "variants": variants}, f"{hub_repository.NAME} is in {folder}.", as_json)
