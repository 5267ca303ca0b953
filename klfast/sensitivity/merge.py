"""Reader that merges several sensitivities files of one model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from klfast.core.errors import InvalidInputError, ModelMismatchError
from klfast.models.expert_names import stacked
from klfast.sensitivity import kl_ssm_quant
from klfast.sensitivity.coverage import broken_candidates, share_measured
from klfast.sensitivity.results import Sensitivities


def read(paths: Sequence[str | os.PathLike[str]]) -> Sensitivities:
    """Return the contents of all ``paths``: sweeps of one model with different specs or layers, or its published files.

    Raises:
        InvalidInputError: no path, one candidate measured in two files, sweeps with different scales or roundings, or
            one with and one without ``experts``.
        ModelMismatchError: files for different models.
        CheckpointError: a file is missing or damaged.
    """
    if not paths:
        raise InvalidInputError("no sensitivities file was given")
    found = Sensitivities.from_json(paths[0])
    if found.fingerprint is None:
        return kl_ssm_quant.read_files(paths)
    merged = replace(
        found,
        measurements=dict(found.measurements),
        rows=dict(found.rows),
        activations=dict(found.activations),
        provenance=dict(found.provenance),
    )
    for path in paths[1:]:
        other = Sensitivities.from_json(path)
        is_known = other.fingerprint is not None and other.fingerprint.matches(found.fingerprint)
        if is_known and stacked(other.layers) == stacked(found.layers) and other.layers.keys() != found.layers.keys():
            raise InvalidInputError(
                f"one of {os.fspath(path)} and {os.fspath(paths[0])} has measured experts one by one, the other all of "
                "a layer together; give files of one kind"
            )
        if not is_known or (other.layers, other.other_bytes) != (found.layers, found.other_bytes):
            raise ModelMismatchError(
                f"{os.fspath(path)} and {os.fspath(paths[0])} are for different models; give files for one model"
            )
        if twice := [
            *((name, spec) for name, spec in sorted(other.measurements.keys() & merged.measurements.keys())),
            *((f"{name} ({use})", spec) for name, use, spec in sorted(other.rows.keys() & merged.rows.keys())),
        ]:
            name, spec = twice[0]
            raise InvalidInputError(f"{os.fspath(path)} measures {name} as {spec} again; leave one of the files out")
        merged.measurements.update(other.measurements)
        merged.rows.update(other.rows)
        merged.activations.update(other.activations)  # the same for all specs with such groups
        if broken := [one for each in (merged, other) for one in broken_candidates(each.provenance)]:
            merged.provenance["not_finite"] = broken
        is_one_text = other.provenance.get("calibration_sha256") == found.provenance.get("calibration_sha256")
        if not is_one_text or share_measured(other) != share_measured(merged):
            merged.provenance.pop("ce_teacher", None)  # no single text to predict a perplexity for
        if share_measured(other) < share_measured(merged):
            merged.provenance["micro_batches"] = other.provenance["micro_batches"]
        _add_work(merged, other)
        if other.provenance.get("vocabulary", "full") != merged.provenance.get("vocabulary", "full"):
            merged.provenance["vocabulary"] = "mixed"  # each measurement's standard error has that of its own sample
        if other.provenance.get("suffix", "exact") != merged.provenance.get("suffix", "exact"):
            merged.provenance["suffix"] = "mixed"
        roundings = [one.provenance.get("rounding", "nearest") for one in (other, found)]
        if roundings[0] != roundings[1]:
            both = f"{os.fspath(path)} has costs of {roundings[0]}, {os.fspath(paths[0])} of {roundings[1]}"
            raise InvalidInputError(f"{both}; a plan needs one rounding")
        scales = [one.provenance.get("scale") for one in (found, other)]
        if None in scales:
            merged.provenance.pop("scale", None)
        elif scales[0] != scales[1]:
            both = f"{os.fspath(path)} was swept with scale {scales[1]}, {os.fspath(paths[0])} with {scales[0]}"
            raise InvalidInputError(f"{both}; a plan needs one of them")
    return merged


def _add_work(merged: Sensitivities, other: Sensitivities) -> None:
    """Add to what the merged sweeps took what another one did, where both say it."""
    seconds, more = merged.provenance.get("seconds"), other.provenance.get("seconds")
    if isinstance(seconds, dict) and isinstance(more, dict):
        stages = dict.fromkeys((*seconds, *more))
        merged.provenance["seconds"] = {stage: seconds.get(stage, 0) + more.get(stage, 0) for stage in stages}
    for entry in ("token_forwards", "compared_in_full"):
        count, added = merged.provenance.get(entry), other.provenance.get(entry)
        if isinstance(count, int) and isinstance(added, int):
            merged.provenance[entry] = count + added
