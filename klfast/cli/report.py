"""klfast report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from klfast.cli import options
from klfast.cli.console import emit


def report(
    sensitivities: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", help="Files from sweep, or published kl-ssm-quant files; several are merged."
        ),
    ],
    plan: Annotated[
        Path | None, typer.Option(help="Report this plan instead, made by klfast plan from these files.")
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            parser=options.metric_name, metavar="NAME", help="Rank layers by kl_teacher_student, sqnr_db or another."
        ),
    ] = None,
    top: Annotated[int, typer.Option(help="Layers to list for each spec.", min=1)] = 10,
    out: Annotated[Path | None, typer.Option(help="Write the tables to this .md or .json file instead.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw sensitivity over depth into this .png, .svg or .pdf file.")
    ] = None,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Show a sweep's findings (which layers, kinds and depths are sensitive), or a plan."""
    for path, option in ((out, "--out"), (plot, "--plot")):
        if path is not None:
            options.require_free(path, force, option=option)
    import klfast
    from klfast.core.errors import InvalidInputError
    from klfast.reporting.plan_tables import plan_by_layer, plan_tables
    from klfast.reporting.plot import plot as draw
    from klfast.reporting.sweep_tables import sweep_tables
    from klfast.reporting.table import write
    from klfast.sensitivity import merge

    found = merge.read(sensitivities)
    if plan is None:
        tables = sweep_tables(found, metric, top)
    else:
        made = klfast.Plan.from_json(plan)
        tables = [*plan_tables(made, found), plan_by_layer(made, found, metric)]
    if out is not None:
        write(out, tables)
    if plot is not None:
        try:
            draw(found, plot, metric)
        except ImportError as error:  # matplotlib is optional
            raise InvalidInputError(str(error)) from None
    if out is None or as_json:
        emit({"tables": [one.data() for one in tables]}, [one.rich() for one in tables], as_json)
