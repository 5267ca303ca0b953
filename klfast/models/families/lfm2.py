"""LFM2, dense and with experts (transformers.models.lfm2, lfm2_moe): short convolutions and attention.

A convolution runs over B x without an activation, and its result is multiplied by C (modeling_lfm2.py,
Lfm2ShortConv.forward, 5.23.0). Logits are the head's product.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import nn

from klfast.models.families import common
from klfast.models.families.base import Blocks, Family, Mixer, Rows, plain, split


class _ShortConv(Protocol):
    conv: nn.Conv1d


def _rows(mixer: _ShortConv) -> Mapping[str, Rows]:
    channels = mixer.conv.in_channels
    return {"in_proj": split(B=channels, C=channels, x=channels)}


FAMILY = Family(
    model_type="lfm2",
    mixers={"Lfm2ShortConv": Mixer(common.CONVOLUTIONS)},
    norms={"Lfm2RMSNorm": common.rms_norm},
    rows={"Lfm2ShortConv": _rows},
    blocks=Blocks("layers"),
    logits=plain,
)
MOE = Family(
    model_type="lfm2_moe",
    mixers={"Lfm2MoeShortConv": Mixer(common.CONVOLUTIONS)},
    norms={"Lfm2MoeRMSNorm": common.rms_norm},
    rows={"Lfm2MoeShortConv": _rows},
    blocks=Blocks("layers"),
    logits=plain,
)
