"""Fingerprint that identifies a model: the structure and norms of its weight matrices."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import torch
from torch import nn

from klfast.core.dtypes import as_bytes
from klfast.core.errors import ModelMismatchError
from klfast.core.signed_json import is_a, number
from klfast.models.matrices import Matrix, matrices


@dataclass(frozen=True)
class Fingerprint:
    """Identity of the model that sensitivities or a plan belong to (made by klfast.models.fingerprint.fingerprint).

    Attributes:
        structure: SHA-256 of the names and shapes of all matrices (klfast.models.matrices).
        norms: Frobenius norm of each matrix, in order. Compared to 1 %, so that a model matches itself in
            another dtype, but not another training run.
    """

    structure: str
    norms: tuple[float, ...]

    def matches(self, other: Fingerprint) -> bool:
        """Return True if both can belong to one model: the same structure, and norms that are equal to 1 %.

        ``==`` is stricter: the norms of one model differ a little between devices and dtypes.
        """
        if self.structure != other.structure or len(self.norms) != len(other.norms):
            return False
        return all(abs(a - b) <= 0.01 * max(a, b) for a, b in zip(self.norms, other.norms, strict=True))

    def to_data(self) -> dict[str, object]:
        """Return the fingerprint as values that JSON can hold."""
        return {"structure": self.structure, "norms": list(self.norms)}

    @classmethod
    def from_data(cls, data: object) -> Fingerprint:
        """Return the fingerprint that ``to_data`` described; raise KeyError or ValueError if ``data`` is damaged."""
        fields = is_a(dict, data, "fingerprint")
        norms = tuple(number(norm, "a norm") for norm in is_a(list, fields["norms"], "norms"))
        return cls(is_a(str, fields["structure"], "structure"), norms)


def fingerprint(model: nn.Module) -> Fingerprint:
    """Return the fingerprint of ``model``."""
    found = matrices(model)
    shapes = [(name, *one.shape) for name, one in found.items()]
    structure = hashlib.sha256(json.dumps(shapes).encode()).hexdigest()
    return Fingerprint(structure, tuple(_norm(one) for one in found.values()))


def state_digest(model: nn.Module) -> str:
    """Return the SHA-256 of all that a model's state dict has: names, dtypes, shapes and every value."""
    sha = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):  # else what a module of another library adds
            sha.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
            sha.update(as_bytes(tensor.cpu()).numpy().data)
    return sha.hexdigest()


def require_match(expected: Fingerprint, model: nn.Module, what: str) -> None:
    """Raise ModelMismatchError unless ``what``, with the fingerprint ``expected``, was made for ``model``."""
    found = fingerprint(model)
    if expected.structure != found.structure:
        raise ModelMismatchError(f"{what} was made for a model with other layers; make a new one for this model")
    if not expected.matches(found):
        raise ModelMismatchError(f"{what} was made for other weights of this architecture; make a new one for these")


@torch.no_grad()
def _norm(of: Matrix) -> float:
    return float(torch.linalg.vector_norm(of.weight.float()))
