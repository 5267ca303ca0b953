"""Sensitivities as JSON: lossless round trips, and damaged or foreign files."""

import json
import math
import os
import stat
from dataclasses import replace

import pytest

from klfast.core.errors import CheckpointError
from klfast.models.fingerprint import Fingerprint
from klfast.quant.spec import QuantSpec
from klfast.sensitivity.results import METRICS, LayerInfo, Measurement, Sensitivities


@pytest.fixture
def sensitivities():
    mean = {metric: 0.1 * i + 1e-17 for i, metric in enumerate(METRICS)} | {"sqnr_db": math.inf}
    stderr = dict.fromkeys(METRICS, math.nan)
    layers = {
        "b.in_proj": LayerInfo((6, 5), 120),
        "a.out_proj": LayerInfo((5, 3), 60),
        "lm_head": LayerInfo((9, 5), 180),
    }
    return Sensitivities(
        Fingerprint("abc", (0.1, 1 / 3, 2.0)),
        layers,
        other_bytes=77,
        measurements={
            ("b.in_proj", QuantSpec(4)): Measurement(mean, stderr, 510),
            ("lm_head", QuantSpec(8, -1, False)): Measurement(
                mean, dict.fromkeys(METRICS, 1e-300), 510, below_noise=True
            ),
        },
        noise_floor={"kl_teacher_student": 3e-12},
        provenance={"model": "tiny", "windows": 2},
        activations={("lm_head", 5): Measurement(mean, stderr, 510, windows=2)},
    )


def test_round_trip(sensitivities, tmp_path):
    path = tmp_path / "s.json"
    text = sensitivities.to_json(path)
    assert path.read_text() == text
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_umask()
    for source in (path, str(path), text):
        back = Sensitivities.from_json(source)
        assert list(back.layers) == list(sensitivities.layers)  # module order, not alphabetical
        assert repr(back) == repr(sensitivities)  # not ==: NaN differs from itself


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_files_without_a_digest_can_be_read(sensitivities):
    data = json.loads(sensitivities.to_json())
    del data["sha256"]
    assert repr(Sensitivities.from_json(json.dumps(data))) == repr(sensitivities)


def test_files_from_before_there_were_activations_can_be_read(sensitivities):
    data = json.loads(sensitivities.to_json())
    del data["sha256"], data["activations"]
    assert repr(Sensitivities.from_json(json.dumps(data))) == repr(replace(sensitivities, activations={}))


def test_flipped_bits_are_found(sensitivities, tmp_path):
    path = tmp_path / "s.json"
    whole, damaging = sensitivities.to_json().encode(), 0
    for bit in range(0, 8 * len(whole), 7):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            found = repr(Sensitivities.from_json(path))
        except CheckpointError as error:
            found = str(error)
            damaging += 1
        assert found == repr(sensitivities) or ("s.json" in found and "\n" not in found), bit
    assert damaging > 100


def test_extra_entries_are_ignored(sensitivities):
    text = sensitivities.to_json(extra={"sweep": {"done": 3}})
    assert json.loads(text)["sweep"] == {"done": 3}
    assert repr(Sensitivities.from_json(text)) == repr(sensitivities)


def test_a_failed_write_leaves_the_old_file(sensitivities, tmp_path, monkeypatch):
    path = tmp_path / "s.json"
    sensitivities.to_json(path)
    before = path.read_text()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    sensitivities.other_bytes = 1
    with pytest.raises(OSError, match="disk full"):
        sensitivities.to_json(path)
    assert path.read_text() == before and os.listdir(tmp_path) == ["s.json"]


@pytest.mark.parametrize("cut", [1, 50, 400, -3])
def test_truncated(sensitivities, tmp_path, cut):
    path = tmp_path / "s.json"
    path.write_text(sensitivities.to_json()[:cut])
    with pytest.raises(CheckpointError, match=r"s\.json is truncated or not valid JSON"):
        Sensitivities.from_json(path)


def test_deeply_nested():
    with pytest.raises(CheckpointError, match=r"the JSON text is truncated or not valid JSON .*nested too deeply"):
        Sensitivities.from_json("[" * 200_000)


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read sensitivities from .*nothing\.json: No such file"):
        Sensitivities.from_json(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d.update(schema="klfast-sensitivities/9"), "has schema 'klfast-sensitivities/9'"),
        (lambda d: d.update(schema="klfast-plan/1"), "is a plan; .* --plan PLAN"),
        (lambda d: d.pop("layers"), "damaged"),
        (lambda d: d.update(layers=[1]), "damaged"),
        (lambda d: d["measurements"][0].update(spec="int3"), "damaged .*int3"),
        (lambda d: d["measurements"][0].update(layer="nowhere"), "'nowhere'"),
        (lambda d: d["activations"][0].update(layer="nowhere"), "'nowhere'"),
        (lambda d: d["activations"][0].update(group=0), "damaged .group is 0"),
        (lambda d: d["measurements"][0]["mean"].update(jsd=None), "damaged"),
        (lambda d: d.update(other_bytes="many"), "damaged"),
        (lambda d: d.update(fingerprint={"structure": "x"}), "damaged .it lacks 'norms'"),
        (lambda d: d["fingerprint"]["norms"].pop(), "damaged .it has 2 norms for 3 layers"),
        (lambda d: d["fingerprint"]["norms"].__setitem__(0, 10**400), "damaged .a norm is 1000.*, not a finite number"),
        (lambda d: d.update(other_bytes=10**400), "damaged .other_bytes is 1000"),
        (lambda d: d.update(other_bytes=math.inf), "damaged .other_bytes is inf"),
        (lambda d: d.update(other_bytes=-1), "damaged .other_bytes is -1"),
        (lambda d: d["layers"]["lm_head"].update(float_bytes=math.inf), "damaged .float_bytes of lm_head is inf"),
        (lambda d: d["layers"]["lm_head"].update(shape=[9, 5, 1]), "damaged"),
        (lambda d: d["layers"]["lm_head"].update(shape=[9, math.nan]), "damaged .the shape of lm_head is nan"),
        (lambda d: d["measurements"][0].update(tokens=1e400), "damaged .tokens is inf"),
        (lambda d: d["measurements"][0].update(tokens=0), "damaged .tokens is 0"),
        (lambda d: d["measurements"][0].update(below_noise="no"), "damaged .below_noise is 'no'"),
        (
            lambda d: d["measurements"][0]["mean"].update(kl_teacher_student=10**400),
            "damaged .kl_teacher_student is 1000",
        ),
        (
            lambda d: d["measurements"][0]["mean"].update(kl_teacher_student=1e308),
            r"damaged .kl_teacher_student is 1e\+308, not a finite number of at most 3.4e\+38",
        ),
        (
            lambda d: d["measurements"][0]["mean"].update(kl_teacher_student="nan"),
            "damaged .kl_teacher_student is 'nan'",
        ),
        (lambda d: d["measurements"][0]["mean"].update(jsd="inf"), "damaged .jsd is 'inf'"),
        (lambda d: d["measurements"][0]["mean"].update(jsd=math.nan), "damaged .jsd is nan"),
        (lambda d: d["measurements"][0]["stderr"].update(jsd="inf"), "damaged .the standard error of jsd is 'inf'"),
        (lambda d: d["noise_floor"].update(kl_teacher_student="inf"), "damaged .kl_teacher_student is 'inf'"),
        (lambda d: d["provenance"].update(ce_teacher=10**400), "damaged .ce_teacher is 1000"),
        (lambda d: d.update(provenance=[]), "damaged .provenance is .., not an object"),
        (lambda d: d["measurements"][0]["mean"].update(jsd=0.25), 'damaged .its content does not match its "sha256"'),
    ],
)
def test_foreign_or_damaged(sensitivities, damage, message):
    data = json.loads(sensitivities.to_json())
    damage(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        Sensitivities.from_json(json.dumps(data))
    assert "\n" not in str(caught.value)
