"""Models and tokenizers by name: a bundled model, a local folder or a hub id. Nothing is ever unpickled."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from klfast.checkpoint_format import MANIFEST, read_generation_config, read_manifest
from klfast.device import facts
from klfast.errors import CheckpointError, InvalidInputError
from klfast.files import parse_json
from klfast.models.native_ssm import accelerate_or_warn

ASSETS = Path(__file__).parent / "assets"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}


def as_dtype(name: str) -> torch.dtype | str:
    """The torch dtype of that name; "auto" stays "auto"."""
    if name not in DTYPES:
        raise InvalidInputError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def bundled_models() -> list[str]:
    """Names of the models that come with klfast."""
    folder = ASSETS / "models"
    return sorted(p.name for p in folder.iterdir() if (p / "config.json").is_file()) if folder.is_dir() else []


def load_model(
    name_or_path: str | os.PathLike,
    dtype: str = "float32",
    *,
    device: torch.device | str = "cpu",
    local_files_only: bool = False,
    trust_remote_code: bool = False,
) -> nn.Module:
    """A causal language model in evaluation mode, with klfast's native SSM functions (``klfast.accelerate``).

    Args:
        name_or_path: the name of a bundled model ("hymba", "mamba", "mamba2"; write "./mamba2" for a folder of that name), a
            local folder, or a hub id. A folder written by ``klfast.save_quantized`` gives the quantized model.
        dtype: "float32", "bfloat16", "float16", or "auto" for the stored one. The unquantized tensors of a quantized
            folder are cast likewise.
        device: where the model goes, such as "cpu", "cuda" or "xpu".
        local_files_only: take a hub id from the local cache only.
        trust_remote_code: run Python code that comes with the model. Only for sources that you trust.

    Raises:
        InvalidInputError: an unknown dtype or device, no such folder, an unknown architecture.
        KernelUnavailableError: PyTorch finds no such device.
        CheckpointError: a file is missing, truncated or does not fit the model, a weight is stored as integers, or the
            hub cannot be reached.
    """
    target = as_dtype(dtype)
    facts.require(_device(device).type)
    source = _resolve(name_or_path)
    if _is_quantized(source):
        from klfast.checkpoint import load_quantized

        return load_quantized(source, device, None if target == "auto" else target)

    from transformers import AutoModelForCausalLM, GenerationConfig

    import klfast.models.hymba  # noqa: F401  (makes it known to AutoConfig)

    with _one_line_errors(source, "model"):
        read_generation_config(Path(source), GenerationConfig)
        model, report = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=target,
            use_safetensors=True,
            local_files_only=local_files_only,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
        )
    _require_all_tensors(source, model, report)
    if getattr(model.config, "quantization_config", None) is None:  # other quantizers store integers by design
        _check_stored_dtypes(source, model)
    return accelerate_or_warn(model.eval().to(device))


def load_tokenizer(name_or_path: str | os.PathLike, *, local_files_only: bool = False, trust_remote_code: bool = False):
    """The tokenizer of a model; arguments and errors as for ``load_model``.

    In a folder of ``klfast.save_quantized``, every file but the weights is compared with its digest first.
    """
    from transformers import AutoTokenizer

    import klfast.models.hymba  # noqa: F401  (AutoTokenizer may ask AutoConfig)

    source = _resolve(name_or_path)
    if os.path.isdir(source) and not any((Path(source) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise CheckpointError(f"{source} holds no tokenizer; copy the model's tokenizer files into it or give token ids in a file")
    if (Path(source) / MANIFEST).is_file():
        read_manifest(Path(source), verify=True, weights=False)
    with _one_line_errors(source, "tokenizer"):
        return AutoTokenizer.from_pretrained(source, local_files_only=local_files_only, trust_remote_code=trust_remote_code)


def _device(name: torch.device | str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError:
        raise InvalidInputError(f"there is no device called {name!r}; write cpu, cuda or xpu") from None


def _require_all_tensors(source: str, model: nn.Module, report: dict) -> None:
    """Raise CheckpointError, naming a tensor, unless the files hold those of the model. transformers fills what they lack with random numbers."""
    if mismatched := sorted(report["mismatched_keys"]):
        name, found, expected = mismatched[0]
        raise CheckpointError(f"{source}: {name} must have shape {list(expected)}, got {list(found)}; fetch or save it again")
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"{source} lacks {len(missing)} of the model's tensors, such as {missing[0]}; fetch or save it again")
    unexpected = sorted(report["unexpected_keys"])
    if unexpected and type(model).__module__.startswith("klfast."):  # other families have files with harmless ones
        raise CheckpointError(f"{source} holds {len(unexpected)} tensors that the model does not have, such as {unexpected[0]}; fetch or save it again")


def _check_stored_dtypes(source: str, model: nn.Module) -> None:
    """Raise CheckpointError where a float tensor of the model is stored as integers: transformers casts those unasked."""
    from safetensors import safe_open

    prefix = f"{model.base_model_prefix}."
    floats = {name.removeprefix(prefix) for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for file in _weight_files(source, getattr(model.config, "_commit_hash", None)):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                stored = opened.get_slice(name).get_dtype()
                if name.removeprefix(prefix) in floats and stored not in ("F64", "F32", "BF16", "F16"):
                    raise CheckpointError(
                        f"{file} stores {name} as {stored}, where the model has floating-point numbers; fetch it again, or save the "
                        "model with float weights"
                    )


def _weight_files(source: str, commit: str | None) -> list[Path]:
    """The safetensors files that transformers has just read."""
    from huggingface_hub import try_to_load_from_cache

    def find(name: str) -> Path | None:
        path = Path(source, name) if os.path.isdir(source) else try_to_load_from_cache(source, name, revision=commit)
        return Path(path) if isinstance(path, (str, Path)) and Path(path).is_file() else None

    if single := find("model.safetensors"):
        return [single]
    index = find("model.safetensors.index.json")
    names = sorted(set(parse_json(index.read_bytes())["weight_map"].values())) if index else []
    return [path for name in names if (path := find(name))]


def _resolve(name_or_path: str | os.PathLike) -> str:
    """The folder or hub id that a name stands for."""
    name = os.fspath(name_or_path)
    if not name:
        raise InvalidInputError("the model's name is empty; give a folder, a hub id or a bundled name")
    if name in bundled_models():
        return str(ASSETS / "models" / name)
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, "config.json")):
            raise CheckpointError(f"{name} holds no config.json; give the folder of a transformers model")
        return path
    if os.path.exists(path):
        raise InvalidInputError(f"{name} is a file; give the folder of a transformers model")
    if name.startswith((".", "/", "~", os.sep)) or name.count("/") > 1 or "\\" in name or "/" not in name:
        hint = f"the bundled models are {', '.join(bundled_models()) or 'not installed'}; a hub id reads owner/name"
        raise InvalidInputError(f"there is no model folder {name!r} ({hint})")
    return name


def _is_quantized(source: str) -> bool:
    config = Path(source) / "config.json"
    if not config.is_file():
        return False
    try:
        quantization = parse_json(config.read_bytes()).get("quantization_config")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{config} is no valid configuration ({error}); fetch or save the model again") from None
    return isinstance(quantization, dict) and quantization.get("format") == "pack-quantized"


@contextmanager
def _one_line_errors(source: str, what: str) -> Iterator[None]:
    """transformers' own progress bars and reports off, its many-line errors turned into klfast's."""
    from huggingface_hub.utils import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
    from safetensors import SafetensorError
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except (CheckpointError, InvalidInputError):
        raise
    except SafetensorError as error:
        raise CheckpointError(f"a weight file of {source} is damaged ({error}); fetch or save it again") from error
    except Exception as error:  # the Rust side of tokenizers raises bare ones
        causes = {type(e) for e in _chain(error)}
        text = str(error)
        if causes & {GatedRepoError}:
            reason = "the hub grants access to it only after you accepted its terms and logged in"
        elif causes & {RepositoryNotFoundError}:
            reason = "the hub has no such model; check the id, or log in if it is private"
        elif causes & {LocalEntryNotFoundError} or "couldn't connect" in text:
            reason = "it is neither in the local cache nor can the hub be reached; give a local folder instead"
        elif "trust_remote_code" in text:
            reason = "it needs Python code of its own; if you trust its source, allow that with trust_remote_code (--trust-remote-code)"
        elif "does not recognize this architecture" in text:
            reason = "this version of transformers does not know its architecture"
        elif "Unrecognized configuration class" in text:
            reason = "it is no causal language model"
        elif "safetensors" in text:
            reason = "it has no model.safetensors; convert its weights to safetensors, since klfast never unpickles"
        elif damaged := _damaged_json(source):
            reason = f"{damaged} is no valid JSON; fetch or save it again"
        else:
            first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
            reason = f"{first.rstrip('.')}; fetch or save it again"
        raise CheckpointError(f"cannot load the {what} of {source}: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _damaged_json(source: str) -> str | None:
    """A JSON file of a local folder that cannot be read as such."""
    for path in sorted(Path(source).glob("*.json")) if os.path.isdir(source) else []:
        try:
            parse_json(path.read_bytes())
        except (OSError, ValueError):
            return path.name
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
