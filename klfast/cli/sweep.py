"""klfast sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from klfast.cli import options
from klfast.cli.console import command, emit, say
from klfast.core.loading_options import LoadingOptions

_SPECS = ["int4-g64-sym", "int8-g64-sym"]


def _vocabulary(text: str) -> str | int:
    """Parse a number of vocabulary entries, "full" or "sampled"."""
    if text.isdecimal():
        return int(text)
    if text not in ("full", "sampled"):
        raise typer.BadParameter(f"{text!r} is neither full, sampled nor a number")
    return text


@options.loads_models
def sweep(
    model: options.Model,
    spec: Annotated[list[str], typer.Option(help="A quantization to measure on each layer; repeatable.")] = _SPECS,
    calibration: Annotated[
        str, typer.Option(help='A text file, a token file (.npy, .json), or "calibration", the bundled text.')
    ] = "calibration",
    windows: options.Windows = 32,
    length: options.Length = 512,
    scale: options.Scale = "absmax",
    layers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help='Measure only these linear layers: a name, its end ("in_proj"), a glob ("layers.0.*") or "re:..."; '
            "repeatable.",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Leave out these layers, chosen in the same way; repeatable."),
    ] = None,
    experts: Annotated[
        bool,
        typer.Option(
            "--experts", help="Measure each expert of a mixture by itself, so that plans choose a precision for each."
        ),
    ] = False,
    rows: Annotated[
        bool, typer.Option("--rows", help="Also measure each use of a fused layer's rows, and each expert.")
    ] = False,
    activations: Annotated[
        bool, typer.Option("--activations", help="Also measure int8 activations, for klfast plan --activation auto.")
    ] = False,
    corrected: Annotated[
        list[str] | None,
        typer.Option(
            metavar="USE",
            help='Also measure fused layers with the rows of one use at twice the bits, such as "dt" in Mamba-2\'s '
            "in_proj, in each INT4; plans may choose it. Repeatable.",
        ),
    ] = None,
    vocabulary: Annotated[
        Any,
        typer.Option(
            parser=_vocabulary,
            metavar="full|sampled|N",
            help="Compare all logits, or only KL and cross-entropy, from 128 (N) vocabulary entries a token: the "
            "likeliest and a random sample. Saves the more the larger the vocabulary is.",
        ),
    ] = None,
    budget: Annotated[
        str,
        typer.Option(
            parser=options.one_of("exhaustive", "adaptive"),
            metavar="exhaustive|adaptive",
            help="Measure everything on all of the text, or what plans depend on at a tenth of the cost (with "
            "--vocabulary sampled by default).",
        ),
    ] = "exhaustive",
    max_bytes: Annotated[
        int | None,
        typer.Option(
            parser=options.parse_bytes, metavar="SIZE", help="With --budget adaptive: the size of the wanted plan."
        ),
    ] = None,
    rounding: Annotated[
        str,
        typer.Option(
            parser=options.rounding_name,
            metavar="NAME",
            help="nearest, or gptq: what each layer costs if klfast quantize --rounding gptq rounds it, per channel "
            "and in groups, in INT4, INT6 and INT8, and for the head with some of its rows corrected.",
        ),
    ] = "nearest",
    suffix: Annotated[
        str | None,
        typer.Option(
            parser=options.one_of("exact", "int8"),
            metavar="exact|int8",
            help="Behind a layer's own block, multiply as the model does, or what differs from it in int8: the KL "
            "within some 0.2 %, in less time with AVX-VNNI, AVX-512-VNNI or AMX; there the default with --vocabulary "
            "sampled.",
        ),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            parser=options.one_of("local", "ray"),
            metavar="local|ray",
            help="Measure in this process, or on the Ray cluster at RAY_ADDRESS (without it, on one that "
            "starts here), whose workers have --threads threads each.",
        ),
    ] = "local",
    workers: Annotated[
        int | None,
        typer.Option(help="With --engine ray: the most workers at a time; by default as many as have room.", min=1),
    ] = None,
    out: Annotated[Path, typer.Option(help="File for the sensitivities.")] = Path("sensitivities.json"),
    resume: options.Resume = True,
    dtype: options.Dtype = "float32",
    device: options.Device = "cpu",
    threads: options.Threads = None,
    force: options.Force = False,
    as_json: options.Json = False,
    *,
    loading: LoadingOptions,
) -> None:
    """Measure how much each quantization of each linear layer harms the model.

    A stopped sweep leaves its measurements in OUT.partial; the same command continues from there.
    """
    specs = [options.parse_spec(text) for text in spec]
    options.require_free(out, force)
    import klfast
    from klfast.checkpoint.by_name import as_dtype, load_model
    from klfast.cli.runtime import discard, open_batches, prepare, stoppable
    from klfast.reporting.sweep_tables import ranking as rank
    from klfast.sensitivity.coverage import measured_note, tokens_of, tokens_text

    prepare(threads, device)
    computed = as_dtype(dtype)
    network = load_model(model, "auto", device=device, gguf="dense", **loading)  # as stored: plans count its bytes
    batches = open_batches(calibration, model, network, length=length, windows=windows, **loading)
    partial = out.with_name(out.name + ".partial")
    if not resume:
        discard(partial)
    resumed = partial.exists()
    with stoppable(partial, resume=resume):
        found = klfast.sweep(
            network,
            batches,
            specs=specs,
            resume=partial,
            layers=layers,
            exclude=exclude,
            experts=experts,
            rows=rows,
            activations=activations,
            corrected=corrected or (),
            scale=scale,
            vocabulary=vocabulary,
            budget=budget,
            max_bytes=max_bytes,
            suffix=suffix,
            dtype=None if computed == "auto" else computed,
            engine=engine,
            workers=workers,
        )
        if rounding == "gptq":
            found = klfast.second_order_costs(network, found, batches)
        found.provenance.update(model=model, calibration=calibration)
        found.to_json(out)
    partial.unlink(missing_ok=True)
    ranking = rank(found, "kl_teacher_student", 5)
    least, most = tokens_of(found)
    data = {
        "out": str(out),
        "layers": len(found.layers),
        "candidates": len(found.measurements),
        "tokens": most,
        "least_tokens": least,
        "resumed": resumed,
        "noise_floor": found.noise_floor,
        "ranking": ranking.data(),
        "measured": measured_note(found),
    }
    emit(data, ranking.rich(), as_json)
    if how := measured_note(found):
        say(f"Not measured in full: {how}.", as_json)
    if resumed:
        say(f"The sweep continued from {partial}; --no-resume would have started from scratch.", as_json)
    following = command("klfast", "plan", out, "--max-bytes", "SIZE")
    say(f"{len(found.measurements)} measurements on {tokens_text(found)} are in {out}. Next: {following}", as_json)
