"""QuantSpec, the description of how a weight matrix is quantized."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from klfast.core.errors import InvalidInputError
from klfast.quant.formats import CORRECTED, FORMATS, QuantFormat

SCALES = ("absmax", "mse")  # the ways to choose the scale of a group, see klfast.quantize
ROUNDINGS = ("nearest", "gptq")  # the ways to choose the codes, see klfast.quantize_model
_TEXT = r"([a-z]+[0-9]+)(?:-(channel|g[1-9][0-9]{0,8}))?(?:-(sym|asym))?(?:\+(?:([0-9]{1,9}):)?([1-9][0-9]{0,8}))?"
SHAPE_BYTES = 16  # of the saved weight_shape, int64 [2], of each quantized layer


@dataclass(frozen=True, order=True)
class QuantSpec:
    """How a weight matrix is quantized: the format, and how many weights share a scale.

    Attributes:
        bits: per weight, without its share of the scales: 4, 6 or 8.
        group_size: consecutive input features that share a scale; -1 for one group per output channel. Where it
            does not divide the number of input features, the last group is shorter.
        symmetric: True for w = q * scale; False for w = (q - zero_point) * scale.
        kind: with ``bits``, the format's name (``klfast.quant.formats``); "int" rounds to nearest on a uniform grid.
        corrected: rows that have twice the bits, since a second matrix of the same format is added to them. They suit a
            head, whose rows cost more the likelier their tokens are, and the rows of a fused layer that cost most.
        first_corrected: the first of them, which follow one another; -1 for those that cost most. Only rounding reads
            it: the rounded matrix itself knows its rows.

    ``str(spec)`` is, for instance, ``"int4-g64-sym"``, ``"int4-g64-sym+512"`` with 512 corrected rows, or
    ``"int4-g64-sym+1152:1160"`` with rows 1152 to 1159 corrected; ``QuantSpec.parse`` reads it back.
    """

    bits: int = 4
    group_size: int = 64
    symmetric: bool = True
    kind: str = "int"
    corrected: int = 0
    first_corrected: int = -1

    def __post_init__(self) -> None:
        known = [each.bits for each in FORMATS.values() if each.kind == self.kind]
        if not known:
            raise InvalidInputError(f"the formats are {', '.join(FORMATS)}; none is of the kind {self.kind!r}")
        if not isinstance(self.bits, int) or self.bits not in known:
            raise InvalidInputError(f"bits must be {_either(known)}, an integer, got {self.bits!r}")
        if (
            not isinstance(self.group_size, int)
            or isinstance(self.group_size, bool)
            or (self.group_size < 1 and self.group_size != -1)
        ):
            raise InvalidInputError(
                f"group_size must be a positive integer, or -1 for one group per row, got {self.group_size!r}"
            )
        if not isinstance(self.symmetric, bool):
            raise InvalidInputError(f"symmetric must be True or False, got {self.symmetric!r}")
        if not isinstance(self.corrected, int) or isinstance(self.corrected, bool) or self.corrected < 0:
            raise InvalidInputError(f"corrected must be a number of rows, 0 or more, got {self.corrected!r}")
        first = self.first_corrected
        if not isinstance(first, int) or isinstance(first, bool) or first < -1 or (first >= 0 and not self.corrected):
            raise InvalidInputError(f"first_corrected must be a corrected row, or -1, got {first!r}")
        if not (self.symmetric or self.format.has_zero_points):
            raise InvalidInputError(f"{self.format.name} has no zero points; symmetric must be True")

    def __str__(self) -> str:
        return self.text

    @cached_property
    def text(self) -> str:
        """The spec as text, such as "int4-g64-sym"."""
        group = "channel" if self.group_size == -1 else f"g{self.group_size}"
        rows = f"+{self.corrected}" if self.corrected else ""
        if (first := self.first_corrected) >= 0:
            rows = f"+{first}:{first + self.corrected}"
        return f"{self.kind}{self.bits}-{group}-{'sym' if self.symmetric else 'asym'}{rows}"

    @classmethod
    def parse(cls, text: str) -> QuantSpec:
        """Return the spec that prints as ``text``; ``int4`` alone stands for the default group and symmetry.

        Raises:
            InvalidInputError: the text does not describe a spec.
        """
        if not isinstance(text, str):
            raise InvalidInputError(
                f"a quantization spec must be a QuantSpec or text such as int4-g64-sym, got {type(text).__name__}"
            )
        match = re.fullmatch(_TEXT, text)
        if match is None or match[1] not in FORMATS or (match[4] and int(match[4]) >= int(match[5])):
            raise InvalidInputError(
                f"{text!r} is not a quantization spec (examples: int4-g64-sym, int8-channel-asym, int4-g64-sym+512; "
                f"formats: {', '.join(FORMATS)})"
            )
        name, group, symmetry, first, end = match.groups()
        size = cls.group_size if group is None else -1 if group == "channel" else int(group[1:])
        rows = (int(end or 0),) if first is None else (int(end) - int(first), int(first))
        return cls(FORMATS[name].bits, size, symmetry != "asym", FORMATS[name].kind, *rows)

    @classmethod
    def of(cls, spec: QuantSpec | str) -> QuantSpec:
        """Return ``spec`` itself, or the one that its text describes (see ``parse``)."""
        return spec if isinstance(spec, cls) else cls.parse(spec)  # type: ignore[arg-type]

    @classmethod
    def from_compressed_tensors(cls, group: Mapping[str, Any]) -> QuantSpec:
        """Return the spec of a config group in compressed-tensors' quantization_config.

        Raises:
            KeyError, TypeError, InvalidInputError: the group is damaged, or its format is unknown.
        """
        for each in FORMATS.values():
            if (found := each.from_compressed_tensors(group)) is not None:
                return cls(each.bits, *found, each.kind)
        raise InvalidInputError(f"none of the formats {', '.join(FORMATS)} has such weights: {group['weights']!r}")

    @property
    def format(self) -> QuantFormat:
        """The format, which rounds, stores and saves such weights."""
        return (CORRECTED if self.corrected else FORMATS)[f"{self.kind}{self.bits}"]

    @property
    def base(self) -> QuantSpec:
        """The spec without corrected rows."""
        return replace(self, corrected=0, first_corrected=-1) if self.corrected else self

    def why_unfit(self, n: int) -> str:
        """Return why a matrix of ``n`` rows cannot have such corrected rows, a clause; empty if it can."""
        first = max(self.first_corrected, 0)
        if first + self.corrected <= n:
            return ""
        return f"{self.corrected} rows{f' from {first} on' if first else ''} cannot be corrected in a matrix of {n}"

    @property
    def q_min(self) -> int:
        """The smallest code."""
        return self.format.range[0]

    @property
    def q_max(self) -> int:
        """The largest code."""
        return self.format.range[1]

    def group_length(self, in_features: int) -> int:
        """Return the input features in each group, of which the last may be shorter."""
        return in_features if self.group_size == -1 else min(self.group_size, in_features)

    def n_groups(self, in_features: int) -> int:
        """Return the number of groups in a row."""
        length = self.group_length(in_features)
        return -(-in_features // length) if in_features else 0

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Return the bytes of all parts of a quantized [N, K] weight."""
        return self.format.nbytes(shape, self)

    def saved_bytes(self, shape: tuple[int, int]) -> int:
        """Return the bytes of a quantized [N, K] weight in a saved file: ``nbytes`` and weight_shape.

        The names and offsets in the file's header are not counted.
        """
        return self.nbytes(shape) + SHAPE_BYTES


def storable_spec(spec: QuantSpec, in_features: int) -> QuantSpec:
    """Return the spec nearest to ``spec`` that a saved [N, in_features] weight can have.

    Its group is the largest size that the format can store, at most the requested one, so that its error is no larger:
    1600 inputs in groups of 128 become groups of 100. A group as long as the row, or longer, becomes -1, which gives
    the same numbers. In memory (``quantize``, the kernels) every group size is allowed.
    """
    size = spec.format.storable_group(spec.group_size, in_features)
    return spec if size == spec.group_size else replace(spec, group_size=size)


def _either(bits: list[int]) -> str:
    return f"{', '.join(map(str, bits[:-1]))} or {bits[-1]}" if bits[1:] else str(bits[0])
