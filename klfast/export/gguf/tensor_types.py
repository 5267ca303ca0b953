"""A plan as text for llama-quantize, for those who convert a model by themselves."""

from __future__ import annotations

import re

from torch import nn

from klfast.export.gguf.contents import architecture_of, contents


def tensor_types(model: nn.Module) -> str:
    """Return a line ``name=type`` for each matrix of a model, as ``llama-quantize --tensor-type-file`` reads them.

    Names are whole, as regular expressions. llama-quantize rounds by itself; layers whose groups no type of GGUF has
    get the nearest.

    Raises:
        InvalidInputError: as ``export_gguf``, except for layers' groups.
    """
    found = contents(model, architecture_of(model), regroup=True)
    return "".join(
        f"^{re.escape(one.name)}$={one.kind.lower()}\n"
        for one in found
        if len(one.shape) > 1 and one.change.values is None
    )
