"""klfast report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from klfast.cli import options
from klfast.cli.console import emit, say


def report(
    context: typer.Context,
    sensitivities: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE|FOLDER...",
            help="Files from sweep, or published kl-ssm-quant files, or folders of them; several are merged.",
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
    page: Annotated[
        Path | None,
        typer.Option(
            "--html",
            help="Write one page to this .html file: maps by depth and submodule, ranking, size against KL, cost of "
            "the sweep; and plans (klfast plan), KL cards (klfast compare) and fronts (klfast pareto) among the files.",
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw sensitivity over depth into this .png, .svg or .pdf file.")
    ] = None,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Show a sweep's findings (which layers, kinds and depths are sensitive), or a plan."""
    for path, option in ((out, "--out"), (page, "--html"), (plot, "--plot")):
        if path is not None:
            options.require_free(path, force, option=option)
    if plan is not None and page is None:
        options.goes_with(context, "a sweep's report or --html, not with --plan alone", "top")
    import klfast
    from klfast.cli.runtime import require_plot
    from klfast.core.io import require_suffix, write_atomic
    from klfast.reporting.page.document import html_page
    from klfast.reporting.plan_tables import plan_by_layer, plan_tables
    from klfast.reporting.plot import plot as draw
    from klfast.reporting.results_folder import ResultFiles
    from klfast.reporting.sweep_tables import sweep_tables
    from klfast.reporting.table import REPORT_SUFFIXES, write
    from klfast.sensitivity import merge

    if out is not None:
        require_suffix(out, "a report", REPORT_SUFFIXES)
    if plot is not None:
        require_plot(plot)
    files = ResultFiles.of(sensitivities)
    found = merge.read(files.sensitivities)
    if plan is None:
        tables = sweep_tables(found, metric, top)
    else:
        made = klfast.Plan.from_json(plan)
        tables = [*plan_tables(made, found), plan_by_layer(made, found, metric)]
    if page is not None:
        plans = [klfast.Plan.from_json(path) for path in dict.fromkeys([*files.plans, *([plan] if plan else [])])]
        cards = [klfast.Comparison.from_json(path) for path in files.comparisons]
        fronts = [klfast.Front.from_json(path) for path in files.fronts]
        write_atomic(page, html_page(found, plans, cards, fronts, metric, top))
    if out is not None:
        write(out, tables)
    if plot is not None:
        draw(found, plot, metric)
    if written := [str(path) for path in (out, page, plot) if path is not None]:
        say(f"Written: {', '.join(written)}", as_json)
    if (out is None and page is None) or as_json:
        emit({"tables": [one.data() for one in tables]}, [one.rich() for one in tables], as_json)
