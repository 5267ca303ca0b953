"""The quantization formats. A new one is a class like these, an instance in ``FORMATS``, and kernels.

``CORRECTED`` has, by the name of each, the same format with corrected rows.
"""

from klfast.quant.formats.base import Grouping, Part, QuantFormat, Rounded, check_parts
from klfast.quant.formats.corrected_rows import ROWS, CorrectedRows, check_rows
from klfast.quant.formats.packed_integers import INT4, INT6, INT8, PackedIntegers

FORMATS: dict[str, QuantFormat] = {each.name: each for each in (INT4, INT6, INT8)}
CORRECTED = {name: CorrectedRows(each) for name, each in FORMATS.items()}

__all__ = [
    "CORRECTED",
    "FORMATS",
    "ROWS",
    "CorrectedRows",
    "Grouping",
    "PackedIntegers",
    "Part",
    "QuantFormat",
    "Rounded",
    "check_parts",
    "check_rows",
]
