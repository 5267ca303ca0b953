"""klfast export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from klfast.cli import options
from klfast.cli.console import emit, megabytes, say
from klfast.core.loading_options import LoadingOptions


@options.loads_models
def export(
    model: options.Model,
    out: Annotated[Path, typer.Option(help="The file to create.", show_default=False)],
    format: Annotated[
        Literal["gguf", "llama-quantize"],
        typer.Option(
            help="gguf: a file for llama.cpp. llama-quantize: each tensor's type as text for its --tensor-type-file."
        ),
    ] = "gguf",
    dtype: options.Dtype = "auto",
    regroup: Annotated[
        bool, typer.Option("--regroup", help="Round layers anew whose groups no type of GGUF has, instead of failing.")
    ] = False,
    pre_tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            show_default=False,
            help="llama.cpp's name of the way in which the tokenizer splits text, where klfast does not know it.",
        ),
    ] = None,
    no_tokenizer: Annotated[bool, typer.Option("--no-tokenizer", help="Leave the tokenizer out.")] = False,
    force: options.Force = False,
    as_json: options.Json = False,
    *,
    loading: LoadingOptions,
) -> None:
    """Write a model, quantized or not, for another engine; quantized layers keep their codes."""
    options.require_free(out, force)
    from klfast.checkpoint.by_name import find_tokenizer, load_model
    from klfast.cli.runtime import prepare
    from klfast.core.io import write_atomic
    from klfast.export.gguf.tensor_types import tensor_types
    from klfast.export.gguf.write import export_gguf, require_package

    prepare()
    require_package()
    tokenizer = None if no_tokenizer or format != "gguf" else find_tokenizer(model, **loading)
    network = load_model(model, dtype, **loading)
    if format == "llama-quantize":
        write_atomic(out, tensor_types(network))
        emit({"out": str(out)}, f"The types are in {out}: llama-quantize --tensor-type-file {out} ...", as_json)
        return
    name = Path(model).absolute().name.removesuffix(".gguf")
    written = export_gguf(network, out, tokenizer, name=name, regroup=regroup, pre_tokenizer=pre_tokenizer)
    for note in written.notes:
        say(f"Note: {note}.", as_json)
    counts = ", ".join(f"{count} {kind}" for kind, count in written.kinds.items())
    facts = {"out": str(out), "architecture": written.architecture, "kinds": written.kinds, "notes": written.notes}
    size = out.stat().st_size
    emit({**facts, "bytes": size}, f"{out}: {megabytes(size)}, llama.cpp's {written.architecture}, {counts}.", as_json)
