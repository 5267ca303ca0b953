"""klfast export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from klfast.cli import options
from klfast.cli.console import emit, megabytes, say
from klfast.core.loading_options import LoadingOptions

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


@options.loads_models
def export(
    model: options.Model,
    out: Annotated[Path, typer.Option(help="The file or, for openvino, the folder to create.", show_default=False)],
    format: Annotated[
        Literal["gguf", "llama-quantize", "openvino", "nncf"],
        typer.Option(
            help="gguf: a file for llama.cpp. llama-quantize: each tensor's type as text for its --tensor-type-file. "
            "openvino: a folder for OpenVINO. nncf: the layers of each precision as JSON, for NNCF's ignored scopes."
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
    if format != "gguf" and (regroup or pre_tokenizer is not None):
        raise typer.BadParameter("--regroup and --pre-tokenizer are for --format gguf")
    if format == "openvino":
        from klfast.export.openvino import write as openvino

        openvino.require_package()
        openvino.require_free(out, force)
    else:
        options.require_free(out, force)
        if format != "nncf":
            from klfast.export.gguf.write import require_package

            require_package()
    from klfast.checkpoint.by_name import find_tokenizer, load_model
    from klfast.cli.runtime import prepare

    prepare()
    wants_tokenizer = format in ("gguf", "openvino") and not no_tokenizer
    tokenizer = find_tokenizer(model, **loading) if wants_tokenizer else None
    network = load_model(model, dtype, **loading)
    if format == "gguf":
        name = Path(model).absolute().name.removesuffix(".gguf")
        _gguf(network, out, tokenizer, as_json, name=name, regroup=regroup, pre_tokenizer=pre_tokenizer)
    elif format == "openvino":
        _openvino(network, out, tokenizer, as_json, force)
    else:
        _text(network, out, format, as_json)


def _gguf(
    network: nn.Module, out: Path, tokenizer: PreTrainedTokenizerBase | None, as_json: bool, **settings: Any
) -> None:
    from klfast.export.gguf.write import export_gguf

    written = export_gguf(network, out, tokenizer, **settings)
    for note in written.notes:
        say(f"Note: {note}.", as_json)
    counts = ", ".join(f"{count} {kind}" for kind, count in written.kinds.items())
    facts = {"out": str(out), "architecture": written.architecture, "kinds": written.kinds, "notes": written.notes}
    size = out.stat().st_size
    emit({**facts, "bytes": size}, f"{out}: {megabytes(size)}, llama.cpp's {written.architecture}, {counts}.", as_json)


def _openvino(
    network: nn.Module, out: Path, tokenizer: PreTrainedTokenizerBase | None, as_json: bool, force: bool
) -> None:
    from klfast.export.openvino.write import export_openvino

    written = export_openvino(network, out, tokenizer, overwrite=force)
    for note in written.notes:
        say(f"Note: {note}.", as_json)
    size = sum(file.stat().st_size for file in out.glob("openvino_model.*"))
    counts = ", ".join(f"{count} {kind}" for kind, count in written.kinds.items()) or "none"
    facts = {"out": str(out), "kinds": written.kinds, "notes": written.notes, "bytes": size}
    emit(facts, f"{out}: OpenVINO, {megabytes(size)}; quantized layers: {counts}.", as_json)


def _text(network: nn.Module, out: Path, format: str, as_json: bool) -> None:
    from klfast.core.io import write_atomic

    if format == "nncf":
        from klfast.export.openvino.nncf import scopes

        write_atomic(out, scopes(network))
        emit({"out": str(out)}, f"The layers of each precision are in {out}, for NNCF's ignored scopes.", as_json)
        return
    from klfast.export.gguf.tensor_types import tensor_types

    write_atomic(out, tensor_types(network))
    emit({"out": str(out)}, f"The types are in {out}: llama-quantize --tensor-type-file {out} ...", as_json)
