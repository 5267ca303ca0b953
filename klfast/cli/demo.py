"""klfast demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from klfast.cli import options
from klfast.cli.console import command, emit, say, table
from klfast.core.loading_options import LoadingOptions


@options.loads_models
def demo(
    model: Annotated[
        str, typer.Option(help="A local folder, a hub id, or a bundled model: hymba, mamba, mamba2.")
    ] = "hymba",
    quick: Annotated[bool, typer.Option("--quick", help="Less text: a minute or two instead of several.")] = False,
    out: Annotated[Path | None, typer.Option(help="Save the mixed model here, not in a temporary folder.")] = None,
    results: Annotated[
        Path | None, typer.Option(help="Write the table as demo.md and demo.csv into this folder.")
    ] = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
    *,
    loading: LoadingOptions,
) -> None:
    """Run the pipeline on a small bundled model, offline: sweep, plan, quantize, compare, save, load, generate."""
    if out is not None:
        options.require_free(out, force=None, folder=True)
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
    say(f"The mixed model continues {found.prompt!r}:\n{found.prompt}{found.continuation}\n", as_json)
    say("For your own model (a folder, or a hub id):", as_json)
    for line in (
        "klfast sweep MODEL --out sensitivities.json",
        "klfast plan sensitivities.json --max-bytes SIZE --out plan.json",
        "klfast quantize MODEL plan.json --out FOLDER",
        "klfast eval FOLDER --teacher MODEL",
        command("klfast", "generate", found.saved, pipeline.PROMPT),
    ):
        say(f"  {line}", as_json)
