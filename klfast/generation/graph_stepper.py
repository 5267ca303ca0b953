"""Decode steps on a GPU as a graph: Python takes longer to launch a step's kernels than a GPU to run them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import nn

from klfast.core.device_graphs import NoHostReads, Recorder, recorder_of
from klfast.core.errors import CannotLowerError, one_line
from klfast.core.torch_internals import has_global_hooks
from klfast.generation.fixed_cache import fixed_cache
from klfast.generation.stepper import Stepper
from klfast.nn.untouched import why_touched

LEAST = 16  # new tokens of a text for which recording pays

_last: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def how_steps_ran(model: nn.Module) -> str:
    """Return how the decode steps of the last long text on a GPU ran, a clause; empty if there was none."""
    return _last.get(model, "")


def with_graph(
    step: Callable[[torch.Tensor], torch.Tensor], model: nn.Module, ids: torch.Tensor, new_tokens: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return ``step``, or what does the same with a graph where torch has graphs for the device of ``ids``.

    Args:
        step: steps over a batch that begins with ``ids``, from the beginning.
        model: what it runs.
        ids: int64 [B, T].
        new_tokens: the most that follow; there will be room for all of them.
    """
    recorder = recorder_of(ids.device)
    if recorder is None or new_tokens < LEAST:
        return step
    if isinstance(step, Stepper):
        if not (reason := _why_not(step)):
            return GraphStepper(step, recorder, ids.shape[1] + new_tokens)
    else:
        reason = "its rows are continued one by one"
    _last[model] = _one_by_one(reason)
    return step


def _why_not(step: Stepper) -> str:
    if step.is_padded:
        return "the prompts are padded"
    if has_global_hooks():
        return "torch has hooks for all modules"
    touched = ((name, why_touched(module)) for name, module in step.model.named_modules())
    return next((f"{name or 'the model'} {reason}" for name, reason in touched if reason), "")


def _one_by_one(reason: str) -> str:
    return f"launched one by one: {reason}"


class GraphStepper:
    """Feeds tokens to a model on a GPU, in steps that a graph replays once it has shown that it can.

    A graph repeats a step's kernels at the same addresses, with the same numbers from Python. Each text records anew,
    for its number of rows and for the model as it is then. See ``_rehearsal``.

    Args:
        stepper: without padding, before its first tokens.
        recorder: of the model's device.
        capacity: most tokens of a sequence, those of the prompt included.
    """

    def __init__(self, stepper: Stepper, recorder: Recorder, capacity: int) -> None:
        self._model = stepper.model
        self._step: Callable[[torch.Tensor], torch.Tensor] = stepper
        self._rehearsal: Generator[None, Any, FixedStep] | None = _rehearsal(stepper, recorder, capacity)
        next(self._rehearsal)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Feed int64 [B, T] ids, T = 1 after the first; return the next token's logits, float32 [B, V].

        A later call may overwrite them.
        """
        logits = self._step(ids)
        if self._rehearsal is not None:
            self._rehearse(self._rehearsal, ids, logits)
        return logits

    def _rehearse(self, rehearsal: Generator[None, Any, FixedStep], ids: torch.Tensor, logits: torch.Tensor) -> None:
        try:
            rehearsal.send((ids, logits))
            return
        except StopIteration as end:
            self._step, how = end.value, "replayed as a graph"
        except CannotLowerError as error:
            how = _one_by_one(str(error))
        except Exception as error:  # noqa: BLE001 (whatever a model's own code raises there, the stepper goes on)
            how = _one_by_one(one_line(error))
        self._rehearsal, _last[self._model] = None, how


def _rehearsal(
    stepper: Stepper, recorder: Recorder, capacity: int
) -> Generator[None, tuple[torch.Tensor, torch.Tensor], FixedStep]:
    """Take each step's ids and the stepper's logits; return a step that a graph replays.

    Steps are computed at fixed addresses, too: the first compiles kernels, the second shows what the host reads, the
    third is recorded. Its replay is the step that was recorded, with whatever Python counted; only the fourth shows
    whether that was all in tensors.

    Raises:
        CannotLowerError: a graph cannot run the model; the message is a clause that says why.
    """
    ids, _ = yield
    step = FixedStep(stepper, ids, capacity)
    for watch in (nullcontext(), NoHostReads()):
        ids, _ = yield
        with recorder.aside(), watch:
            step(ids)
    ids, _ = yield
    step.record(recorder)
    step(ids)
    ids, expected = yield
    if not _agree(step(ids), expected, stepper):
        raise CannotLowerError("a replayed step gives other logits")
    return step


def _agree(found: torch.Tensor, expected: torch.Tensor, stepper: Stepper) -> bool:
    """Return whether logits differ by rounding alone: once a layer in the model's dtype, as random numbers add up."""
    dtype = next(p.dtype for p in stepper.model.parameters() if p.is_floating_point())
    depth = len(cast(Any, stepper.cache).layers)
    allowed = max(1e-3, torch.finfo(dtype).eps * depth**0.5)
    return bool((found - expected).norm() <= allowed * expected.norm())


class FixedStep:
    """A step of one token a sequence, at fixed addresses.

    Args:
        stepper: has fed the tokens before.
        ids: those tokens, int64 [B, T].
        capacity: most tokens of a sequence, these included.
    """

    def __init__(self, stepper: Stepper, ids: torch.Tensor, capacity: int) -> None:
        self._forward, self._cache = stepper.forward, fixed_cache(stepper.cache, capacity)
        self._ids, self._logits = ids[:, -1:].clone(), torch.empty(0)
        self._positions = None if stepper.positions is None else stepper.positions[:, -1:] + 1
        self._run: Callable[[], None] = self._compute

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Feed int64 [B, 1] ids; return the next token's logits, float32 [B, V], which the next call overwrites."""
        self._ids.copy_(ids)
        self._run()
        return self._logits

    def record(self, recorder: Recorder) -> None:
        """Have a graph run the steps from here on."""
        self._run = recorder.record(self._compute)

    def _compute(self) -> None:
        options = {} if self._positions is None else {"position_ids": self._positions}
        self._logits = self._forward(self._ids, self._cache, **options).logits[:, -1].float()
        if self._positions is not None:
            self._positions.add_(1)
