"""klfast lm-eval: benchmarks of lm-evaluation-harness, beside KL."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from klfast.cli import options
from klfast.cli.console import emit
from klfast.core.loading_options import LoadingOptions

_KEPT = ("results", "group_subtasks", "higher_is_better", "n-shot", "n-samples", "versions")  # as lm-eval names them


@options.loads_models
def lm_eval(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Local folders, GGUF files, hub ids or bundled models; the table has a row for each.",
            show_default=False,
        ),
    ],
    tasks: Annotated[
        str,
        typer.Option(
            metavar="NAME,NAME",
            help="Tasks, groups or tags of lm-evaluation-harness, wildcards (arc_*), or .yaml files.",
            show_default=False,
        ),
    ],
    include_path: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="A folder with tasks of your own.", show_default=False)
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples before each question; each task's own number by default.", min=0)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Questions of each task, from its start; all by default.", min=1)
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask by the model's chat template.")] = False,
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Show the KL divergence from this model on --text, too.")
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
    """Run tasks of lm-evaluation-harness on models, quantized or not, and show the results beside their KL."""
    import logging

    from klfast.checkpoint.by_name import load_model, load_tokenizer
    from klfast.cli import runtime
    from klfast.evaluation.harness import HarnessTasks
    from klfast.evaluation.quality import evaluate
    from klfast.models.sizes import total_bytes
    from klfast.reporting.harness_table import harness_table

    runtime.prepare(threads, device)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns about models that it did not load itself
    found = HarnessTasks([name for name in tasks.split(",") if name], include_path)
    other = None if teacher is None else load_model(teacher, dtype, device=device, gguf="exact", **loading)

    def measure(name: str) -> dict[str, Any]:
        tokenizer = load_tokenizer(name, **loading)
        network = load_model(name, dtype, device=device, gguf=gguf, **loading)
        made: dict[str, Any] = {"model": name, "bytes": total_bytes(network)}
        if other is not None:
            batches = runtime.open_batches(
                text, name, network, length=length, windows=windows, batch_size=batch_size, **loading
            )
            quality = evaluate(network, batches, other, progress=None)
            compared = ("perplexity", "kl", "kl_stderr", "top1_agreement")
            made |= {key: getattr(quality, key) for key in compared}
        results = found.run(network, tokenizer, batch_size=batch_size, few_shot=num_fewshot, limit=limit, chat=chat)
        return made | {key: results[key] for key in _KEPT if key in results}

    rows = [measure(name) for name in models]
    asked = {"tasks": found.names, "limit": limit, "teacher": teacher, "text": None if teacher is None else text}
    emit({**asked, "models": rows}, harness_table(rows).rich(), as_json)
