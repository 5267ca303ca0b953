"""Result of a sweep: the sensitivity of every (layer, spec) candidate, from which plans are made."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from klfast.core import signed_json
from klfast.core.errors import CheckpointError
from klfast.core.signed_json import is_a, number, whole
from klfast.models import fingerprint
from klfast.models.expert_names import stacked
from klfast.models.fingerprint import Fingerprint
from klfast.models.matrices import matrices, with_experts
from klfast.models.sizes import other_bytes, weight_bytes
from klfast.quant.spec import QuantSpec

# As in klfast.Divergence (a token's SQNR counts as at most 150 dB); delta_ce = ce_student - ce_teacher.
METRICS = ("kl_teacher_student", "kl_student_teacher", "jsd", "mse", "sqnr_db", "delta_ce", "top1_agree")
SCHEMA = "klfast-sensitivities/1"
_REMEDY = "run the sweep again"
_MOST = torch.finfo(torch.float32).max  # measurements per token are float32


@dataclass(frozen=True)
class LayerInfo:
    """A linear layer as plans see it: (out_features, in_features), and the bytes of its weight at full precision.

    The experts of a mixture that lie in one tensor [E, N, K] are one layer of shape (E * N, K), or in sweeps with
    ``experts`` each a layer of shape (N, K), "...experts.gate_up_proj.17".
    """

    shape: tuple[int, int]
    float_bytes: int


@dataclass(frozen=True)
class Measurement:
    """One candidate's metrics, each a mean over ``tokens`` tokens with its standard error (both keyed as METRICS).

    The standard error is that of a mean over windows, since the tokens of a window are correlated; NaN with a single
    window. ``below_noise``: the KL is too close to the noise floor to rank anything. ``is_derived``: an adaptive sweep
    took it from that of another spec of the layer, by the squared errors of the weights. ``windows``: that hold the
    tokens, 0 if that is not known.
    """

    mean: dict[str, float]
    stderr: dict[str, float]
    tokens: int
    below_noise: bool = False
    is_derived: bool = False
    windows: int = 0


@dataclass
class Sensitivities:
    """All measurements of a sweep.

    Attributes:
        fingerprint: the model they belong to; None for published files, whose model is not available.
        layers: every linear layer by name, in module order.
        other_bytes: bytes of everything that is never quantized (embedding unless tied to the head, norms,
            convolutions, biases ...). A tied embedding is counted with the head only.
        measurements: by (layer name, spec).
        noise_floor: the metrics caused by rounding alone (the teacher against itself, rounded differently).
        provenance: free-form facts (model, calibration text, tokens, versions ...). "ce_teacher", where a sweep has
            recorded it, is the full-precision model's mean cross-entropy on the calibration text, nats per token.
        rows: by (layer name, use, spec), measurements of only those rows of the layer that serve one use.
        activations: by (layer name, inputs in a group), measurements of the layer with its weight in full precision and
            its input rounded to int8 in such groups.
    """

    fingerprint: Fingerprint | None
    layers: dict[str, LayerInfo]
    other_bytes: int
    measurements: dict[tuple[str, QuantSpec], Measurement] = field(default_factory=dict)
    noise_floor: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, object] = field(default_factory=dict)
    rows: dict[tuple[str, str, QuantSpec], Measurement] = field(default_factory=dict)
    activations: dict[tuple[str, int], Measurement] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, experts: bool = False) -> Sensitivities:
        """Return sensitivities of ``model`` without measurements: its fingerprint, layers and bytes.

        With ``experts``, each expert's matrix is a layer, not the stack of all.
        """
        held = with_experts(matrices(model)) if experts else matrices(model)
        found = {name: LayerInfo(one.shape, weight_bytes(one)) for name, one in held.items()}
        return cls(fingerprint.fingerprint(model), found, other_bytes(model))

    def int8_activations(self, name: str, spec: QuantSpec) -> Measurement | None:
        """Return the measurement of a layer's input rounded in the groups of a spec; None if there is none."""
        return self.activations.get((name, spec.group_length(self.layers[name].shape[1])))

    def to_json(self, path: str | os.PathLike[str] | None = None, *, extra: Mapping[str, object] | None = None) -> str:
        """Return the sensitivities as JSON text; write it atomically to ``path`` if given.

        ``extra`` adds top-level entries that ``from_json`` ignores: the state of an unfinished sweep.
        """
        data = {
            "schema": SCHEMA,
            "fingerprint": self.fingerprint and self.fingerprint.to_data(),
            "layers": {
                name: {"shape": list(info.shape), "float_bytes": info.float_bytes} for name, info in self.layers.items()
            },
            "other_bytes": self.other_bytes,
            "measurements": [
                {"layer": name, "spec": str(spec), **_entry(m)} for (name, spec), m in self.measurements.items()
            ],
            "rows": [
                {"layer": name, "use": use, "spec": str(spec), **_entry(m)}
                for (name, use, spec), m in self.rows.items()
            ],
            "activations": [
                {"layer": name, "group": group, **_entry(m)} for (name, group), m in self.activations.items()
            ],
            "noise_floor": numbers_to_json(self.noise_floor),
            "provenance": self.provenance,
            **(extra or {}),
        }
        return signed_json.write(data, path)

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> Sensitivities:
        """Read a file or text that ``to_json`` wrote, or the published kl-ssm-quant results.

        Args:
            source: a path, or the JSON text itself (recognized by its opening brace or bracket).

        Raises:
            CheckpointError: no such file, or it is truncated, damaged (by its digest, if it has one), or in neither of
                these formats.
        """
        data, origin = signed_json.read(source, "sensitivities", _REMEDY, verified=False)
        if not isinstance(data, dict) or "schema" not in data:
            from klfast.sensitivity import kl_ssm_quant

            return kl_ssm_quant.read(data, origin=origin)
        found = cls.from_data(data, origin)
        signed_json.verify(data, origin, _REMEDY)
        return found

    @classmethod
    def from_data(cls, data: object, origin: str, remedy: str = _REMEDY) -> Sensitivities:
        """Return the sensitivities in data read from ``origin``, without verifying their digest.

        Raises:
            CheckpointError: with the remedy; the data are not sensitivities.
        """
        entries: dict[str, Any] = data if isinstance(data, dict) else {}
        schema = entries.get("schema")
        if str(schema).startswith("klfast-plan/"):
            raise CheckpointError(
                f"{origin} is a plan; give a file that klfast sweep wrote "
                "(klfast report SENSITIVITIES --plan PLAN shows a plan)"
            )
        if schema != SCHEMA:
            raise CheckpointError(f"{origin} has schema {schema!r}, this klfast reads {SCHEMA!r}; {remedy}")
        with signed_json.parsed(origin, remedy):
            layers = {name: _layer(name, info) for name, info in is_a(dict, entries["layers"], "layers").items()}
            found = cls(
                _fingerprint(entries["fingerprint"], layers),
                layers,
                whole(entries["other_bytes"], "other_bytes"),
                {
                    (entry["layer"], QuantSpec.parse(entry["spec"])): _measurement(entry)
                    for entry in entries["measurements"]
                },
                {name: _mean(name, value) for name, value in entries["noise_floor"].items()},
                dict(is_a(dict, entries["provenance"], "provenance")),
                {
                    (entry["layer"], is_a(str, entry["use"], "use"), QuantSpec.parse(entry["spec"])): _measurement(
                        entry
                    )
                    for entry in entries.get("rows", ())
                },
                {
                    (entry["layer"], whole(entry["group"], "group", 1)): _measurement(entry)
                    for entry in entries.get("activations", ())  # files of before have none
                },
            )
            if "ce_teacher" in found.provenance:
                number(found.provenance["ce_teacher"], "ce_teacher", most=_MOST)
        measured = (*found.measurements, *found.rows, *found.activations)
        if unknown := [name for name, *_ in measured if name not in layers]:
            raise CheckpointError(
                f"{origin} has measurements of {unknown[0]!r}, which is not among its layers; {remedy}"
            )
        return found


def numbers_to_json(numbers: Mapping[str, float]) -> dict[str, float | str]:
    """Return numbers for JSON; infinities and NaN, which it lacks, become strings that ``float`` reads."""
    return {key: value if math.isfinite(value) else str(value) for key, value in numbers.items()}


def _entry(m: Measurement) -> dict[str, object]:
    return {
        "tokens": m.tokens,
        "below_noise": m.below_noise,
        "mean": numbers_to_json(m.mean),
        "stderr": numbers_to_json(m.stderr),
        **({"is_derived": True} if m.is_derived else {}),
        **({"windows": m.windows} if m.windows else {}),
    }


def _fingerprint(data: Any, layers: Mapping[str, LayerInfo]) -> Fingerprint | None:
    """Return a fingerprint, which has a norm for each layer, but one for all experts of a stack."""
    if data is None:
        return None
    found, expected = Fingerprint.from_data(data), len(stacked(layers))
    if len(found.norms) not in (expected, len(layers)):  # the latter of linear layers that merely bear such names
        raise ValueError(f"it has {len(found.norms)} norms for {expected} layers")
    return found


def _layer(name: str, info: Mapping[str, Any]) -> LayerInfo:
    rows, columns = (whole(size, f"the shape of {name}") for size in info["shape"])
    return LayerInfo((rows, columns), whole(info["float_bytes"], f"float_bytes of {name}"))


def _measurement(entry: Mapping[str, Any]) -> Measurement:
    mean = {name: _mean(name, value) for name, value in entry["mean"].items()}
    stderr = {
        name: math.nan if value == "nan" else number(value, f"the standard error of {name}", most=_MOST)
        for name, value in entry["stderr"].items()
    }
    return Measurement(
        mean,
        stderr,
        whole(entry["tokens"], "tokens", 1),
        is_a(bool, entry["below_noise"], "below_noise"),
        is_a(bool, entry.get("is_derived", False), "is_derived"),  # files of before have none
        whole(entry.get("windows", 0), "windows"),
    )


def _mean(name: str, value: object) -> float:
    """Return a metric that ``to_json`` wrote; only an SQNR can be infinite."""
    return math.inf if name == "sqnr_db" and value == "inf" else number(value, name, most=_MOST)
