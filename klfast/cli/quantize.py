"""klfast quantize."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from klfast.cli import options
from klfast.cli.console import command, emit, megabytes, say


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
    from klfast.checkpoint.by_name import find_tokenizer, load_model
    from klfast.checkpoint.save import require_target
    from klfast.cli.runtime import prepare
    from klfast.models.linears import linears
    from klfast.models.selection import select
    from klfast.quant.spec import storable_spec

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
