"""klfast demo, report, doctor."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from klfast.cli import options
from klfast.cli.console import command, emit, say, table


@options.loads_models
def demo(
    model: Annotated[
        str, typer.Option(help="A local folder, a hub id, or a bundled model: hymba, mamba, mamba2.")
    ] = "hymba",
    quick: Annotated[
        bool, typer.Option("--quick", help="Less text: some seconds instead of about two minutes.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Save the mixed model here instead of in a temporary folder.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="Write the table as demo.md and demo.csv into this folder.")
    ] = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
    *,
    loading: dict[str, bool],
) -> None:
    """Run the whole pipeline on a small bundled model, offline: sweep, plan, quantize, compare, save, load, generate."""
    if out is not None:
        options.require_free(out, force=False, folder=True)
    if results is not None:
        for name in ("demo.md", "demo.csv"):
            options.require_free(results / name, force=True, option="--results")
    from klfast import demo as pipeline
    from klfast.cli.runtime import prepare

    prepare(threads)
    found = pipeline.run(
        model,
        effort=pipeline.QUICK if quick else pipeline.FULL,
        out=out,
        say=lambda sentence: say(sentence, as_json),
        **loading,
    )
    if results is not None:
        pipeline.write_results(found, results)
    emit(
        found.as_dict(),
        [
            *(one.rich() for one in found.sensitivities),
            "\n".join(found.findings),
            table(pipeline.HEADINGS, map(pipeline.cells, found.rows)),
        ],
        as_json,
    )
    say(f"The mixed model goes on from {found.prompt!r}:\n{found.prompt}{found.continuation}\n", as_json)
    say("For a model of your own (a folder, or a hub id):", as_json)
    for line in (
        "klfast sweep MODEL --out sensitivities.json",
        "klfast plan sensitivities.json --max-bytes SIZE --out plan.json",
        "klfast quantize MODEL plan.json --out FOLDER",
        "klfast eval FOLDER --teacher MODEL",
        command("klfast", "generate", found.saved, pipeline.PROMPT),
    ):
        say(f"  {line}", as_json)


def report(
    sensitivities: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", help="What sweep wrote, or published kl-ssm-quant files; several are merged."
        ),
    ],
    plan: Annotated[
        Path | None, typer.Option(help="Report this plan instead, which klfast plan wrote from these files.")
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            parser=options.metric_name, metavar="NAME", help="Rank layers by it, such as kl_teacher_student or sqnr_db."
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
    """Show what a sweep found (which layers, kinds and depths are sensitive), or what a plan does."""
    for path, option in ((out, "--out"), (plot, "--plot")):
        if path is not None:
            options.require_free(path, force, option=option)
    import klfast
    from klfast.core.errors import InvalidInputError
    from klfast.reporting import tables as reports
    from klfast.sensitivity import merge

    found = merge.read(sensitivities)
    if plan is None:
        tables = reports.sweep_tables(found, metric, top)
    else:
        made = klfast.Plan.from_json(plan)
        tables = [*reports.plan_tables(made, found), reports.plan_by_layer(made, found, metric)]
    if out is not None:
        reports.write(out, tables)
    if plot is not None:
        try:
            reports.plot(found, plot, metric)
        except ImportError as error:  # matplotlib is optional
            raise InvalidInputError(str(error)) from None
    if out is None or as_json:
        emit({"tables": [one.data() for one in tables]}, [one.rich() for one in tables], as_json)


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
