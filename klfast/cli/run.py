"""klfast eval and generate: a model at work."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from klfast.cli import options
from klfast.cli.console import emit, table


@options.loads_models
def evaluate(
    model: options.Model,
    teacher: Annotated[str | None, typer.Option(metavar="MODEL", help="Compare with this model, for instance the full-precision one.")] = None,
    text: Annotated[str, typer.Option(help='A text file, a token file (.npy, .json), or "evaluation", the bundled text.')] = "evaluation",
    windows: options.Windows = "all",
    length: options.Length = 512,
    batch_size: options.BatchSize = 4,
    dtype: options.Dtype = "float32",
    device: options.Device = "cpu",
    threads: options.Threads = None,
    as_json: options.Json = False,
    *,
    loading: dict[str, bool],
) -> None:
    """Measure perplexity on a text, and with --teacher how far the model has moved from another one."""
    from dataclasses import asdict

    import klfast
    from klfast.cli import session
    from klfast.loading import load_model

    session.prepare(threads, device)
    network = load_model(model, dtype, device=device, **loading)
    other = None if teacher is None else load_model(teacher, dtype, device=device, **loading)
    batches = session.open_batches(text, model, network, length=length, windows=windows, batch_size=batch_size, **loading)
    found = klfast.evaluate(network, batches, other, progress=None)
    rows = [("predicted tokens", str(found.tokens)), ("perplexity", f"{found.perplexity:.4f}")]
    if other is not None:
        rows += [
            ("the teacher's perplexity", f"{found.teacher_perplexity:.4f}"),
            ("KL(teacher || model), nats per token", f"{found.kl:.6f}" + ("" if math.isnan(found.kl_stderr) else f" +- {found.kl_stderr:.6f}")),
            ("top-1 agreement", f"{found.top1_agreement:.2%}"),
        ]
    data = {key: value for key, value in asdict(found).items() if value is not None}
    emit({"model": model, "teacher": teacher, "text": text, **data}, table([model, ""], rows), as_json)


@options.loads_models
def generate(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to go on from.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.", min=1)] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.", callback=options.in_range("temperature", lambda t: 0 <= t < math.inf, "0 or more, and finite"))] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw among so many of the likeliest tokens.", min=1)] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the likeliest tokens that make up this probability.", callback=options.in_range("top-p", lambda p: 0 < p <= 1, "above 0 and at most 1"))] = None,
    seed: Annotated[int, typer.Option(help="Of the draws; the same seed gives the same text.")] = 0,
    dtype: options.Dtype = "float32",
    device: options.Device = "cpu",
    threads: options.Threads = None,
    as_json: options.Json = False,
    *,
    loading: dict[str, bool],
) -> None:
    """Continue a text; the tokens appear as they are made."""
    import torch

    import klfast
    from klfast.cli import session
    from klfast.errors import InvalidInputError
    from klfast.loading import load_model, load_tokenizer

    session.prepare(threads, device)
    tokenizer = load_tokenizer(model, **loading)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], dtype=torch.int64)
    if ids.numel() == 0:
        raise InvalidInputError("the prompt has no tokens; give some text")
    network = load_model(model, dtype, device=device, **loading)
    stream = session.Stream(tokenizer, prompt, ids[0].tolist(), show=not as_json)
    klfast.generate(
        network, ids.to(device), max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, eos_token_id=tokenizer.eos_token_id,
        generator=torch.Generator(device).manual_seed(seed), callback=stream,
    )
    emit({"model": model, "prompt": prompt, "text": stream.text, "token_ids": stream.ids}, stream.rest(), as_json)
