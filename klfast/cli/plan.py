"""klfast plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from klfast.cli import options
from klfast.cli.console import command, emit, say
from klfast.core.errors import InvalidInputError
from klfast.core.loading_options import LoadingOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from klfast.planning.plan_file import Plan
    from klfast.planning.timings import Timings
    from klfast.sensitivity.results import Sensitivities


_OF_REFINE = ("calibration", "windows", "length", "tries", "local_files_only", "trust_remote_code")


@options.loads_models
def plan(
    context: typer.Context,
    sensitivities: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", help="Files from sweep, or published kl-ssm-quant files; several are merged."
        ),
    ],
    max_bytes: Annotated[
        int | None,
        typer.Option(
            parser=options.parse_bytes, metavar="SIZE", help="Limit for the whole model: 3200000, 3.2MB, 1.5GiB."
        ),
    ] = None,
    mean_bits: Annotated[
        float | None, typer.Option(help="Limit per weight of the linear layers, including scales.")
    ] = None,
    max_kl: Annotated[float | None, typer.Option(help="Limit on the sum over the layers, nats per token.")] = None,
    max_seconds: Annotated[
        float | None,
        typer.Option(help="Limit on the seconds that a token spends in products with the matrices, on this machine."),
    ] = None,
    objective: Annotated[
        str,
        typer.Option(
            parser=options.objective_name, metavar="size|latency", help="What a plan within --max-kl has least of."
        ),
    ] = "size",
    timings: Annotated[
        Path | None,
        typer.Option(
            help="Seconds of the products, for --max-seconds, --objective latency and the plan's prediction: read from "
            "this file, or if there is none measured here, and kept in it.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(parser=options.method_name, metavar="NAME", help="optimal, greedy or uniform.")
    ] = "optimal",
    metric: Annotated[
        str | None,
        typer.Option(
            parser=options.metric_name,
            metavar="NAME",
            help="The metric that costs are derived from, such as kl_teacher_student or sqnr_db.",
        ),
    ] = None,
    layers: options.Layers = None,
    exclude: options.Exclude = None,
    keep: options.Keep = None,
    activation: Annotated[
        str,
        typer.Option(
            parser=options.one_of("exact", "auto"),
            metavar="exact|auto",
            help="auto: round a layer's input to int8 where that costs less than a tenth of rounding its weight; "
            "needs klfast sweep --activations.",
        ),
    ] = "exact",
    servable: Annotated[
        bool,
        typer.Option(
            "--servable",
            help="A plan whose folder vLLM and transformers without klfast load: layers that they fuse have one "
            "precision, the head and Mamba's out_proj and dt_proj full precision.",
        ),
    ] = False,
    refine: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            show_default=False,
            help="Measure whole plans on this model: the plan, uniform ones of as many bytes and the best swaps; the "
            "best is the plan. By GPTQ if the sweep was for it, measured on the windows after those to round on.",
        ),
    ] = None,
    calibration: Annotated[
        str,
        typer.Option(help='For --refine: a text file, a token file (.npy, .json), or "calibration", the bundled text.'),
    ] = "calibration",
    windows: options.GptqWindows = 32,
    length: options.Length = 512,
    tries: Annotated[int, typer.Option(min=0, help="For --refine: most swaps to measure.")] = 12,
    dtype: Annotated[
        str,
        typer.Option(
            parser=options.one_of("float32", "bfloat16", "float16"),
            metavar="NAME",
            help="Of --timings: the dtype in which the model is to run.",
        ),
    ] = "float32",
    threads: options.Threads = None,
    out: Annotated[Path, typer.Option(help="File for the plan.")] = Path("plan.json"),
    force: options.Force = False,
    as_json: options.Json = False,
    *,
    loading: LoadingOptions,
) -> None:
    """Choose a precision for each layer under one budget: --max-bytes, --mean-bits, --max-seconds or --max-kl."""
    options.exactly_one(max_bytes=max_bytes, mean_bits=mean_bits, max_seconds=max_seconds, max_kl=max_kl)
    if objective == "latency" and max_kl is None and max_seconds is None:
        raise typer.BadParameter("--objective latency goes with --max-kl or --max-seconds")
    in_seconds = timings is not None or max_seconds is not None or objective == "latency"
    if refine is None:
        options.goes_with(context, "--refine", *_OF_REFINE)
    if not in_seconds:
        options.goes_with(context, "--timings, --max-seconds or --objective latency", "dtype")
    kept = options.parse_keep(keep)
    options.require_free(out, force)
    import klfast
    from klfast.cli.runtime import prepare
    from klfast.planning.servable import unserved
    from klfast.reporting.plan_tables import FULL, plan_tables
    from klfast.sensitivity import merge

    prepare(threads, "cpu")
    found = merge.read(sensitivities)
    timed = _timings(found, timings, dtype) if in_seconds else None
    gptq = found.provenance.get("rounding") == "gptq"
    measure = None
    if refine is not None and not gptq:
        measure = _measure(refine, calibration, windows, length, **loading)
    elif refine is not None:
        count = options.gptq_windows(context, windows)
        measure, note = _measure_rounded(refine, calibration, count, length, **loading)
        say(note, as_json)
    made = klfast.plan(
        found,
        max_bytes,
        mean_bits,
        max_kl,
        method,
        metric=metric,
        layers=layers,
        exclude=exclude,
        keep=kept,
        activation=activation,
        refine=measure,
        tries=tries,
        servable=servable,
        objective=objective,
        max_seconds=max_seconds,
        timings=timed,
    )
    made.to_json(out)
    by_spec = Counter(str(made.specs.get(name, FULL)) for name in found.layers)
    facts = {
        "method": made.method,
        "layers": by_spec,
        "predicted": dict(made.predicted),
        "notes": list(made.notes),
        "scale": made.scale,
        "activations": dict(Counter(made.activations.values())),
    }
    emit({"out": str(out), **facts}, [one.rich() for one in plan_tables(made, found)], as_json)
    if not made.specs:
        say("The plan leaves every layer in full precision.", as_json)
    if alone := unserved(list(found.layers), made.specs):
        say(
            f"Of {len(found.layers)} layers klfast alone can read {len(alone)}, such as {alone[0]}; "
            "--servable plans what vLLM and transformers read, too.",
            as_json,
        )
    following = ["klfast", "quantize", "MODEL", out]
    if gptq:
        following += ["--rounding", "gptq"]
        rounded_on = {"calibration": calibration, "windows": windows, "length": length}
        for name, value in rounded_on.items():
            following += [f"--{name}", value] if options.given(context, name) else []
    say(f"The plan is in {out}. Next: {command(*following, '--out', 'FOLDER')}", as_json)


def _timings(found: Sensitivities, path: Path | None, dtype: str) -> Timings:
    """Return the seconds of products that are in a file, or measured now, and then kept there."""
    import torch

    from klfast.benchkit.product_times import time_products, timings_in

    if path is None:
        return time_products(found, dtype=getattr(torch, dtype))
    if not path.exists():
        options.require_free(path, force=False, option="--timings")
    return timings_in(path, found, dtype=getattr(torch, dtype))


def _measure(
    model: str, text: str, windows: int | None, length: int, **loading: Unpack[LoadingOptions]
) -> Callable[[Plan], float]:
    """Return what measures the KL of a whole plan on a model, rounded to nearest."""
    import klfast
    from klfast.checkpoint.by_name import load_model
    from klfast.cli.runtime import open_batches

    network = load_model(model, "float32", gguf="dense", **loading)
    return klfast.measured_kl(network, open_batches(text, model, network, length=length, windows=windows, **loading))


def _measure_rounded(
    model: str, text: str, windows: int | None, length: int, **loading: Unpack[LoadingOptions]
) -> tuple[Callable[[Plan], float], str]:
    """Return what measures the KL of a whole plan that GPTQ rounds on some windows, on as many after them; and a note.

    Raises:
        InvalidInputError: less than an eighth as many are left.
    """
    import torch

    import klfast
    from klfast.checkpoint.by_name import load_model
    from klfast.cli.runtime import open_batches

    network = load_model(model, "float32", gguf="dense", **loading)
    both = None if windows is None else 2 * windows
    rows = torch.cat(open_batches(text, model, network, length=length, windows=both, **loading))
    count = min(len(rows), len(rows) if windows is None else windows)
    left = len(rows) - count
    if 8 * left < count:
        raise InvalidInputError(
            f"{text} has {len(rows)} windows of {rows.shape[1]} tokens: if GPTQ rounds on {count}, only {left} are "
            f"left to measure plans on; lower --windows (to {len(rows) // 2}), or give a longer --calibration"
        )
    measure = klfast.measured_kl(network, rows[count:].split(4), rounding="gptq", calibration=rows[:count].split(4))
    return measure, f"GPTQ rounds on {count} windows of {text}; plans are measured on the {left} after them."
