"""Reader of the sensitivities published with "A KL Lens on Quantization" (arXiv 2604.13440).

They come with its authors' code, kl-ssm-quant: per-layer results of mamba-130m and mamba-1.4b, one JSON file per bit
width. Each nn.Linear was quantized alone, symmetric abs-max per output channel; 64 x 512 tokens of WikiText-2. The
files have defects, so only two of each layer's five figures are kept as measurements:
    kl_student_to_teacher   KL(student || teacher) summed over the 512 tokens of a sequence: kept as
                            kl_student_teacher, divided by 512. Computed in fp16, so most values at 8 bits are its
                            noise floor (about 1e-5 to 1e-4 nats) and rank nothing.
    sqnr_db                 one ratio over all logits: kept.
    perplexity              WikiText-2 word perplexity with that layer alone quantized: kept under
                            provenance["perplexity"], by spec and layer.
    kl_teacher_to_student   dropped: probabilities were passed as log-probabilities (all values are about 4.9e8).
    delta_cross_entropy     dropped: labels were not shifted, and one position per sequence was scored.
"""

from __future__ import annotations

import math
import os
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from klfast.core import signed_json
from klfast.core.errors import CheckpointError, InvalidInputError
from klfast.quant.spec import QuantSpec
from klfast.sensitivity.results import LayerInfo, Measurement, Sensitivities

_REMEDY = "fetch the file again"
_SEQUENCE = 512
_TOKENS = 64 * _SEQUENCE
_FIELDS = {"perplexity", "sqnr_db", "kl_teacher_to_student", "kl_student_to_teacher", "delta_cross_entropy"}


@dataclass(frozen=True)
class _Mamba:
    """Sizes of a published checkpoint; the files hold no shapes."""

    name: str
    blocks: int
    hidden: int
    inner: int
    dt_rank: int
    vocabulary: int = 50280
    state: int = 16
    kernel: int = 4

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return [N, K] of every linear layer, in module order."""
        block = {
            "in_proj": (2 * self.inner, self.hidden),
            "x_proj": (self.dt_rank + 2 * self.state, self.inner),
            "dt_proj": (self.inner, self.dt_rank),
            "out_proj": (self.hidden, self.inner),
        }
        layers = {
            f"backbone.layers.{i}.mixer.{name}": shape for i in range(self.blocks) for name, shape in block.items()
        }
        return {**layers, "lm_head": (self.vocabulary, self.hidden)}

    def other_weights(self) -> int:
        """Return the number of values outside linear weights, without the embedding, which is tied to the head."""
        # conv1d and its bias, dt_proj's bias, A_log, D, norm
        block = self.inner * self.kernel + self.inner + self.inner + self.inner * self.state + self.inner + self.hidden
        return self.blocks * block + self.hidden  # norm_f


_MODELS = (_Mamba("state-spaces/mamba-130m", 24, 768, 1536, 48), _Mamba("state-spaces/mamba-1.4b", 48, 2048, 4096, 128))


def read(
    data: object, *, bits: int | None = None, dtype_bytes: int = 2, origin: str = "the JSON text"
) -> Sensitivities:
    """Return the sensitivities in the parsed JSON of one file.

    Args:
        data: the result of ``json.load``.
        bits: 4 or 8. The files do not hold it; by default it is inferred from the data (the median layer has an SQNR of
            25 and 36 dB in the 4-bit files, 48 and 57 dB in the 8-bit ones).
        dtype_bytes: bytes of each value that is not quantized: 2 (fp16), or 4 for fp32, the dtype of the paper's
            full-precision sizes.
        origin: the file's name in messages.

    Returns:
        Sensitivities without a fingerprint (the model is not available). Layers are measured with
        QuantSpec(bits, -1, True), metrics kl_student_teacher and sqnr_db, standard errors unknown (NaN).

    Raises:
        CheckpointError: not a published file, or not for one of the two known models.
    """
    if dtype_bytes not in (2, 4):
        raise InvalidInputError(f"dtype_bytes must be 2 (fp16) or 4 (fp32), got {dtype_bytes!r}")
    try:
        return _read(data, bits, dtype_bytes)
    except CheckpointError as error:
        raise CheckpointError(f"{origin}: {error}") from error


def _read(data: object, bits: int | None, dtype_bytes: int) -> Sensitivities:
    if not isinstance(data, dict):
        raise CheckpointError(f"a sensitivities file holds a JSON object, not a {type(data).__name__}")
    model = _model(data)
    rows = {name: _row(name, data[name]) for name in model.shapes()}
    if bits is None:
        bits = 4 if statistics.median(row["sqnr_db"] for row in rows.values()) < 42.0 else 8
    spec = QuantSpec(bits, -1, True)
    return Sensitivities(
        fingerprint=None,
        layers={name: LayerInfo(shape, math.prod(shape) * dtype_bytes) for name, shape in model.shapes().items()},
        other_bytes=model.other_weights() * dtype_bytes,
        measurements={(name, spec): _measurement(row) for name, row in rows.items()},
        provenance={
            "model": model.name,
            "source": "kl-ssm-quant, published with arXiv 2604.13440",
            "calibration": "WikiText-2 train, 64 x 512 tokens",
            "dtype_bytes": dtype_bytes,
            "scale": "absmax",
            "perplexity": {str(spec): {name: row["perplexity"] for name, row in rows.items()}},
        },
    )


def read_files(paths: Iterable[str | os.PathLike[str]], *, dtype_bytes: int = 2) -> Sensitivities:
    """Return the merged sensitivities of one model from its published files, one per bit width.

    The bit width is taken from a file name such as ``mamba130m_sensitivity_results_4bits.json``, else from the data.

    Raises:
        CheckpointError: as ``read``; also if two files are for different models, or for the same bit width.
    """
    merged: Sensitivities | None = None
    for path in map(Path, paths):
        data, origin = signed_json.read(path, "sensitivities", _REMEDY)
        named = re.search(r"(?<!\d)([48])bit", path.name)
        one = read(data, bits=int(named[1]) if named else None, dtype_bytes=dtype_bytes, origin=origin)
        merged = one if merged is None else _merge(merged, one, path)
    if merged is None:
        raise InvalidInputError("read_files needs at least one file")
    return merged


def _merge(a: Sensitivities, b: Sensitivities, path: Path) -> Sensitivities:
    if a.provenance["model"] != b.provenance["model"]:
        raise CheckpointError(
            f"{path} is for {b.provenance['model']}, the files before it for {a.provenance['model']}; "
            "read them separately"
        )
    if a.measurements.keys() & b.measurements.keys():
        raise CheckpointError(f"{path} repeats a bit width that was already read; give one file for each")
    perplexity = {
        spec: values
        for one in (a, b)
        for spec, values in signed_json.is_a(dict, one.provenance["perplexity"], "perplexity").items()
    }
    return Sensitivities(
        None,
        a.layers,
        a.other_bytes,
        {**a.measurements, **b.measurements},
        provenance={**a.provenance, "perplexity": perplexity},
    )


def is_published(data: object) -> bool:
    """Return True if parsed JSON has the layers of one of the two models, as the published files do."""
    return isinstance(data, dict) and any(data.keys() == model.shapes().keys() for model in _MODELS)


def _model(data: dict[str, object]) -> _Mamba:
    """Return the model whose layers these are."""
    for model in _MODELS:
        if data.keys() == model.shapes().keys():
            return model
    known = " or ".join(model.name for model in _MODELS)
    raise CheckpointError(
        f"neither klfast's sensitivities nor the published ones of {known}: their layer names differ; check the file"
    )


def _row(name: str, row: object) -> dict[str, float]:
    if not isinstance(row, dict) or row.keys() != _FIELDS:
        raise CheckpointError(f"{name} does not hold the published figures ({', '.join(sorted(_FIELDS))}); {_REMEDY}")
    try:
        return {field: signed_json.number(value, f"{field} of {name}") for field, value in row.items()}
    except ValueError as error:
        raise CheckpointError(f"{error}; {_REMEDY}") from error


def _measurement(row: dict[str, float]) -> Measurement:
    mean = {"kl_student_teacher": row["kl_student_to_teacher"] / _SEQUENCE, "sqnr_db": row["sqnr_db"]}
    return Measurement(mean, dict.fromkeys(mean, math.nan), _TOKENS)
