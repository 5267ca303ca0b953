"""The experts of a mixture in transformers' from_pretrained: their packed matrices become packed stacks.

transformers stacks the experts' weights by the converters of its conversion_mapping.py. Those of quantized stacks have
several tensors in the place of each weight, so each converter gets a twin for each of these.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from klfast.checkpoint import expert_files
from klfast.checkpoint.tensors import Tensors
from klfast.core.errors import CheckpointError, KernelUnavailableError
from klfast.integrations.schemes import Schemes
from klfast.models.matrices import named_matrices
from klfast.nn import QuantLinear
from klfast.quant.spec import QuantSpec

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationConfig

_PARTS = ("packed", "scale", "zero_point", "shape")  # of a weight in the format pack-quantized


def join(model: nn.Module, tensors: Tensors, schemes: Schemes) -> dict[str, QuantSpec]:
    """Return the specs of the stacks that files hold packed, and put them in the place of their single matrices.

    The first expert of a stack tells the spec of all: tensors of another one have other shapes or names.

    Raises:
        KernelUnavailableError: a stack's matrices have several specs, or one that klfast has no kernels for; or its
            experts have different precisions, which ``klfast.load_quantized`` reads.
        CheckpointError: a tensor is missing, or the tensors do not fit together.
    """
    stored, linear = tensors.names(), nn.Linear(1, 1, device="meta")  # what a single matrix is to compressed-tensors
    projections, specs = expert_files.projections(model), {}
    for stack in (name for name, one in named_matrices(model).items() if one.is_stack):
        names = projections.get(stack, (stack.rpartition(".")[2],))
        if any(expert_files.experts_in(each, stack, names) for each in schemes.targets):
            raise KernelUnavailableError(
                f"the experts of {stack} have different precisions, which klfast.load_quantized reads."
            )
        first = [f"{expert_files.experts_of(stack)}.0.{name}" for name in projections.get(stack, ())]
        singly = any(f"{name}.weight_packed" in stored for name in first)
        if not singly and f"{stack}.weight_packed" not in stored:
            continue
        spec, *others = {schemes.spec(name, linear) for name in (first if singly else [stack])}
        if others:
            raise KernelUnavailableError(f"the matrices of {stack} have several specs.")
        if spec is None:
            continue
        if singly:
            expert_files.join_one(tensors, stack, projections[stack], spec)
        specs[stack] = spec
    return specs


def with_packed_stacks(conversions: Iterable[Any]) -> list[Any]:
    """Return transformers' conversions, preceded by those for the tensors of packed stacks."""
    twins = []
    for each in conversions:
        if not isinstance(each, WeightConverter) or not expert_files.stacked_names(each.source_patterns):
            continue
        for part in _PARTS:
            sources = [f"{source}_{part}" for source in each.source_patterns]
            targets = [f"{target}.weight_{part}" for target in each.target_patterns]
            twin = WeightConverter(sources, targets, [JoinRows()])
            twin.scope_prefix, twin.base_model_prefix = each.scope_prefix, each.base_model_prefix
            twins.append(twin)
    return [*twins, *conversions]


def require_readable(files: Collection[str], config: QuantizationConfig) -> None:
    """Raise CheckpointError if transformers itself would misread the experts of files.

    It reads all of them as one kind, that of the first group with a pattern for experts, without zero points (5.24,
    integrations/compressed_tensors.py), and no stacks.
    """
    if not files or not all(file.endswith(".safetensors") for file in files):
        return
    folder = Path(next(iter(files))).parent
    stored = Tensors.of_files(folder, list(files), torch.device("cpu"), None).names()
    packed = {name for name in stored if re.search(r"\.experts\.(\d+\.)?\w+\.weight_(packed|zero_point)$", name)}
    kinds = {
        (group.weights.num_bits, group.weights.group_size)
        for group in config.config_groups.values()
        if group.weights is not None
        and any(target.startswith("re:") and "experts" in target for target in group.targets)
    }
    singly = all(re.search(r"\.experts\.\d+\.\w+\.weight_packed$", name) for name in packed)
    some_only = any(re.search(r"\.experts\.\d+\.\w+\.weight$", name) for name in stored)
    if packed and (len(kinds) > 1 or some_only or not singly):
        raise CheckpointError(
            f"{folder} holds experts of several precisions, stacked, or with zero points, which transformers cannot "
            "read; load it with klfast.load_quantized"
        )


class JoinRows(ConversionOps):
    """The operation that makes a tensor of a stack out of those of its single matrices, expert by expert."""

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """Return the joined tensor under its target's pattern."""
        stack, _, part = kwargs["full_layer_name"].rpartition(".weight_")
        layer = kwargs["model"].get_submodule(stack)
        assert isinstance(layer, QuantLinear)
        [target] = target_patterns
        if part == "shape":
            return {target: torch.tensor((layer.out_features, layer.in_features))}
        experts = zip(*(input_dict[source] for source in source_patterns), strict=True)
        each = list(chain.from_iterable(experts))
        rows = [layer.out_features // len(each)] * len(each)
        return {target: layer.spec.format.join_part(part, each, rows)}
