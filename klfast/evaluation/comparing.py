"""``klfast.compare``: the KL card of two models."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from klfast import __version__
from klfast.core.progress import Progress
from klfast.evaluation.comparison import KLD, LOG_PPL_RATIO, SAME_TOP, Comparison, Part
from klfast.evaluation.quality import perplexity
from klfast.evaluation.side_by_side import METRICS, measure, require_finite
from klfast.evaluation.windowed import Estimate, Values, Windows
from klfast.models.batches import Batches

_QUANTILES = {"Median KLD": 0.5, "90.0% KLD": 0.9, "99.0% KLD": 0.99, "99.9% KLD": 0.999}
Metrics = dict[str, Values]
Integers = npt.NDArray[np.integer]
_OF_PARTS = (KLD, SAME_TOP, LOG_PPL_RATIO)


def compare(teacher: nn.Module, model: nn.Module, batches: Batches, *, progress: Progress = False) -> Comparison:
    """Measure how a model's next-token predictions differ from a teacher's: the KL card of any two models.

    Both read the text side by side, a few rows at a time. Full logits are never made: memory scales with a batch's
    hidden states, [B, T, H], and by 36 bytes for each token of the text, from which exact quantiles are taken. A long
    window is read as a whole.

    llama-perplexity, whose names the figures have, counts only the second half of each window; here all tokens count.

    Args:
        teacher: the model to compare with (base): a causal language model (transformers), quantized or not.
        model: the model to judge (Q), with the same vocabulary and tokenizer, on the same device.
        batches: as for ``klfast.evaluate``. Intervals need several windows, the more the better.
        progress: as for ``klfast.evaluate``.

    Raises:
        InvalidInputError: as ``klfast.evaluate``.
    """
    tokens = _Tokens()
    measure(model, teacher, batches, tokens.take, progress, "compare")
    return tokens.comparison()


class _Tokens:
    """The metrics of all tokens so far, with the window, position and id of each."""

    def __init__(self) -> None:
        self._metrics: list[torch.Tensor] = []  # float32 [6, n]
        self._places: list[torch.Tensor] = []  # int32 [3, n]: window, tokens before, id
        self._windows = 0

    def take(self, ids: torch.Tensor, metrics: torch.Tensor) -> None:
        rows, length = metrics.shape[1:]
        window = torch.arange(self._windows, self._windows + rows).unsqueeze(1).expand(rows, length)
        position = torch.arange(1, length + 1).expand(rows, length)
        self._metrics.append(metrics.float().flatten(1))
        self._places.append(torch.stack((window, position, ids[:, 1:].cpu())).int().flatten(1))
        self._windows += rows

    def comparison(self) -> Comparison:
        metrics = dict(zip(METRICS, torch.cat(self._metrics, 1).double().numpy(), strict=True))
        require_finite(all(np.isfinite(values).all() for values in metrics.values()))
        window, position, ids = torch.cat(self._places, 1).numpy()
        _, kind, counts = np.unique(ids, return_inverse=True, return_counts=True)

        return Comparison(
            len(window),
            self._windows,
            _figures(metrics, Windows(window)),
            _parts(metrics, window, position, _ends(64, 2, int(position.max()))),
            _parts(metrics, window, counts[kind], _ends(1, 4, 1024)),
            {"klfast": __version__, "torch": torch.__version__},
        )


def _ends(first: int, factor: int, most: int) -> list[int]:
    """Return first, first * factor, ..., up to the first end that is not below ``most``."""
    ends = [first]
    while ends[-1] < most:
        ends.append(ends[-1] * factor)
    return ends


def _parts(metrics: Metrics, window: Integers, numbers: Integers, ends: Sequence[int]) -> tuple[Part, ...]:
    """Return the parts of the tokens whose number is at most the first end, the second ..., or above the last."""
    found = []
    for first, last in zip([0, *ends], [*ends, None], strict=True):
        chosen = (numbers > first) & (numbers <= (math.inf if last is None else last))
        if chosen.any():
            figures = _means({name: values[chosen] for name, values in metrics.items()}, Windows(window[chosen]))
            found.append(Part(first + 1, last, int(chosen.sum()), {name: figures[name] for name in _OF_PARTS}))
    return tuple(found)


def _figures(metrics: Metrics, windows: Windows) -> dict[str, Estimate]:
    kl, means = metrics["kl"], _means(metrics, windows)
    return {
        KLD: means.pop(KLD),
        **{name: windows.quantile(kl, share) for name, share in _QUANTILES.items()},
        "Maximum KLD": Estimate(float(kl.max())),
        **means,
    }


def _means(metrics: Metrics, windows: Windows) -> dict[str, Estimate]:
    nll, base = metrics["nll"], metrics["teacher_nll"]
    change = np.exp(-nll) - np.exp(-base)
    return {
        KLD: windows.mean(metrics["kl"], least=0),
        "Mean reverse KLD": windows.mean(metrics["kl_student_teacher"], least=0),
        "Mean JSD": windows.mean(metrics["jsd"], least=0, most=math.log(2)),
        SAME_TOP: windows.mean(metrics["top1"], least=0, most=1),
        "Mean Δp": windows.mean(change, least=-1, most=1),
        "RMS Δp": windows.mean(change**2, least=0, most=1).through(math.sqrt),
        "Mean PPL(Q)": windows.mean(nll, least=0).through(perplexity),
        "Mean PPL(base)": windows.mean(base, least=0).through(perplexity),
        LOG_PPL_RATIO: windows.mean(nll - base),
    }
