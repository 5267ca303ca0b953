"""The gated delta rule: schema, check, fake and public wrappers.

Gated DeltaNet: Yang et al. 2024, arXiv:2412.06464. With one decay per key channel it is Kimi Delta Attention (KDA),
arXiv:2510.26692. One op runs both, over sequences and single steps.
"""

from __future__ import annotations

import torch

from klfast.core.errors import InvalidInputError
from klfast.dispatch.arguments import GatedDeltaRule, schema
from klfast.dispatch.checks import check_sizes, public, require_memory
from klfast.dispatch.registry import define
from klfast.ops.ssm import packed
from klfast.reference import ssm as reference_ssm


def _check(a: GatedDeltaRule) -> None:
    sizes: dict[str, int] = {}
    check_sizes(
        "gated_delta_rule",
        sizes,
        v=(a.v, "BLHV"),
        k=(a.k, "BLGK"),
        q=(a.q, "BLGK"),
        g=(a.g, "BLHK" if a.g.dim() == 4 else "BLH"),
        beta=(a.beta, "BLH"),
        state=(a.state, "BHKV"),
    )
    if sizes["K"] < 1:
        raise InvalidInputError("gated_delta_rule: q and k must have at least one channel, got none")
    if sizes["G"] < 1 or sizes["H"] % sizes["G"]:
        raise InvalidInputError(
            f"gated_delta_rule: the heads of q and k must divide the {sizes['H']} heads of v, got {sizes['G']}"
        )


gated_delta_rule_op = define(
    schema("gated_delta_rule", GatedDeltaRule, "Tensor"),
    arguments=GatedDeltaRule,
    check=_check,
    fake=lambda a: a.v.new_empty(a.v.shape),
    reference=reference_ssm.gated_delta_rule,
)


@public
def gated_delta_rule_update(
    state: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
) -> torch.Tensor:
    """Continue chunk_gated_delta_rule or chunk_kda by one or more tokens; ``state`` is updated in place.

    Args:
        state: [B, H, K, V], rounded to its dtype after the last token.
        q, k, v, g, beta, scale, use_qk_l2norm_in_kernel: as in chunk_gated_delta_rule; g may be as in chunk_kda.

    Returns:
        o [B, L, H, V] in v's dtype.

    Raises:
        InvalidInputError: a wrong dtype, shape or device.
    """
    if scale is None:
        scale = max(k.shape[-1:].numel(), 1) ** -0.5  # the op refuses no channels
    args = (q, k, v, g, beta, state, float(scale), use_qk_l2norm_in_kernel)
    out: torch.Tensor = gated_delta_rule_op(*args)
    return out


def _run(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    normalize: bool,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    kind, dims = ("[B, L, H, K]", 4) if op.endswith("kda") else ("[B, L, H]", 3)
    if g.dim() != dims or v.dim() != 4 or k.dim() != 4:
        shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in (("k", k), ("v", v), ("g", g)))
        raise InvalidInputError(f"{op}: k must be [B, L, G, K], v [B, L, H, V] and g {kind}, got {shapes}")
    if not torch.compiler.is_compiling():
        require_memory(op, initial_state=initial_state)  # which is read here
    sequences = None if cu_seqlens is None else packed.by_limits(op, cu_seqlens, *v.shape[:2])
    shape = (v.shape[0] if sequences is None else len(sequences), v.shape[2], k.shape[3], v.shape[3])
    if initial_state is None:
        state = v.new_zeros(shape, dtype=torch.float32)
    elif initial_state.shape != shape:
        raise InvalidInputError(f"{op}: initial_state must be {list(shape)}, got {list(initial_state.shape)}")
    else:
        state = initial_state.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    if sequences is None:
        out = gated_delta_rule_update(state, q, k, v, g, beta, scale, normalize)
    else:
        out = v.new_empty(v.shape)
        for i, sequence in enumerate(sequences):
            q_i, k_i, v_i, g_i, beta_i = map(sequence.of, (q, k, v, g, beta))
            sequence.of(out).copy_(
                gated_delta_rule_update(state[i : i + 1], q_i, k_i, v_i, g_i, beta_i, scale, normalize)
            )
    return out, state if output_final_state else None


@public
def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the gated delta rule: S = e^g_t S, S += k_t (beta_t (v_t - S^T k_t))^T, o_t = scale S^T q_t.

    Args:
        q, k: [B, L, G, K], G a divisor of H: each head serves H / G consecutive heads of v.
        v: [B, L, H, V].
        g: [B, L, H], logarithms of the decay, at most 0.
        beta: [B, L, H].
        scale: K^-0.5 by default.
        initial_state: S before the first token, [B, H, K, V]; zeros if absent.
        output_final_state: also return S after the last token, float32.
        use_qk_l2norm_in_kernel: divide q and k by sqrt(|q|^2 + 1e-6) and its like.
        cu_seqlens: int [N + 1], limits of N sequences that lie one behind the other in a batch of 1; states are then
            [N, H, K, V].

    Returns:
        o [B, L, H, V] in v's dtype, and the final state or None.

    Raises:
        InvalidInputError: a wrong dtype, shape or device; limits that do not rise from 0 to L.

    Argument names are those of fla.ops.gated_delta_rule.chunk_gated_delta_rule.
    """
    options = (scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens)
    return _run("chunk_gated_delta_rule", q, k, v, g, beta, *options)


@public
def fused_recurrent_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute chunk_gated_delta_rule: arguments, results and errors are the same, since kernels choose their own way.

    Argument names are those of fla.ops.gated_delta_rule.fused_recurrent_gated_delta_rule, which has others between g
    and beta: pass these by name.
    """
    options = (scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens)
    return _run("fused_recurrent_gated_delta_rule", q, k, v, g, beta, *options)


@public
def chunk_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute chunk_gated_delta_rule with one decay per key channel, g [B, L, H, K] (Kimi Delta Attention).

    All else, errors included, is as there. Argument names are those of fla.ops.kda.chunk_kda, whose gate and sigmoid
    within the kernel klfast does not have.
    """
    options = (scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens)
    return _run("chunk_kda", q, k, v, g, beta, *options)


@public
def fused_recurrent_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute chunk_kda: arguments, results and errors are the same, since kernels choose their own way.

    Argument names are those of fla.ops.kda.fused_recurrent_kda; pass what follows beta by name.
    """
    options = (scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens)
    return _run("fused_recurrent_kda", q, k, v, g, beta, *options)
