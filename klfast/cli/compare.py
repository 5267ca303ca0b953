"""klfast compare: the KL card of two models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from klfast.cli import options
from klfast.cli.console import emit, say
from klfast.core.io import require_suffix
from klfast.core.loading_options import LoadingOptions

_NAMES = "a local folder, a GGUF file, a hub id or a bundled model"


@options.loads_models
def compare(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help=f"The model to compare with, {_NAMES}.", show_default=False)
    ],
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"The model to judge, {_NAMES}.", show_default=False)],
    text: options.HeldOut = "evaluation",
    windows: options.AllWindows = None,
    length: options.Length = 512,
    out: Annotated[Path | None, typer.Option(help="Write the figures to this .json file, too.")] = None,
    dtype: options.Dtype = "float32",
    gguf: options.Gguf = "exact",
    device: options.Device = "cpu",
    threads: options.Threads = None,
    force: options.Force = False,
    as_json: options.Json = False,
    *,
    loading: LoadingOptions,
) -> None:
    """Show how MODEL's predictions differ from BASE's, quantized or not: the KL card, as llama-perplexity names it.

    Every figure has a 95 % confidence interval; KL is shown by position, up to --length, and by token frequency, too.
    """
    if out is not None:
        options.require_free(out, force)
        require_suffix(out, "a KL card", (".json",))
    from dataclasses import replace

    import torch

    import klfast
    from klfast.checkpoint.by_name import load_model
    from klfast.checkpoint.one_tokenizer import with_tokenizer
    from klfast.cli import runtime
    from klfast.models.fingerprint import fingerprint
    from klfast.models.precisions import digest, precisions
    from klfast.reporting.comparison_tables import comparison_tables

    runtime.prepare(threads, device)
    reader = model if runtime.is_token_file(text) else with_tokenizer(base, model, **loading)
    teacher, student = (
        load_model(name, dtype, device=device, gguf=how, **loading) for name, how in ((base, "exact"), (model, gguf))
    )
    rows = torch.cat(runtime.open_batches(text, reader, student, length=length, windows=windows, **loading))
    found = klfast.compare(teacher, student, rows, progress=None)
    named = {"base": base, "model": model, "text": text, "length": rows.shape[1], "dtype": dtype}
    of = {"fingerprint": fingerprint(teacher).to_data(), "precisions_sha256": digest(precisions(student))}
    found = replace(found, provenance={**named, **of, **found.provenance})
    if out is not None:
        found.to_json(out)
        say(f"The figures are in {out}.", as_json)
    emit(found.to_data(), [one.rich() for one in comparison_tables(found)], as_json)
    if found.windows == 1:
        say("Intervals need several windows: give a longer text or a smaller --length.", as_json)
