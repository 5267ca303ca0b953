"""Merging several sensitivities files: which ones fit together."""

from dataclasses import replace
from itertools import permutations

import pytest

from klfast.core.errors import InvalidInputError, ModelMismatchError
from klfast.models.fingerprint import Fingerprint
from klfast.quant.spec import QuantSpec
from klfast.sensitivity import merge
from klfast.sensitivity.coverage import measured_note, unfinished_note
from klfast.sensitivity.results import LayerInfo, Measurement, Sensitivities

KL = "kl_teacher_student"
INT4, INT8 = QuantSpec(4), QuantSpec(8)


def made(spec, norms=(1.0, 2.0), layer="a", **provenance):
    measured = {(layer, spec): Measurement({KL: 0.1}, {KL: 0.01}, 64)}
    layers = {"a": LayerInfo((8, 64), 2048), "b": LayerInfo((8, 64), 2048)}
    return Sensitivities(Fingerprint("x", norms), layers, 100, measured, {KL: 1e-9}, {"scale": "absmax", **provenance})


def read(folder, *parts):
    paths = [folder / f"{i}.json" for i in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        part.to_json(path)
    return merge.read(paths)


def test_files_whose_norms_differ_slightly_are_merged(tmp_path):
    found = read(tmp_path, made(INT4), made(INT8, norms=(1.0000001, 1.99)))
    assert set(found.measurements) == {("a", INT4), ("a", INT8)}
    with pytest.raises(ModelMismatchError, match=r"1\.json and .*0\.json are for different models"):
        read(tmp_path, made(INT4), made(INT8, norms=(1.0, 2.1)))
    with pytest.raises(ModelMismatchError, match="different models"):
        read(tmp_path, made(INT4), replace(made(INT8), fingerprint=None))


def test_one_candidate_in_two_files(tmp_path):
    with pytest.raises(InvalidInputError, match="measures a as int4-g64-sym again"):
        read(tmp_path, made(INT4), made(INT4))
    row = {("a", "gate", INT4): Measurement({KL: 0.1}, {KL: 0.01}, 64)}
    with pytest.raises(InvalidInputError, match=r"measures a \(gate\) as int4-g64-sym again"):
        read(tmp_path, replace(made(INT4), rows=row), replace(made(INT8), rows=row))
    with pytest.raises(InvalidInputError, match="measures a as int4-g64-sym again"):
        read(tmp_path, replace(made(INT4), rows=row), replace(made(INT4), rows=row))


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_the_least_complete_sweep_counts(tmp_path, order):
    parts = (
        made(INT4, micro_batches=[8, 8], ce_teacher=3.0),
        made(INT8, micro_batches=[1, 8], ce_teacher=2.0),
        made(QuantSpec(6), micro_batches=[6, 8], ce_teacher=2.5),
    )
    for part in parts:
        part.measurements |= {("b", spec): one for (_, spec), one in part.measurements.items()}
    merged = read(tmp_path, *(parts[i] for i in order))
    assert "measured 1 of 8 parts" in unfinished_note(merged)
    assert "ce_teacher" not in merged.provenance  # that of no one text


def test_a_sweep_that_does_not_say_its_progress_counts_as_complete(tmp_path):
    ended = read(tmp_path, made(INT4), made(INT8, micro_batches=[8, 8], ce_teacher=3.0))
    assert unfinished_note(ended) is None
    for order in (0, 1), (1, 0):
        parts = made(INT4), made(INT8, micro_batches=[2, 8])
        assert unfinished_note(read(tmp_path, *(parts[i] for i in order)))


def test_what_the_sweeps_took_is_added_up(tmp_path):
    one = {"seconds": {"teacher": 1.0, "blocks": 4.0}, "token_forwards": 100, "compared_in_full": 2}
    two = {"seconds": {"blocks": 3.0, "head": 2.0}, "token_forwards": 50, "compared_in_full": 1}
    merged = read(tmp_path, made(INT4, **one), made(INT8, **two)).provenance
    assert merged["seconds"] == {"teacher": 1.0, "blocks": 7.0, "head": 2.0}
    assert (merged["token_forwards"], merged["compared_in_full"]) == (150, 3)


def test_scales_must_agree(tmp_path):
    assert read(tmp_path, made(INT4), made(INT8)).provenance["scale"] == "absmax"
    with pytest.raises(InvalidInputError, match=r"1\.json was swept with scale mse, .*0\.json with absmax"):
        read(tmp_path, made(INT4), made(INT8, scale="mse"))
    unknown = made(INT8)
    del unknown.provenance["scale"]
    assert "scale" not in read(tmp_path, made(INT4), unknown).provenance


def test_roundings_must_agree(tmp_path):
    assert read(tmp_path, *(made(spec, rounding="gptq") for spec in (INT4, INT8))).provenance["rounding"] == "gptq"
    with pytest.raises(InvalidInputError, match=r"1\.json has costs of gptq, .*0\.json of nearest; a plan needs one"):
        read(tmp_path, made(INT4), made(INT8, rounding="gptq"))


def test_activations_of_all_files_are_kept(tmp_path):
    first, second = ({("a", group): Measurement({KL: 0.1}, {KL: 0.01}, group)} for group in (64, 32))
    found = read(tmp_path, replace(made(INT4), activations=first), replace(made(INT8), activations=first | second))
    assert found.activations == first | second


def test_samples_of_the_vocabulary_may_differ(tmp_path):
    merged = read(tmp_path, made(INT4, vocabulary=128), made(INT8, vocabulary="full"))
    assert merged.provenance["vocabulary"] == "mixed"
    assert measured_note(merged) == "KL from a sample of the vocabulary (in part)"
    alike = read(tmp_path, made(INT4, vocabulary=128), made(INT8, vocabulary=128))
    assert measured_note(alike) == "KL from a sample of the vocabulary (128 entries a token)"
    assert measured_note(read(tmp_path, made(INT4), made(INT8, vocabulary="full"))) is None
