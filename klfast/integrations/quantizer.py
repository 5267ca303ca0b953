"""``register_quantizer``: transformers' from_pretrained keeps packed weights packed, on klfast's kernels."""

from __future__ import annotations

import sys
from types import ModuleType

from klfast.core.import_hook import no_longer_when_imported, when_imported

_MODULE, _METHOD = "transformers.quantizers.auto", "compressed-tensors"


def register_quantizer() -> None:
    """Make transformers' from_pretrained run packed weights on klfast's kernels; ``import klfast`` does it.

    This concerns folders and hub models in the ``pack-quantized`` format of compressed-tensors: those that
    ``klfast.save_quantized`` wrote, and others' with INT4 or INT8 weights (W4A16, W8A16). Their layers become
    ``klfast.QuantLinear``, their experts ``klfast.nn.QuantExperts``, instead of being decompressed at the first call.
    All other formats, and what klfast has no kernels for, go transformers' own way; where that is slower than it looks,
    a ``SlowPathWarning`` says why. So does a single call with
    ``quantization_config=CompressedTensorsConfig(dequantize=True)``.

    transformers itself needs the package compressed-tensors for this format (``klfast.load_quantized`` does not). It
    may be imported before or after this call; models that are loaded already stay as they are.
    """
    when_imported(_MODULE, _put_in)


def unregister_quantizer() -> None:
    """Undo ``register_quantizer``: transformers uses its own quantizer again."""
    no_longer_when_imported(_MODULE, _put_in)
    if (module := sys.modules.get(_MODULE)) is not None:
        module.AUTO_QUANTIZER_MAPPING[_METHOD] = module.CompressedTensorsHfQuantizer


def _put_in(module: ModuleType) -> None:
    from klfast.integrations.packed_quantizer import PackedQuantizer

    module.AUTO_QUANTIZER_MAPPING[_METHOD] = PackedQuantizer
