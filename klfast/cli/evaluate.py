"""klfast eval: the quality of a model."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from klfast.cli import options
from klfast.cli.console import emit, table
from klfast.core.loading_options import LoadingOptions


@options.loads_models
def evaluate(
    model: options.Model,
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Compare with this model, for example the full-precision one.")
    ] = None,
    text: options.HeldOut = "evaluation",
    windows: options.AllWindows = None,
    length: options.Length = 512,
    batch_size: options.BatchSize = 4,
    dtype: options.Dtype = "float32",
    gguf: options.Gguf = "exact",
    device: options.Device = "cpu",
    threads: options.Threads = None,
    as_json: options.Json = False,
    *,
    loading: LoadingOptions,
) -> None:
    """Measure perplexity on a text and, with --teacher, the distance from another model."""
    from dataclasses import asdict

    import klfast
    from klfast.checkpoint.by_name import load_model
    from klfast.cli import runtime
    from klfast.models.activations import exact_activations, int8_layers
    from klfast.models.matrices import matrices

    runtime.prepare(threads, device)
    network = load_model(model, dtype, device=device, gguf=gguf, **loading)
    other = None if teacher is None else load_model(teacher, dtype, device=device, gguf="exact", **loading)
    batches = runtime.open_batches(
        text, model, network, length=length, windows=windows, batch_size=batch_size, **loading
    )
    found = klfast.evaluate(network, batches, other, progress=None)
    int8, quantized = int8_layers(network), sum(one.is_quantized for one in matrices(network).values())
    rows = [("predicted tokens", str(found.tokens)), ("perplexity", f"{found.perplexity:.4f}")]
    if found.kl is not None and found.kl_stderr is not None:
        error = "" if math.isnan(found.kl_stderr) else f" +- {found.kl_stderr:.6f}"
        rows += [
            ("the teacher's perplexity", f"{found.teacher_perplexity:.4f}"),
            ("KL(teacher || model), nats per token", f"{found.kl:.6f}{error}"),
            ("top-1 agreement", f"{found.top1_agreement:.2%}"),
        ]
    data = {key: value for key, value in asdict(found).items() if value is not None}
    if quantized:
        data |= {"quantized_layers": quantized, "int8_activations": len(int8)}
        rows.append(("quantized layers with int8 activations", f"{len(int8)} of {quantized}"))
    if int8 and other is not None:
        with exact_activations(network):
            exact = klfast.evaluate(network, batches, other, progress=None).kl
        assert exact is not None  # there is a teacher
        data["kl_with_exact_activations"] = exact
        rows.append(("KL with exact activations in all layers", f"{exact:.6f}"))
    emit({"model": model, "teacher": teacher, "text": text, **data}, table([model, ""], rows), as_json)
