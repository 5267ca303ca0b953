"""QuantExperts: a drop-in for the experts of transformers' mixtures, with quantized matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from klfast.core.errors import InvalidInputError
from klfast.nn.linear import QuantLinear
from klfast.nn.split_stack import SplitStack
from klfast.nn.stack_product import stack_product


class QuantExperts(nn.Module):
    """The experts of a mixture: MLPs ``down(act(gate) * up)``, of which each token meets a few, weighted and added.

    Their matrices are stacked, under the names that they have in transformers: "gate_up_proj" (an expert's gate above
    its up), or "up_proj" without a gate, and "down_proj". A quantized stack is a
    QuantLinear with the rows of all experts, one expert after another, or a SplitStack, whose experts have different
    precisions; any other is a parameter [E, N, K]. Only the matrices of experts that tokens are routed to are read.

    Computes what ``batched_mm_experts_forward`` does (transformers 5.23.0, integrations/moe.py). The input gets
    gradients, quantized stacks are frozen.

    Args:
        experts: the module to replace, which ``stack_names`` knows.
        quantized: its stacks to replace, by name.
    """

    num_experts: int
    act_fn: Callable[[torch.Tensor], torch.Tensor]

    def __init__(self, experts: nn.Module, quantized: Mapping[str, QuantLinear | SplitStack]) -> None:
        super().__init__()
        of: Any = experts
        self.stack_names = stack_names(experts)
        self.num_experts, self.has_gate, self.act_fn = of.num_experts, of.has_gate, of.act_fn
        for name in self.stack_names:
            setattr(self, name, quantized.get(name, getattr(experts, name)))
        self.train(experts.training)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted sum of the experts' results.

        Args:
            hidden_states: [T, H].
            top_k_index: int64 [T, S], the experts that each token is routed to.
            top_k_weights: [T, S], their weights.

        Returns:
            [T, H] in the dtype of ``hidden_states``.

        Raises:
            InvalidInputError: there is no such expert.
        """
        first, last = self.stack_names
        y = self.product(first, hidden_states, top_k_index)
        y = activated(self, y)
        y = self.product(last, y.flatten(0, 1), top_k_index.reshape(-1, 1))
        y = y.view(*top_k_index.shape, y.shape[-1]) * top_k_weights.unsqueeze(-1)
        return y.sum(1).to(hidden_states.dtype)

    def product(self, name: str, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Multiply each row of x [M, K] by the matrices of a stack that index [M, S] names: [M, S, N]."""
        stack: Any = getattr(self, name)
        if isinstance(stack, SplitStack):
            return stack.product(x, index)
        if not isinstance(stack, (QuantLinear, torch.Tensor)):
            raise InvalidInputError(
                f"{name} of quantized experts has become a {type(stack).__name__}, which knows no experts; "
                "leave them out of the modules that adapters wrap (target_modules of peft)"
            )
        return stack_product(stack, self.num_experts, x, index)

    def extra_repr(self) -> str:
        """Return the number of experts and the sizes of stacks in full precision."""
        sizes = (f", {name}={list(stack.shape)}" for name, stack in self.named_parameters(recurse=False))
        return f"{self.num_experts} experts{''.join(sizes)}"


def activated(experts: Any, y: torch.Tensor) -> torch.Tensor:
    """Return what enters the last matrix of a mixture's experts, [..., K], of what leaves the first, [..., N]."""
    if not experts.has_gate:
        return experts.act_fn(y)
    gate, up = y.chunk(2, -1)
    return experts.act_fn(gate) * up


def stack_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the stacks of matrices of a mixture's experts; none if klfast does not know the module.

    It knows the classes of transformers whose forward its decorator ``use_experts_implementation`` may replace, and
    which therefore say how they compute, unless they have biases, norms, transposed matrices or a gate of their own.
    """
    if isinstance(module, QuantExperts):
        return module.stack_names
    of: Any = module
    gate = getattr(type(module), "_apply_gate", None)
    if getattr(gate, "__module__", "") != "transformers.integrations.moe" or not hasattr(module, "act_fn"):
        return ()
    if any(getattr(module, flag, False) for flag in ("has_bias", "has_post_expert_norm", "is_transposed")):
        return ()
    names = ("gate_up_proj" if of.has_gate else "up_proj", "down_proj")
    found = dict(module.named_parameters(recurse=False))
    stacked = found.keys() == set(names) and all(stack.dim() == 3 for stack in found.values())
    return names if stacked and all(len(stack) == of.num_experts for stack in found.values()) else ()
