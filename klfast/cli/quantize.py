"""klfast quantize."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Annotated

import typer

from klfast.cli import options
from klfast.cli.console import command, emit, megabytes, say
from klfast.core.loading_options import LoadingOptions


@options.loads_models
def quantize(
    context: typer.Context,
    model: options.Model,
    out: Annotated[Path, typer.Option(help="The folder to create.")],
    plan: Annotated[
        Path | None, typer.Argument(metavar="PLAN", help="A file from klfast plan.", show_default=False)
    ] = None,
    uniform: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="Without a plan: the spec of every linear layer, such as int4-g64-sym."),
    ] = None,
    layers: options.Layers = None,
    exclude: options.Exclude = None,
    scale: options.PlanScale = None,
    activation: Annotated[
        str | None,
        typer.Option(
            parser=options.activation_name,
            metavar="NAME",
            show_default=False,
            help="Round the inputs of the quantized layers: int8, exact (not at all), or auto as the plan has them; by "
            "default as the plan has them, exact with --uniform.",
        ),
    ] = None,
    rounding: Annotated[
        str,
        typer.Option(
            parser=options.rounding_name,
            metavar="NAME",
            help="nearest, or gptq: choose the codes so that each layer's output on calibration text changes least; "
            "takes minutes.",
        ),
    ] = "nearest",
    calibration: Annotated[
        str, typer.Option(help='For gptq: a text file, a token file (.npy, .json), or "calibration", the bundled text.')
    ] = "calibration",
    windows: options.Windows = options.GPTQ_WINDOWS,
    length: options.Length = 512,
    threads: options.Threads = None,
    dtype: Annotated[
        str,
        typer.Option(
            parser=options.dtype_name,
            metavar="NAME",
            help="Store the rest of the model in float32, bfloat16, float16, or auto to leave it as it is.",
        ),
    ] = "auto",
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume",
            help="For gptq: continue from OUT.partial, which a stopped run leaves, or discard it.",
        ),
    ] = True,
    force: options.Force = False,
    as_json: options.Json = False,
    *,
    loading: LoadingOptions,
) -> None:
    """Write the quantized model, with its tokenizer, in the compressed-tensors format."""
    options.exactly_one(PLAN=plan, uniform=uniform)
    spec = None if uniform is None else options.parse_spec(uniform)
    if plan is not None and (layers or exclude):
        raise typer.BadParameter("--layers and --exclude go with --uniform; with a plan, give them to klfast plan")
    if uniform is not None and activation == "auto":
        raise typer.BadParameter("--activation auto goes with a plan; with --uniform, give int8 or exact")
    if rounding != "gptq":
        options.goes_with(context, "--rounding gptq", "calibration", "windows", "length", "resume")
    options.require_free(out, force, folder=True)
    whole = out.resolve()
    partial = whole.with_name(f"{whole.name}.partial") if rounding == "gptq" else None
    import klfast
    from klfast.checkpoint.apply_plan import plan_activations, plan_scale
    from klfast.checkpoint.by_name import find_tokenizer, load_model
    from klfast.checkpoint.save import require_target
    from klfast.cli.runtime import open_batches, prepare, stoppable
    from klfast.core.errors import InvalidInputError
    from klfast.models.matrices import matrices
    from klfast.models.sizes import total_bytes
    from klfast.planning.everywhere import plan_everywhere
    from klfast.rounding.rounded import forget

    prepare(threads)
    require_target(out, overwrite=force)
    made = None if plan is None else klfast.Plan.from_json(plan)
    if made is not None:
        scale = plan_scale(made, scale)  # raise before the model is loaded
        plan_activations(made, activation)
    tokenizer = find_tokenizer(model, **loading)
    if tokenizer is None:
        say(f"{model} holds no tokenizer, so {out} gets none.", as_json)
    network = load_model(model, dtype, gguf="dense", **loading)
    if spec is not None:
        made = plan_everywhere(network, spec, layers, exclude, scale)
    assert made is not None  # there is a plan or a spec
    text = None
    if partial is not None:
        text = open_batches(calibration, model, network, length=length, windows=windows, **loading)
        if not resume:
            forget(partial)
    with nullcontext() if partial is None else stoppable(partial, resume=resume):
        klfast.quantize_model(
            network, made, scale=scale, activation=activation, rounding=rounding, calibration=text, resume=partial
        )
    klfast.save_quantized(network, out, tokenizer, overwrite=force)
    if partial is not None:
        with suppress(InvalidInputError):  # another process goes on from there, and removes it in the end
            forget(partial)
    held, stored = total_bytes(network), sum(file.stat().st_size for file in out.glob("*.safetensors"))
    each = matrices(network).values()
    quantized, total = sum(one.is_quantized for one in each), len(each)
    emit(
        {"out": str(out), "quantized_layers": quantized, "layers": total, "bytes": held, "weight_file_bytes": stored},
        f"{quantized} of {total} linear layers are quantized; {megabytes(held)} of weights are in {out}.",
        as_json,
    )
    say(
        f"Next: {command('klfast', 'eval', out, '--teacher', model)}, {command('klfast', 'generate', out, 'PROMPT')}",
        as_json,
    )
