"""Inspection of a model's folder before loading: its weight files, or the reason why there is nothing to load."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError, safe_open

from klfast.checkpoint.json_files import is_pointer
from klfast.checkpoint.loading_errors import NEEDS_CODE
from klfast.core.errors import CheckpointError, shortened
from klfast.core.io import parse_json

MAMBA_SSM_WEIGHTS = "pytorch_model.bin"
SINGLE, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
POINTER = "it is a pointer of git-lfs, not the file itself; run `git lfs pull` in the folder or fetch it again"
# Weight files that klfast does not read from a folder, by the end of their name: a description and a remedy.
_FOREIGN = {
    (".gguf",): "a GGUF file; name the file itself instead of its folder",
    (".bin", ".pt", ".pth", ".ckpt", ".pkl"): (
        "a pickle; klfast never unpickles, so convert it with transformers "
        "(AutoModelForCausalLM.from_pretrained, then save_pretrained)"
    ),
    (".h5", ".msgpack", ".onnx", ".npz"): "weights of another framework; fetch the model's safetensors files",
}
_OWN_PICKLES = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt")


def require_model(folder: Path) -> None:
    """Raise CheckpointError, with advice, unless a folder looks like a transformers model."""
    names = sorted(os.listdir(folder))
    if ADAPTER in names:
        raise CheckpointError(
            f"{folder} holds an adapter ({ADAPTER}), not a whole model; "
            "merge it into its base model (peft: merge_and_unload) and save that"
        )
    for name in names:  # reading a pipe or device would never end
        path = folder / name
        if path.exists() and not path.is_file() and not path.is_dir():
            raise CheckpointError(f"{path} is a pipe, socket or device, not a regular file; remove it")
        if path.suffix in (".json", ".safetensors", ".model") and is_pointer(path):
            raise CheckpointError(f"cannot load {path}: {POINTER}")
    if "config.json" not in names:
        advice = next(
            (f"its {name} is {what}" for name in names if (what := foreign(name))),
            "give the folder of a transformers model",
        )
        if "params.json" in names:
            advice = "it is in its makers' own format, so fetch the version for transformers"
        raise CheckpointError(f"{folder} has no config.json; {advice}")
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder / 'config.json'} is not a file, or is a broken link; fetch or save the model again"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of config.json."""
    path = folder / "config.json"
    try:
        config = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a valid configuration ({shortened(str(error), 200)}); fetch or save the model again"
        ) from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a valid configuration (not a JSON object); fetch or save the model again")
    return config


def is_mamba_ssm(config: Mapping[str, Any]) -> bool:
    """Return True if a configuration is one of the package mamba_ssm."""
    return not {"model_type", "auto_map"} & config.keys() and {"d_model", "n_layer"} <= config.keys()


def require_known(config: Mapping[str, Any], source: str) -> None:
    """Raise CheckpointError unless transformers itself has a causal language model for a configuration."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    def refuse(reason: str) -> NoReturn:
        raise CheckpointError(f"cannot load the model of {source}: {reason}")

    kind = config.get("model_type")
    if "auto_map" in config and (not isinstance(kind, str) or kind not in CONFIG_MAPPING):
        refuse(NEEDS_CODE)
    if not isinstance(kind, str):
        refuse("its config.json has no model_type; fetch or save it again")
    if kind not in CONFIG_MAPPING:
        refuse(f"this version of transformers does not know its architecture {shortened(kind, 80)!r}; a newer one may")
    configured = CONFIG_MAPPING[kind]
    if configured not in MODEL_FOR_CAUSAL_LM_MAPPING:
        refuse(f"{kind} is not a causal language model")
    if configured in MODEL_FOR_MASKED_LM_MAPPING and hasattr(configured, "is_decoder") and not config.get("is_decoder"):
        refuse(f"{kind} reads text in both directions, so it is not a causal language model")


def weight_names(folder: Path) -> list[str]:
    """Return the names of the weight files: model.safetensors, or else the files in its index.

    Raises:
        CheckpointError: the index is damaged, empty, or lists anything but safetensors files of the folder.
    """
    path = folder / INDEX
    if (folder / SINGLE).is_file() or not path.is_file():
        return [SINGLE]
    try:
        index: Any = parse_json(path.read_bytes())
        listed = set(index["weight_map"].values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a valid index ({type(error).__name__}); fetch it again") from None
    for name in listed:
        if (
            not isinstance(name, str)
            or not name.endswith(".safetensors")
            or name != os.path.basename(name)
            or "\\" in name
            or "\0" in name
        ):
            listing = f"{path} lists {shortened(repr(name), 80)}"
            raise CheckpointError(
                f"{listing}, which is not the name of a safetensors file in this folder; klfast reads nothing else"
            )
    if not listed:
        raise CheckpointError(f"{path} lists no files; fetch it again")
    return sorted(listed)


def read_headers(folder: Path) -> dict[str, tuple[Path, str]]:
    """Return file and stored dtype (in safetensors' terms) of each tensor in the weight files.

    Raises:
        CheckpointError: a file is missing, truncated or a pointer; or there are no weights that klfast reads.
    """
    tensors: dict[str, tuple[Path, str]] = {}
    for name in weight_names(folder):
        path = folder / name
        if not path.is_file():
            raise CheckpointError(_missing(folder, name))
        try:
            with safe_open(path, framework="pt") as opened:
                keys: list[str] = list(opened.keys())
                tensors.update((key, (path, opened.get_slice(key).get_dtype())) for key in keys)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is damaged ({shortened(str(error), 200)}); fetch or save it again"
            ) from error
    return tensors


def check_explicit_file(config: Mapping[str, Any], folder: Path) -> None:
    """Raise CheckpointError if config.json names a weight file: transformers would read it, even if it is a pickle."""
    if (name := config.get("transformers_weights")) is not None:
        entry = f"transformers_weights, {shortened(repr(name), 80)}"
        raise CheckpointError(
            f"{folder / 'config.json'} names a weight file ({entry}); call that file {SINGLE} and remove the entry"
        )


def _missing(folder: Path, name: str) -> str:
    """Return why a weight file is missing, and a remedy."""
    names = sorted(os.listdir(folder))
    if name in names:
        return f"{folder / name} is not a file, or is a broken link; fetch it again"
    if name != SINGLE:
        return f"{folder} lacks {name}, which {INDEX} lists; fetch it again"
    if others := [other for other in names if other.endswith(".safetensors")]:
        if any(other.startswith("model-") for other in others):
            return f"{folder} lacks {INDEX}, which lists what its {len(others)} safetensors files hold; fetch it again"
        return f"{folder} has no {SINGLE}, only {others[0]}; fetch the files for transformers"
    for other in names:
        if other not in _OWN_PICKLES and (what := foreign(other)):
            return f"{folder} has no {SINGLE}; its {other} is {what}"
    return f"{folder} has no weights: {SINGLE} is missing; fetch it again"


def foreign(name: str) -> str | None:
    """Return the description and remedy of a weight file that klfast does not read from a folder; None for others."""
    return next((what for ends, what in _FOREIGN.items() if name.endswith(ends) and name not in _OWN_PICKLES), None)
