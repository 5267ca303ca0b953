"""The quantization formats. A new one is a class like these, an instance in ``FORMATS``, and kernels."""

from klfast.quant.formats.base import Grouping, Part, QuantFormat, Rounded, check_parts
from klfast.quant.formats.packed_integers import INT4, INT6, INT8, PackedIntegers

FORMATS: dict[str, QuantFormat] = {each.name: each for each in (INT4, INT6, INT8)}

__all__ = ["FORMATS", "Grouping", "PackedIntegers", "Part", "QuantFormat", "Rounded", "check_parts"]
