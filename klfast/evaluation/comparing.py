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
Metrics = dict[str, npt.NDArray[np.float32]]
Integers = npt.NDArray[np.integer]
_ALL = slice(None)
_OF_PARTS = (KLD, SAME_TOP, LOG_PPL_RATIO)


def compare(teacher: nn.Module, model: nn.Module, batches: Batches, *, progress: Progress = False) -> Comparison:
    """Measure how a model's next-token predictions differ from a teacher's: the KL card of any two models.

    Both read the text side by side, a few rows at a time. Full logits are never made: memory scales with a batch's
    hidden states, [B, T, H], and by 36 bytes for each token of the text, from which exact quantiles are taken, at the
    end about 90. A long window is read as a whole.

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
        self._metrics: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in METRICS}
        self._places: dict[str, list[Integers]] = {"window": [], "position": [], "id": []}  # int32
        self._windows = 0

    def take(self, ids: torch.Tensor, metrics: torch.Tensor) -> None:
        rows, length = metrics.shape[1:]
        window = np.arange(self._windows, self._windows + rows, dtype=np.int32)
        self._places["window"].append(window.repeat(length))
        self._places["position"].append(np.tile(np.arange(1, length + 1, dtype=np.int32), rows))
        self._places["id"].append(ids[:, 1:].cpu().flatten().numpy().astype(np.int32))
        for name, values in zip(METRICS, metrics, strict=True):
            self._metrics[name].append(values.flatten().numpy().astype(np.float32))
        self._windows += rows

    def comparison(self) -> Comparison:
        """Return the figures. The tokens are given up, so that none is in memory twice."""
        metrics = {name: np.concatenate(self._metrics.pop(name)) for name in METRICS}
        require_finite(all(np.isfinite(values).all() for values in metrics.values()))
        occurrences = _occurrences(np.concatenate(self._places.pop("id")))
        window, position = (np.concatenate(self._places.pop(name)) for name in ("window", "position"))
        return Comparison(
            len(window),
            self._windows,
            _figures(metrics, Windows(window)),
            _parts(metrics, window, position, _ends(64, 2, int(position.max()))),
            _parts(metrics, window, occurrences, _ends(1, 4, 1024)),
            {"klfast": __version__, "torch": torch.__version__},
        )


def _occurrences(ids: Integers) -> Integers:
    """Return how often the id of each of them is there, int32."""
    _, kind, counts = np.unique(ids, return_inverse=True, return_counts=True)
    return counts.astype(np.int32)[kind]


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
            figures = _means(metrics, Windows(window[chosen]), chosen)
            found.append(Part(first + 1, last, int(chosen.sum()), {name: figures[name] for name in _OF_PARTS}))
    return tuple(found)


def _figures(metrics: Metrics, windows: Windows) -> dict[str, Estimate]:
    means, kl = _means(metrics, windows), metrics["kl"].astype(np.float64)
    return {
        KLD: means.pop(KLD),
        **{name: windows.quantile(kl, share) for name, share in _QUANTILES.items()},
        "Maximum KLD": Estimate(float(kl.max())),
        **means,
    }


def _means(metrics: Metrics, windows: Windows, chosen: npt.NDArray[np.bool_] | slice = _ALL) -> dict[str, Estimate]:
    def exact(name: str) -> Values:
        return metrics[name][chosen].astype(np.float64)  # one at a time: all six would take more memory than all else

    divergences = {
        KLD: windows.mean(exact("kl"), least=0),
        "Mean reverse KLD": windows.mean(exact("kl_student_teacher"), least=0),
        "Mean JSD": windows.mean(exact("jsd"), least=0, most=math.log(2)),
        SAME_TOP: windows.mean(exact("top1"), least=0, most=1),
    }
    nll, base = exact("nll"), exact("teacher_nll")
    change = np.exp(-nll) - np.exp(-base)
    return {
        **divergences,
        "Mean Δp": windows.mean(change, least=-1, most=1),
        "RMS Δp": windows.mean(change**2, least=0, most=1).through(math.sqrt),
        "Mean PPL(Q)": windows.mean(nll, least=0).through(perplexity),
        "Mean PPL(base)": windows.mean(base, least=0).through(perplexity),
        LOG_PPL_RATIO: windows.mean(nll - base),
    }
