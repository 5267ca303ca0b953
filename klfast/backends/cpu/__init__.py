"""Kernels on the CPU: the C++ extension klfast._C and the tensor descriptors that it takes."""

from klfast.dispatch.registry import register_kernel
from klfast.quant.formats import FORMATS


def register() -> None:
    """Register every CPU kernel with its op; ImportError if the extension is missing."""
    from klfast.backends.cpu import attention, divergence, matmul, norm, ssm

    register_kernel("dequant_matmul", "CPU", matmul.dequant_matmul, formats=matmul.FORMATS)
    register_kernel("grouped_dequant_matmul", "CPU", matmul.grouped_dequant_matmul, formats=matmul.FORMATS)
    register_kernel("linear", "CPU", matmul.linear, handed_over=matmul.why_torch_multiplies)
    register_kernel("decode_attention", "CPU", attention.decode_attention)
    register_kernel("logit_divergence", "CPU", divergence.logit_divergence)
    # It dequantizes heads of any format, block by block.
    register_kernel("linear_divergence", "CPU", divergence.linear_divergence, formats=FORMATS)
    for kernel in (
        ssm.causal_conv1d,
        ssm.causal_conv1d_update,
        ssm.selective_scan,
        ssm.selective_state_update,
        ssm.mamba_chunk_scan,
        ssm.gated_delta_rule,
        norm.rms_norm,
        divergence.gathered_logits,
    ):
        register_kernel(kernel.__name__, "CPU", kernel, sees_addresses=True)
