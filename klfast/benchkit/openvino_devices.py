"""Folders of ``klfast export --format openvino``, timed on OpenVINO's devices."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as op

from klfast.benchkit import openvino_core
from klfast.core.errors import InvalidInputError, one_line
from klfast.export.openvino.write import MODEL

_EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}
_ROUNDS = 3


@dataclass(frozen=True)
class Timed:
    """How a folder runs on a device.

    Attributes:
        folder: its name.
        device: OpenVINO's name, such as "GPU".
        megabytes: of the weights' file.
        error: why the device does not run it, a line; then the rest is 0.
        load_seconds: to compile it.
        first_seconds: from the prompt to its last token's logits, the least of some rounds.
        token_seconds: for each token after that, the median.
        same_tokens: greedy tokens until one differs from the CPU's in float32.
    """

    folder: str
    device: str
    megabytes: float
    error: str = ""
    load_seconds: float = 0.0
    first_seconds: float = 0.0
    token_seconds: float = 0.0
    same_tokens: int = 0


def require_devices(names: Sequence[str]) -> None:
    """Raise InvalidInputError for a device that OpenVINO does not find here."""
    there = openvino_core.core().available_devices
    known = {*there, *(name.split(".")[0] for name in there)}
    for name in names:
        if name not in known:
            raise InvalidInputError(f"OpenVINO finds no device {name!r} here, only {', '.join(there)}")


def require_folder(folder: Path) -> None:
    """Raise InvalidInputError for a folder that ``export_openvino`` did not write."""
    if not (folder / MODEL).is_file():
        raise InvalidInputError(f"{folder} holds no {MODEL}; make one with klfast export --format openvino")


def timed(folder: Path, devices: Sequence[str], prompt: int, tokens: int, threads: int | None = None) -> list[Timed]:
    """Time a folder on each device: a prompt of random tokens, and greedy tokens after it.

    Each device has OpenVINO's own settings for latency, and computes the logits of the last token alone. The NPU takes
    one token at a time.
    """
    size = (folder / MODEL).with_suffix(".bin").stat().st_size / 1e6
    on_cpu = {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
    exact = _Running(folder, "CPU", _EXACT | on_cpu)
    ids = np.random.default_rng(0).integers(0, exact.vocabulary, (1, prompt))
    truth = exact.write(ids, tokens).tokens
    found = []
    for device in devices:
        begin = time.perf_counter()
        try:
            running = _Running(folder, device, on_cpu if device == "CPU" else {})
            load = time.perf_counter() - begin
            rounds = [running.write(ids, tokens) for _ in range(_ROUNDS + 1)][1:]
        except RuntimeError as error:
            found.append(Timed(folder.name, device, size, one_line(error)))
            continue
        same = next((i for i, (a, b) in enumerate(zip(rounds[0].tokens, truth, strict=True)) if a != b), tokens)
        first = min(each.first for each in rounds)
        token = statistics.median(seconds for each in rounds for seconds in each.rest)
        found.append(Timed(folder.name, device, size, "", load, first, token, same))
    return found


@dataclass(frozen=True)
class _Written:
    tokens: list[int]
    first: float
    rest: list[float]


class _Running:
    """A folder's model on a device."""

    def __init__(self, folder: Path, device: str, settings: dict[str, Any]) -> None:
        core = openvino_core.core()
        model = core.read_model(folder / MODEL)
        self.vocabulary = model.output("logits").get_partial_shape()[2].get_length()
        _keep_last(model)
        self._one_by_one = device.startswith("NPU")
        if self._one_by_one:
            _make_static(model)
        compiled = core.compile_model(model, device, {"PERFORMANCE_HINT": "LATENCY", **settings})
        self._request = compiled.create_infer_request()

    def write(self, prompt: np.ndarray, tokens: int) -> _Written:
        """Feed a prompt [1, T] and greedy tokens after it, with the seconds that each took."""
        self._request.reset_state()
        begin = time.perf_counter()
        parts = np.split(prompt, prompt.shape[1], 1) if self._one_by_one else [prompt]
        chosen = [self._next(part) for part in parts][-1:]
        first = time.perf_counter() - begin
        rest = []
        while len(chosen) < tokens:
            begin = time.perf_counter()
            chosen.append(self._next(np.array([chosen[-1:]])))
            rest.append(time.perf_counter() - begin)
        return _Written(chosen, first, rest)

    def _next(self, ids: np.ndarray) -> int:
        ones, beams = np.ones((1, 1), np.int64), np.zeros(1, np.int32)
        found = self._request.infer({"input_ids": ids, "attention_mask": ones, "beam_idx": beams})
        return int(found["logits"][0, -1].argmax())


def _keep_last(model: ov.Model) -> None:
    """Let the head multiply the last token alone, as openvino.genai does."""
    node = model.output("logits").get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    rows = node.input(0)
    rows.replace_source_output(op.slice(rows.get_source_output(), [-1], [2**31 - 1], [1], [1]).output(0))
    model.validate_nodes_and_infer_types()


def _make_static(model: ov.Model) -> None:
    """Give a model one text and one token a call."""
    one = ov.PartialShape([1, 1])
    variables = {}
    for sink in model.get_sinks():
        shape = sink.get_output_partial_shape(0)
        variables[sink.get_variable_id()] = ov.PartialShape([1, *list(shape)[1:]])
    model.reshape({"input_ids": one, "attention_mask": one, "beam_idx": ov.PartialShape([1])}, variables)
