"""A sweep's inputs: calibration windows, specs and layers, checked and put in order."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from klfast.core.errors import InvalidInputError
from klfast.models import batches
from klfast.models.batches import Batches
from klfast.models.head import linear_head
from klfast.models.matrices import matrices, with_experts
from klfast.models.selection import Patterns, select
from klfast.models.vocabulary import embedding_name
from klfast.nn import QuantEmbedding
from klfast.quant.spec import QuantSpec
from klfast.sensitivity.differences import why_not
from klfast.sensitivity.results import METRICS
from klfast.sensitivity.sampled_vocabulary import FEWEST_ROWS, ROWS

_QUANTIZED = "is quantized already; sweep the full-precision model"


def vocabulary(model: nn.Module) -> int:
    """Return the number of token ids that the model embeds."""
    get_embedding: Callable[[], object] | None = getattr(model, "get_input_embeddings", None)
    embedding = None if get_embedding is None else get_embedding()
    if isinstance(embedding, QuantEmbedding):
        raise InvalidInputError(f"{embedding_name(model)} {_QUANTIZED}")
    if not isinstance(embedding, nn.Embedding):
        raise InvalidInputError(f"{type(model).__name__} has no input embedding; klfast sweeps causal language models")
    return embedding.num_embeddings


def vocabulary_rows(given: str | int, vocab: int) -> int | None:
    """Return how many of ``vocab`` entries a token a sweep compares; None for all of them."""
    if isinstance(given, int) and not isinstance(given, bool) and given >= FEWEST_ROWS:
        rows = given
    elif given in ("full", "sampled"):
        rows = vocab if given == "full" else ROWS
    else:
        raise InvalidInputError(
            f'vocabulary must be "full", "sampled" or a number of entries from {FEWEST_ROWS} on, got {given!r}'
        )
    return rows if rows < vocab else None


def suffix(given: str | None, model: nn.Module, dtype: torch.dtype | None, *, is_sampled: bool) -> str:
    """Return "exact" or "int8", as a sweep's ``suffix`` says or by what the model and this CPU allow."""
    if given not in (None, "exact", "int8"):
        raise InvalidInputError(f'suffix must be "exact" or "int8", got {given!r}')
    weight = linear_head(model).weight
    computed = weight.dtype if dtype is None or weight.dtype.itemsize >= dtype.itemsize else dtype
    reason = why_not(weight.device, computed)
    if given == "int8" and reason:
        raise InvalidInputError(f'suffix="int8" would save no time: {reason}')
    return given or ("int8" if is_sampled and not reason else "exact")


def is_adaptive(budget: str, max_bytes: int | None, beside: bool) -> bool:
    """Return True if a sweep's budget is "adaptive"; ``beside``: more than whole weights are to be measured."""
    if budget not in ("exhaustive", "adaptive"):
        raise InvalidInputError(f'budget must be "exhaustive" or "adaptive", got {budget!r}')
    if budget == "adaptive":
        if beside:
            raise InvalidInputError(
                'rows, activations and corrected need budget="exhaustive"; an adaptive sweep measures whole weights'
            )
        if max_bytes is not None and max_bytes <= 0:
            raise InvalidInputError(f"max_bytes must be positive, got {max_bytes}")
    elif max_bytes is not None:
        raise InvalidInputError('max_bytes needs budget="adaptive"; klfast.plan takes it after an exhaustive sweep')
    return budget == "adaptive"


def check_engine(engine: str, workers: int | None) -> None:
    """Raise InvalidInputError for an unknown engine, or a number of workers that it does not take."""
    if engine not in ("local", "ray"):
        raise InvalidInputError(f'engine must be "local" or "ray", got {engine!r}')
    if workers is not None and engine != "ray":
        raise InvalidInputError('workers needs engine="ray"')
    if workers is not None and workers < 1:
        raise InvalidInputError(f"workers must be at least 1, got {workers}")


def micro_batches(given: Batches, vocab: int, max_tokens: int, parts: int = 1) -> list[torch.Tensor]:
    """Return all windows as int64 [B, T] of at most ``max_tokens`` tokens each (but at least one window).

    They are at least ``parts`` if there are so many windows.

    They keep their order unless some are padded or ragged: then shorter ones come first, so that all windows of one
    length run together.
    """
    read = batches.read(given, vocab)
    windows = [row for batch in read for row in batch.rows]
    if any(batch.is_ragged for batch in read):
        windows.sort(key=len)
    max_tokens = min(max_tokens, sum(map(len, windows)) // parts)
    found: list[list[torch.Tensor]] = []
    for window in windows:
        room = found and found[-1][0].shape == window.shape and (len(found[-1]) + 1) * len(window) <= max_tokens
        if room:
            found[-1].append(window)
        else:
            found.append([window])
    return [torch.stack(group) for group in found]


def digest(micro_batches: Sequence[torch.Tensor]) -> str:
    """Return the SHA-256 of all windows, in the order in which they are measured; they hold no pads."""
    sha = hashlib.sha256()
    for ids in micro_batches:
        for window in ids.cpu():
            sha.update(f"{len(window)} ".encode())
            sha.update(window.contiguous().numpy().tobytes())
    return sha.hexdigest()


def parse_specs(specs: QuantSpec | str | Sequence[QuantSpec | str]) -> list[QuantSpec]:
    """Return the specs, given as such or by name, without duplicates."""
    listed = specs if isinstance(specs, Iterable) and not isinstance(specs, str) else [specs]
    found = [QuantSpec.parse(spec) if isinstance(spec, str) else spec for spec in listed]
    if not found:
        raise InvalidInputError("there are no specs to sweep; give for example specs=('int4-g64-sym',)")
    if wrong := [spec for spec in found if not isinstance(spec, QuantSpec)]:
        raise InvalidInputError(f"specs must be QuantSpecs or their names, got {type(wrong[0]).__name__}")
    return list(dict.fromkeys(found))


def uses(corrected: str | Iterable[str]) -> list[str]:
    """Return the names of the uses of rows to be corrected, without duplicates."""
    if not isinstance(corrected, Iterable):
        raise InvalidInputError(f"corrected must be names of uses of rows, got {type(corrected).__name__}")
    return list(dict.fromkeys([corrected] if isinstance(corrected, str) else corrected))


def choose_layers(
    model: nn.Module, layers: Patterns | None, exclude: Patterns | None, experts: bool = False
) -> list[str]:
    """Return the names of the linear layers to sweep, in module order; with ``experts``, those of single experts.

    ``klfast.models.selection.matching`` explains the patterns.
    """
    found = matrices(model)
    if quantized := [name for name, one in found.items() if one.is_quantized]:
        raise InvalidInputError(f"{quantized[0]} {_QUANTIZED}")
    for name, patterns in (("layers", layers), ("exclude", exclude)):
        if patterns is not None and not isinstance(patterns, Iterable):
            raise InvalidInputError(f"{name} must be names or patterns, got {type(patterns).__name__}")
    if layers is not None and not isinstance(layers, str):
        layers = list(layers)
        if not layers:
            raise InvalidInputError("layers is empty; name at least one linear layer, or pass None for all")
    return select(with_experts(found) if experts else found, layers, exclude)


def choose_metrics(metrics: Iterable[str] | None, available: Sequence[str]) -> list[str]:
    """Return the metrics to report, checked, in the order of ``METRICS``; None stands for all that are available.

    kl_teacher_student is always one of them.
    """
    if metrics is None:
        return list(available)
    if not isinstance(metrics, Iterable):
        raise InvalidInputError(
            f"metrics must be names, got {type(metrics).__name__}; choose from {', '.join(available)}"
        )
    wanted = [metrics] if isinstance(metrics, str) else list(metrics)
    if unknown := [name for name in wanted if name not in METRICS]:
        raise InvalidInputError(f"there is no metric {unknown[0]!r}; choose from {', '.join(available)}")
    if missing := [name for name in wanted if name not in available]:
        raise InvalidInputError(
            f'{missing[0]} needs vocabulary="full" and budget="exhaustive"; others give {" and ".join(available)}'
        )
    return [name for name in METRICS if name == METRICS[0] or name in wanted]


def refuse_damaged(names: Iterable[str], norms: Iterable[float]) -> None:
    """Raise if the norm of a weight is not finite: neither a sweep nor its files support that.

    ``names`` are those of linear layers and of whole stacks of experts.
    """
    for name, norm in zip(names, norms, strict=True):
        if not math.isfinite(norm):
            raise InvalidInputError(
                f"the weight of {name} holds a NaN, an infinity or numbers too large to add up; "
                "repair the checkpoint before sweeping it"
            )
