"""klfast study: how well each metric ranks layers."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from klfast.cli import options
from klfast.cli.console import emit, say
from klfast.core.io import require_suffix
from klfast.core.loading_options import LoadingOptions
from klfast.reporting.table import REPORT_SUFFIXES, write

if TYPE_CHECKING:
    from klfast.evaluation.study_results import Study

_SPECS = ["int4-channel-sym", "int4-g64-sym", "int8-channel-sym"]  # repeated from the library, as in ``options``


@options.loads_models
def study(
    source: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL|FILE...",
            help="A model, as of klfast sweep; or a file of an earlier study, or published kl-ssm-quant files.",
            show_default=False,
        ),
    ],
    spec: Annotated[list[str], typer.Option(help="A quantization to study; repeatable.")] = _SPECS,
    calibration: Annotated[
        str, typer.Option(help='The text for the metrics: a file, or "calibration", the bundled text.')
    ] = "calibration",
    text: options.HeldOut = "evaluation",
    windows: options.Windows = 32,
    length: options.Length = 256,
    layers: options.Layers = None,
    out: Annotated[Path | None, typer.Option(help="File for the study; an interrupted one goes on beside it.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write the tables to this .md or .json file, too.")] = None,
    dtype: options.Dtype = "float32",
    device: options.Device = "cpu",
    threads: options.Threads = None,
    resume: options.Resume = True,
    force: options.Force = False,
    as_json: options.Json = False,
    *,
    loading: LoadingOptions,
) -> None:
    """Quantize each layer alone and compare how metrics rank the layers with the perplexity that they cost.

    The metrics are measured on the calibration text, perplexity on --text, each on two halves.
    """
    specs = [options.parse_spec(one) for one in spec]
    for path, option in ((out, "--out"), (report, "--report")):
        if path is not None:
            options.require_free(path, force, option=option)
    if out is not None:
        require_suffix(out, "a study", (".json",))  # by which klfast study FILE knows it
    if report is not None:
        require_suffix(report, "a report", REPORT_SUFFIXES)
    from klfast.cli import runtime
    from klfast.reporting.study_tables import study_tables

    runtime.prepare(threads, device)
    if all(one.endswith(".json") for one in source):
        if out is not None:
            raise typer.BadParameter("--out is for what is measured; files are shown, and --report keeps that")
        found = _read(source)
    elif len(source) > 1:
        raise typer.BadParameter("give one model, or .json files")
    else:
        import klfast
        from klfast.checkpoint.by_name import load_model

        network = load_model(source[0], dtype, device=device, gguf="dense", **loading)
        metrics_text, perplexity_text = (
            runtime.open_batches(one, source[0], network, length=length, windows=windows, **loading)
            for one in (calibration, text)
        )
        partial = None if out is None else out.with_name(f"{out.name}.partial")
        halves = [] if partial is None else [Path(f"{partial}.{half}") for half in range(1, 5)]
        if not resume:
            runtime.discard(*halves)
        with (
            nullcontext()
            if partial is None
            else runtime.stoppable(partial.with_name(f"{partial.name}.*"), *halves, resume=resume)
        ):
            found = klfast.study(network, metrics_text, perplexity_text, specs, layers=layers, resume=partial)
        found.provenance.update(model=source[0], calibration=calibration, held_out=text)
        if out is not None:
            found.to_json(out)
            for half in halves:
                half.unlink(missing_ok=True)
            say(f"The study is in {out}; klfast study {out} shows it again.", as_json)
    tables = study_tables(found)
    if report is not None:
        write(report, tables)
    emit({"tables": [one.data() for one in tables]}, [one.rich() for one in tables], as_json)


def _read(paths: list[str]) -> Study:
    """Return the study in a file of klfast study, or that of published files."""
    from klfast.evaluation.study_results import SCHEMA, Study
    from klfast.evaluation.studying import published
    from klfast.reporting.results_folder import schema
    from klfast.sensitivity import merge

    if len(paths) == 1 and schema(Path(paths[0])) == SCHEMA:
        return Study.from_json(paths[0])
    return published(merge.read(paths))
