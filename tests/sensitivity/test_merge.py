"""Merging several sensitivities files: which ones fit together."""

from dataclasses import replace

import pytest

from klfast.core.errors import InvalidInputError, ModelMismatchError
from klfast.models.fingerprint import Fingerprint
from klfast.quant.spec import QuantSpec
from klfast.sensitivity import merge
from klfast.sensitivity.coverage import measured_note
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
    with pytest.raises(InvalidInputError, match="measures a as int4-g64-sym again"):
        read(tmp_path, replace(made(INT4), rows=row), replace(made(INT8), rows=row))


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
