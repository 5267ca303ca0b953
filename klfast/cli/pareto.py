"""klfast pareto."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from klfast.cli import options
from klfast.cli.console import command, emit, say
from klfast.core.loading_options import LoadingOptions


@options.loads_models
def pareto(
    context: typer.Context,
    model: options.Model,
    sensitivities: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Files from sweep of this model; several are merged.")
    ],
    plans: Annotated[int, typer.Option(help="Plans to make, from the smallest to the largest.", min=2)] = 20,
    text: options.HeldOut = "evaluation",
    windows: options.GptqWindows = 32,
    length: options.Length = 512,
    calibration: Annotated[
        str, typer.Option(help='For costs of GPTQ, the text to round on: a file, or "calibration", the bundled text.')
    ] = "calibration",
    layers: options.Layers = None,
    exclude: options.Exclude = None,
    keep: options.Keep = None,
    out: Annotated[Path, typer.Option(help="File for the front; an interrupted one goes on beside it.")] = Path(
        "pareto.json"
    ),
    plot: Annotated[
        Path | None, typer.Option(help="Draw KL over size and speed into this .png, .svg or .pdf file.")
    ] = None,
    dtype: options.Dtype = "float32",
    threads: options.Threads = None,
    resume: options.Resume = True,
    force: options.Force = False,
    as_json: options.Json = False,
    *,
    loading: LoadingOptions,
) -> None:
    """Make plans of many sizes and measure each: KL, perplexity, bytes and tokens per second.

    Uniform plans and full precision are measured beside them.
    """
    kept = options.parse_keep(keep)
    for path, option in ((out, "--out"), (plot, "--plot")):
        if path is not None:
            options.require_free(path, force, option=option)
    import klfast
    from klfast.checkpoint.by_name import load_model
    from klfast.cli.runtime import discard, open_batches, prepare, require_plot, stoppable
    from klfast.reporting.front_plot import plot_front
    from klfast.reporting.front_tables import front_table
    from klfast.sensitivity import merge

    if plot is not None:
        require_plot(plot)
    prepare(threads)
    found = merge.read(sensitivities)
    gptq = found.provenance.get("rounding") == "gptq"
    if not gptq:
        options.goes_with(context, "costs from klfast sweep --rounding gptq", "calibration")
    network = load_model(model, dtype, gguf="dense", **loading)
    held_out = open_batches(text, model, network, length=length, windows=windows, **loading)
    partial = out.with_name(f"{out.name}.partial")
    if not resume:
        discard(partial)
    rounded_on = None
    if gptq:
        count = options.gptq_windows(context, windows)
        rounded_on = open_batches(calibration, model, network, length=length, windows=count, **loading)
    with stoppable(partial, resume=resume):
        front = klfast.measure_front(
            network,
            found,
            held_out,
            plans,
            rounding="gptq" if gptq else "nearest",
            calibration=rounded_on,
            resume=partial,
            layers=layers,
            exclude=exclude,
            keep=kept,
        )
    front.provenance["model"] = model
    front.provenance["text"] = text
    front.to_json(out)
    partial.unlink(missing_ok=True)
    if plot is not None:
        plot_front(front, plot)
    table = front_table(front)
    emit({"out": str(out), "points": table.data()}, table.rich(), as_json)
    say(f"The front is in {out}. Next: {command('klfast', 'plan', *sensitivities, '--max-bytes', 'SIZE')}", as_json)
