"""Loading of Mamba and Mamba-2 in the format of the package mamba_ssm, such as state-spaces/mamba-130m.

config.json has the fields of mamba_ssm's MambaConfig (mamba_ssm/models/config_mamba.py of version 2.2). Its ``ssm_cfg``
holds arguments of the mixers (modules/mamba_simple.py, modules/mamba2.py). The weights are a pickle, of which only
tensors are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import nn

from klfast.checkpoint.json_files import is_pointer
from klfast.checkpoint.load import filled
from klfast.checkpoint.model_config import check_config
from klfast.checkpoint.model_folder import MAMBA_SSM_WEIGHTS, POINTER
from klfast.checkpoint.tensors import Tensors, build_empty, buildable
from klfast.core.errors import CheckpointError, shortened

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_REMEDY = "fetch it again"
_EMBEDDING = "backbone.embeddings.weight"
_MODEL: dict[str, Any] = {  # defaults of MambaConfig
    "d_model": 2560,
    "n_layer": 64,
    "vocab_size": 50277,
    "ssm_cfg": {},
    "residual_in_fp32": True,
    "pad_vocab_size_multiple": 8,
    "tie_embeddings": True,
}
# What transformers' models cannot do: each must have this value, its default.
_MODEL_FIXED: dict[str, Any] = {"d_intermediate": 0, "attn_layer_idx": [], "rms_norm": True}
# These do not matter for inference.
_MODEL_IGNORED = {"attn_cfg", "fused_add_norm", "initializer_cfg", "architectures", "dtype", "torch_dtype"}
_MIXER_IGNORED = {"layer", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "A_init_range", "conv_init"}
_MIXER_IGNORED |= {"use_fast_path", "use_mem_eff_path"}


class _Mixer(NamedTuple):
    """The arguments of a mixer.

    Attributes:
        model_type: transformers' name of the family.
        arguments: for each its name in transformers' configuration and its default.
        fixed: those that must have this value, their default.
    """

    model_type: str
    arguments: Mapping[str, tuple[str, Any]]
    fixed: Mapping[str, Any]


_COMMON = {"d_conv": ("conv_kernel", 4), "expand": ("expand", 2), "bias": ("use_bias", False)}
_COMMON |= {"conv_bias": ("use_conv_bias", True)}
_MIXERS = {
    "Mamba1": _Mixer("mamba", {**_COMMON, "d_state": ("state_size", 16), "dt_rank": ("time_step_rank", "auto")}, {}),
    "Mamba2": _Mixer(
        "mamba2",
        {
            **_COMMON,
            "d_state": ("state_size", 128),
            "headdim": ("head_dim", 64),
            "ngroups": ("n_groups", 1),
            "chunk_size": ("chunk_size", 256),
            "dt_limit": ("time_step_limit", [0.0, float("inf")]),
        },
        {"d_ssm": None, "D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False},
    ),
}


def load_mamba_ssm(
    folder: Path, config: Mapping[str, Any], dtype: torch.dtype | Literal["auto"], device: torch.device
) -> nn.Module:
    """Load the model of a folder whose config.json is ``config``, as ``klfast.load_model`` describes it."""
    stored = _read_weights(folder / MAMBA_SSM_WEIGHTS)
    path = folder / "config.json"
    embedding = stored.get(_EMBEDDING)
    target = dtype if dtype != "auto" else torch.float32 if embedding is None else embedding.dtype
    check_config({"layers": config["n_layer"]}, path, len(stored))
    with buildable(path, _REMEDY):
        converted = _config(config, path)
        model = build_empty(converted, path, target, len(stored))
        groups = getattr(converted, "n_groups", 1)
        if groups != 1 and not hasattr(model.get_submodule("backbone.layers.0.mixer.norm"), "group_size"):
            raise CheckpointError(
                f"{path}: this transformers does not normalize the {groups} groups of a Mamba2 one by one, as "
                "mamba_ssm does; a newer one does"
            )
    if converted.tie_word_embeddings:
        stored.pop("lm_head.weight", None)
    readers = {name: partial(lambda name: stored.pop(name).to(device), name) for name in stored}
    return filled(model, Tensors(folder / MAMBA_SSM_WEIGHTS, readers, target, _REMEDY), device)


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a pickle, under transformers' names; nothing else in it is unpickled."""
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no weights: {MAMBA_SSM_WEIGHTS} is missing; {_REMEDY}")
    if is_pointer(path):
        raise CheckpointError(f"cannot load {path}: {POINTER}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of pickle, zip archives and torch
        raise CheckpointError(
            f"{path} is damaged, or holds more than tensors, which klfast does not unpickle; {_REMEDY}"
        ) from error
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path} holds no tensors by name; {_REMEDY}")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{path} holds something other than tensors by name; {_REMEDY}")
    return {_EMBEDDING if name == "backbone.embedding.weight" else name: tensor for name, tensor in content.items()}


def _config(config: Mapping[str, Any], path: Path) -> PretrainedConfig:
    """Return transformers' configuration of the model that mamba_ssm's describes.

    Raises:
        CheckpointError: it has a feature that transformers' models lack, or that klfast does not know.
    """
    from transformers import AutoConfig

    model = {**_MODEL, **config}
    _refuse_others(path, "", config, {*_MODEL, *_MODEL_IGNORED}, _MODEL_FIXED)
    given = model["ssm_cfg"] or {}
    layer = given.get("layer", "Mamba1")
    if layer not in _MIXERS:
        raise CheckpointError(f"{path}: klfast does not know the layer {shortened(repr(layer), 80)} of mamba_ssm")
    mixer = _MIXERS[layer]
    _refuse_others(path, "ssm_cfg.", given, {*mixer.arguments, *_MIXER_IGNORED}, mixer.fixed)
    arguments = {theirs: given.get(ours, default) for ours, (theirs, default) in mixer.arguments.items()}
    if layer == "Mamba2":
        arguments["num_heads"] = arguments["expand"] * model["d_model"] // arguments["head_dim"]
    multiple = model["pad_vocab_size_multiple"]
    return AutoConfig.for_model(
        mixer.model_type,
        **arguments,
        hidden_size=model["d_model"],
        num_hidden_layers=model["n_layer"],
        vocab_size=-(-model["vocab_size"] // multiple) * multiple,
        residual_in_fp32=model["residual_in_fp32"],
        tie_word_embeddings=model["tie_embeddings"],
        bos_token_id=0,  # GPT-NeoX's <|endoftext|>, with which these models were trained
        eos_token_id=0,
        pad_token_id=0,
    )


def _refuse_others(
    path: Path, prefix: str, given: Mapping[str, Any], known: set[str], fixed: Mapping[str, Any]
) -> None:
    """Raise CheckpointError if a configuration has entries beyond those known, or other values than those fixed."""
    for name, value in given.items():
        if name not in known and (name not in fixed or value != fixed[name]):
            entry = f"{prefix}{shortened(name, 40)} = {shortened(repr(value), 80)}"
            raise CheckpointError(f"{path}: neither transformers' Mamba nor its Mamba2 has {entry} of mamba_ssm")
