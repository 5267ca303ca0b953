"""klfast sweep, plan, quantize: from a model to a smaller one."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from klfast.cli import options
from klfast.cli.console import command, emit, megabytes, say


@options.loads_models
def sweep(
    model: options.Model,
    spec: Annotated[list[str], typer.Option(help="A quantization to measure on each layer; repeat for several.")] = [
        "int4-g64-sym",
        "int8-g64-sym",
    ],
    calibration: Annotated[
        str, typer.Option(help='A text file, a token file (.npy, .json), or "calibration", the bundled text.')
    ] = "calibration",
    windows: options.Windows = "32",
    length: options.Length = 512,
    scale: options.Scale = "absmax",
    layers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help='Measure only these linear layers: a name, its end ("in_proj"), a glob ("layers.0.*") or "re:..."; repeat for several.',
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Leave these layers out, chosen in the same way; repeat for several."),
    ] = None,
    rows: Annotated[
        bool,
        typer.Option(
            "--rows", help="Also measure each use that the rows of one layer are split between (Hymba's in_proj)."
        ),
    ] = False,
    out: Annotated[Path, typer.Option(help="Where the sensitivities go.")] = Path("sensitivities.json"),
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume", help="Go on from OUT.partial, which a stopped sweep leaves, or throw it away."
        ),
    ] = True,
    dtype: options.Dtype = "float32",
    device: options.Device = "cpu",
    threads: options.Threads = None,
    force: options.Force = False,
    as_json: options.Json = False,
    *,
    loading: dict[str, bool],
) -> None:
    """Measure how much each linear layer suffers from each quantization.

    A sweep that was stopped leaves what it has measured in OUT.partial, and the same command again goes on from there.
    """
    specs = [options.parse_spec(text) for text in spec]
    options.require_free(out, force)
    import klfast
    from klfast.checkpoint.loading import as_dtype, load_model
    from klfast.cli.runtime import count, open_batches, prepare
    from klfast.reporting import tables

    prepare(threads, device)
    computed = as_dtype(dtype)
    network = load_model(model, "auto", device=device, **loading)  # as it is stored: plans count its bytes
    batches = open_batches(calibration, model, network, length=length, windows=windows, **loading)
    partial = out.with_name(out.name + ".partial")
    if not resume:
        partial.unlink(missing_ok=True)
    resumed = partial.exists()
    try:
        found = klfast.sweep(
            network,
            batches,
            specs=specs,
            resume=partial,
            layers=layers,
            exclude=exclude,
            rows=rows,
            scale=scale,
            dtype=None if computed == "auto" else computed,
        )
        found.provenance.update(model=model, calibration=calibration)
        found.to_json(out)
    except KeyboardInterrupt:
        again = "the same command" if resume else "the same command without --no-resume"
        left = (
            f"{partial} keeps what was measured, and {again} goes on from there"
            if partial.exists()
            else "nothing was measured yet"
        )
        print(f"klfast: stopped; {left}.", file=sys.stderr)
        raise typer.Exit(130) from None
    partial.unlink(missing_ok=True)
    ranking = tables.ranking(found, "kl_teacher_student", 5)
    data = {
        "out": str(out),
        "layers": len(found.layers),
        "candidates": len(found.measurements),
        "tokens": count(batches),
        "resumed": resumed,
        "noise_floor": found.noise_floor,
        "ranking": ranking.data(),
    }
    emit(data, ranking.rich(), as_json)
    if resumed:
        say(f"The sweep went on from {partial}; --no-resume would have started anew.", as_json)
    following = command("klfast", "plan", out, "--max-bytes", "SIZE")
    say(f"{len(found.measurements)} measurements on {count(batches)} tokens are in {out}. Next: {following}", as_json)


def plan(
    sensitivities: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", help="What sweep wrote, or published kl-ssm-quant files; several are merged."
        ),
    ],
    max_bytes: Annotated[
        int | None,
        typer.Option(parser=options.parse_bytes, metavar="SIZE", help="Of the whole model: 3200000, 3.2MB, 1.5GiB."),
    ] = None,
    mean_bits: Annotated[float | None, typer.Option(help="Per weight of the linear layers, scales included.")] = None,
    max_kl: Annotated[float | None, typer.Option(help="Summed over the layers, nats per token.")] = None,
    method: Annotated[
        str, typer.Option(parser=options.method_name, metavar="NAME", help="optimal, greedy or uniform.")
    ] = "optimal",
    metric: Annotated[
        str | None,
        typer.Option(
            parser=options.metric_name,
            metavar="NAME",
            help="What to keep small, such as kl_teacher_student or sqnr_db.",
        ),
    ] = None,
    layers: options.Layers = None,
    exclude: options.Exclude = None,
    keep: options.Keep = None,
    out: Annotated[Path, typer.Option(help="Where the plan goes.")] = Path("plan.json"),
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Choose a precision for each layer under one budget: --max-bytes, --mean-bits or --max-kl."""
    options.exactly_one(max_bytes=max_bytes, mean_bits=mean_bits, max_kl=max_kl)
    kept = options.parse_keep(keep)
    options.require_free(out, force)
    import klfast
    from klfast.reporting import tables
    from klfast.sensitivity import merge

    found = merge.read(sensitivities)
    made = klfast.plan(
        found, max_bytes, mean_bits, max_kl, method, metric=metric, layers=layers, exclude=exclude, keep=kept
    )
    made.to_json(out)
    by_spec = Counter(str(made.specs.get(name, tables.FULL)) for name in found.layers)
    facts = {
        "method": made.method,
        "layers": by_spec,
        "predicted": dict(made.predicted),
        "notes": list(made.notes),
        "scale": made.scale,
    }
    emit({"out": str(out), **facts}, [one.rich() for one in tables.plan_tables(made, found)], as_json)
    say(f"The plan is in {out}. Next: {command('klfast', 'quantize', 'MODEL', out, '--out', 'FOLDER')}", as_json)


@options.loads_models
def quantize(
    model: options.Model,
    plan: Annotated[
        Path | None, typer.Argument(metavar="PLAN", help="What klfast plan wrote.", show_default=False)
    ] = None,
    uniform: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="Without a plan: every linear layer in this one, such as int4-g64-sym."),
    ] = None,
    layers: options.Layers = None,
    exclude: options.Exclude = None,
    out: Annotated[Path, typer.Option(help="The folder to make.")] = ...,
    scale: options.PlanScale = None,
    dtype: Annotated[
        str,
        typer.Option(
            parser=options.dtype_name,
            metavar="NAME",
            help="What the rest of the model is stored in: float32, bfloat16, float16, or auto to leave it.",
        ),
    ] = "auto",
    force: options.Force = False,
    as_json: options.Json = False,
    *,
    loading: dict[str, bool],
) -> None:
    """Write the model quantized, with its tokenizer, in the compressed-tensors format."""
    options.exactly_one(PLAN=plan, uniform=uniform)
    spec = None if uniform is None else options.parse_spec(uniform)
    if plan is not None and (layers or exclude):
        raise typer.BadParameter("--layers and --exclude go with --uniform; with a plan, give them to klfast plan")
    options.require_free(out, force, folder=True)
    import klfast
    from klfast.checkpoint.apply_plan import plan_scale
    from klfast.checkpoint.loading import find_tokenizer, load_model
    from klfast.checkpoint.save_load import require_target
    from klfast.cli.runtime import prepare
    from klfast.models.linears import linears
    from klfast.models.selection import select
    from klfast.quant.types import storable_spec

    prepare()
    require_target(out, overwrite=force)
    made = None if plan is None else klfast.Plan.from_json(plan)
    if made is not None:
        scale = plan_scale(made, scale)  # before the model is loaded
    tokenizer = find_tokenizer(model, **loading)
    if tokenizer is None:
        say(f"{model} holds no tokenizer, so {out} gets none.", as_json)
    network = load_model(model, dtype, **loading)
    if made is None:
        found = linears(network)
        specs = {name: storable_spec(spec, found[name].in_features) for name in select(found, layers, exclude)}
        made = klfast.Plan(specs, "uniform", scale=scale)
    klfast.save_quantized(klfast.quantize_model(network, made, scale=scale), out, tokenizer, overwrite=force)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    data = {
        "out": str(out),
        "quantized_layers": len(made.specs),
        "layers": len(linears(network)),
        "weight_file_bytes": size,
    }
    emit(
        data,
        f"{len(made.specs)} of {data['layers']} linear layers are quantized; {megabytes(size)} of weights are in {out}.",
        as_json,
    )
    say(
        f"Next: {command('klfast', 'eval', out, '--teacher', model)}, {command('klfast', 'generate', out, 'PROMPT')}",
        as_json,
    )
