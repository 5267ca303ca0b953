"""A model as a folder for OpenVINO."""

from __future__ import annotations

import copy
import errno
import os
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from klfast.checkpoint.save import require_target, save_settings, save_tokenizer
from klfast.core.errors import InvalidInputError, one_line
from klfast.core.io import folder_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL = "openvino_model.xml"  # as optimum-intel and openvino.genai name it


@dataclass(frozen=True)
class Written:
    """What a folder holds.

    Attributes:
        kinds: how many quantized layers have codes of each type, such as "i4".
        notes: what differs from the model, a sentence each.
    """

    kinds: dict[str, int]
    notes: tuple[str, ...]


def export_openvino(
    model: nn.Module,
    directory: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    overwrite: bool = False,
) -> Written:
    """Write a model as a folder with OpenVINO's IR, quantized layers with their own codes.

    The folder has openvino_model.xml and .bin, config.json, generation_config.json and the tokenizer's files, and
    appears under its name only when it is complete. The graph keeps its state (keys, values, states of recurrent
    layers) in variables; ``reset_state()`` of a request begins a new text. Batches and texts have any size, without
    padding.

    Codes are constants of 4 or 8 bits; scales are float16 where these are the same numbers, else float32. Other weights
    keep their 16 or 32 bits. Nothing is rounded again, but rows whose groups do not divide them and share no length of
    at least 4 with them become float16.

    Args:
        model: a causal language model that ``klfast.lower`` takes, on the CPU.
        directory: the folder to create; its parent must exist.
        tokenizer: of transformers.
        overwrite: replace the folder if ``export_openvino`` wrote it.

    Raises:
        InvalidInputError: the package openvino is missing, the folder exists, or klfast cannot write the model.
        OSError: the folder cannot be written. Nothing is left behind.
    """
    require_package()
    require_free(directory, overwrite)
    import openvino as ov

    from klfast.export.openvino.graph import graph_of

    graph = graph_of(model)
    described: Any = model
    config = copy.deepcopy(described.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with folder_atomic(directory) as folder:
        try:
            ov.save_model(graph.model, folder / MODEL, compress_to_fp16=False)
        except RuntimeError as error:  # the error of the system is not in it
            raise OSError(errno.EIO, f"OpenVINO cannot write ({one_line(error)})", str(folder / MODEL)) from error
        save_settings(config, "config", folder)
        if described.generation_config is not None:
            save_settings(described.generation_config, "generation_config", folder)
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder)
    dense = [name for name, kind in graph.kinds.items() if kind == "float16"]
    notes = [f"{name} is float16, since its groups do not divide its rows" for name in dense]
    return Written(dict(Counter(graph.kinds.values())), tuple(notes))


def require_package() -> None:
    """Raise InvalidInputError if the package openvino is missing, or so old (2026.2) that it crashes in some graphs."""
    try:
        import openvino
    except ImportError:
        raise InvalidInputError(
            "OpenVINO models need the package openvino, which is not installed: pip install 'klfast[openvino]'"
        ) from None
    version = openvino.__version__.split("-")[0]
    if tuple(map(int, version.split(".")[:2])) < (2026, 3):
        raise InvalidInputError(f"OpenVINO {version} is too old, 2026.3 is needed: pip install -U 'klfast[openvino]'")


def require_free(directory: str | os.PathLike[str], overwrite: bool) -> None:
    """Raise, before the work begins, unless the folder can be created, or replaced as ``overwrite`` allows."""
    require_target(directory, overwrite, writer="export_openvino", mark=MODEL)
