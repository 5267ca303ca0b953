"""What a sweep found: the sensitivity of every (layer, spec) candidate, as data that plans are made from."""

from __future__ import annotations

from dataclasses import dataclass, field

from klfast.types import Fingerprint, QuantSpec

METRICS = ("kl_teacher_student", "kl_student_teacher", "jsd", "mse", "sqnr_db", "delta_ce", "top1_agree")


@dataclass(frozen=True)
class LayerInfo:
    """A linear layer as plans see it: out_features, in_features, and its bytes if left alone."""

    shape: tuple[int, int]
    float_bytes: int


@dataclass(frozen=True)
class Measurement:
    """One candidate's metrics, each a mean over ``tokens`` tokens with its standard error (both keyed as METRICS)."""

    mean: dict[str, float]
    stderr: dict[str, float]
    tokens: int
    below_noise: bool = False


@dataclass
class Sensitivities:
    """All measurements of a sweep.

    Attributes:
        fingerprint: the model they belong to; None for published files, whose model is not at hand.
        layers: every linear layer by name, in module order.
        other_bytes: bytes of all that is never quantized (embedding unless tied to the head, norms, convolutions,
            biases ...). A tied embedding is counted with the head alone.
        measurements: by (layer name, spec).
        noise_floor: the metrics that mere rounding makes (the teacher against itself in other summation order).
        provenance: free-form facts (model, calibration text, tokens, versions, seconds).
    """

    fingerprint: Fingerprint | None
    layers: dict[str, LayerInfo]
    other_bytes: int
    measurements: dict[tuple[str, QuantSpec], Measurement] = field(default_factory=dict)
    noise_floor: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, object] = field(default_factory=dict)
