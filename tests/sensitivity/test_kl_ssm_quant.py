"""Reading the published kl-ssm-quant sensitivities, and planning from them.

The files are not bundled: tests that need them read ../shared/published beside the checkout, or else are skipped.
"""

import json
import math
from pathlib import Path

import pytest
from scipy.stats import kendalltau

from klfast.core.errors import CheckpointError, InvalidInputError
from klfast.planning import plan
from klfast.quant.spec import QuantSpec
from klfast.reporting.results_folder import ResultFiles
from klfast.sensitivity import kl_ssm_quant, merge
from klfast.sensitivity.results import Sensitivities

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "published"
INT4, INT8 = QuantSpec(4, -1), QuantSpec(8, -1)
MIB = 2**20

needs_files = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="../shared/published, with the published sensitivities, is absent"
)


def path(model, bits):
    return FOLDER / f"{model}_sensitivity_results_{bits}bits.json"


def row(kl=51.2, sqnr=20.0):
    return {
        "perplexity": 26.0,
        "sqnr_db": sqnr,
        "kl_teacher_to_student": 4.9e8,
        "kl_student_to_teacher": kl,
        "delta_cross_entropy": 0.1,
    }


def rows(sqnr=20.0):
    """Return the content of a made-up file for the smaller model."""
    names = [
        f"backbone.layers.{i}.mixer.{kind}" for i in range(24) for kind in ("in_proj", "x_proj", "dt_proj", "out_proj")
    ]
    return {name: row(sqnr=sqnr) for name in [*names, "lm_head"]}


def test_keeps_only_the_figures_without_defects():
    found = kl_ssm_quant.read(rows())
    assert found.provenance["scale"] == "absmax"
    assert found.fingerprint is None and found.provenance["model"] == "state-spaces/mamba-130m"
    measurement = found.measurements["lm_head", INT4]
    assert measurement.mean == {"kl_student_teacher": 0.1, "sqnr_db": 20.0}
    assert measurement.tokens == 64 * 512 and all(map(math.isnan, measurement.stderr.values()))
    assert found.provenance["perplexity"]["int4-channel-sym"]["lm_head"] == 26.0
    assert {spec for _, spec in kl_ssm_quant.read(rows(sqnr=50.0)).measurements} == {INT8}
    assert {spec for _, spec in kl_ssm_quant.read(rows(sqnr=50.0), bits=4).measurements} == {INT4}


@pytest.mark.parametrize(
    ("config", "names"),
    [({"hidden_size": 768, "num_hidden_layers": 24}, rows()), ({"hidden_size": 2048, "num_hidden_layers": 48}, None)],
)
def test_sizes_match_transformers(config, names):
    import torch
    from transformers import MambaConfig, MambaForCausalLM

    with torch.device("meta"):
        model = MambaForCausalLM(MambaConfig(**config, vocab_size=50280))
    shapes = {name: tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    found = kl_ssm_quant.read(names or dict.fromkeys(shapes, row()), dtype_bytes=4)
    assert {name: info.shape for name, info in found.layers.items()} == shapes
    total = sum(info.float_bytes for info in found.layers.values()) + found.other_bytes
    assert total == 4 * sum(p.numel() for p in model.parameters())  # tied: parameters() gives the embedding once


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data.pop("lm_head"), "layer names differ"),
        (lambda data: data.update(extra=row()), "layer names differ"),
        (lambda data: data["lm_head"].pop("sqnr_db"), "lm_head does not hold"),
        (lambda data: data["lm_head"].update(sqnr_db="20"), "sqnr_db of lm_head is '20'"),
        (lambda data: data["lm_head"].update(perplexity=math.nan), "perplexity of lm_head is nan"),
        (lambda data: data["lm_head"].update(perplexity=10**400), "perplexity of lm_head is 1000"),
        (lambda data: data.update(lm_head=3), "lm_head does not hold"),
    ],
)
def test_unknown_and_damaged_files(damage, message, tmp_path):
    data = rows()
    damage(data)
    with pytest.raises(CheckpointError, match=message):
        kl_ssm_quant.read(data)
    file = tmp_path / "results_4bits.json"
    file.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=f"results_4bits.json: .*{message}"):
        kl_ssm_quant.read_files([file])
    with pytest.raises(CheckpointError, match=f"results_4bits.json: .*{message}"):
        Sensitivities.from_json(file)


def test_a_folder_of_published_files_is_recognized(tmp_path):
    named = [tmp_path / f"mamba130m_sensitivity_results_{bits}bits.json" for bits in (4, 8)]
    for file, sqnr in zip(named, (30.0, 50.0), strict=True):
        file.write_text(json.dumps(rows(sqnr)))
    (tmp_path / "other.json").write_text(json.dumps({"a": row()}))
    assert ResultFiles.of([tmp_path]).sensitivities == named
    merged = merge.read(ResultFiles.of([tmp_path]).sensitivities)
    assert {spec for _, spec in merged.measurements} == {INT4, INT8}
    merged.to_json(tmp_path / "swept.json")  # a file of klfast comes first
    assert ResultFiles.of([tmp_path]).sensitivities == [tmp_path / "swept.json"]


def test_files_that_do_not_go_together(tmp_path):
    four, other, large = tmp_path / "4bits.json", tmp_path / "other_4bits.json", tmp_path / "large_8bits.json"
    for file in (four, other):
        file.write_text(json.dumps(rows()))
    names = [
        f"backbone.layers.{i}.mixer.{kind}" for i in range(48) for kind in ("in_proj", "x_proj", "dt_proj", "out_proj")
    ]
    large.write_text(json.dumps({name: row() for name in [*names, "lm_head"]}))
    with pytest.raises(CheckpointError, match=r"other_4bits.json repeats a bit width"):
        kl_ssm_quant.read_files([four, other])
    with pytest.raises(CheckpointError, match=r"large_8bits.json is for state-spaces/mamba-1.4b"):
        kl_ssm_quant.read_files([four, large])
    with pytest.raises(CheckpointError, match=r"absent\.json"):
        kl_ssm_quant.read_files([tmp_path / "absent.json"])
    with pytest.raises(InvalidInputError, match="at least one file"):
        kl_ssm_quant.read_files([])
    with pytest.raises(InvalidInputError, match="dtype_bytes"):
        kl_ssm_quant.read(rows(), dtype_bytes=3)
    with pytest.raises(CheckpointError, match="JSON object, not a list"):
        kl_ssm_quant.read([])


@needs_files
@pytest.mark.parametrize("model", ["mamba130m", "mamba1_4b"])
@pytest.mark.parametrize("bits", [4, 8])
def test_bits_are_inferred_from_the_data(model, bits):
    found = Sensitivities.from_json(path(model, bits))
    assert {spec for _, spec in found.measurements} == {QuantSpec(bits, -1)}
    assert len(found.measurements) == len(found.layers)


@needs_files
@pytest.mark.parametrize(("model", "kl", "sqnr"), [("mamba130m", 0.839, 0.690), ("mamba1_4b", 0.831, 0.792)])
def test_kendall_tau_at_4_bits(model, kl, sqnr):
    found = kl_ssm_quant.read_files([path(model, 4)])
    perplexity = found.provenance["perplexity"][str(INT4)]
    names = [name for name in found.layers if name != "lm_head"]
    for metric, sign, expected in (("kl_student_teacher", 1, kl), ("sqnr_db", -1, sqnr)):
        values = [sign * found.measurements[name, INT4].mean[metric] for name in names]
        assert kendalltau(values, [perplexity[name] for name in names]).statistic == pytest.approx(expected, abs=6e-4)


@needs_files
def test_optimum_of_the_larger_model():
    """The mixed optimum is within 0.1 nat at the size of the paper's uniform INT4 (723 MB, perplexity 60, not 11.2)."""
    found = kl_ssm_quant.read_files([path("mamba1_4b", bits) for bits in (4, 8)])
    uniform = plan(found, method="uniform", spec=INT4)
    assert uniform.predicted["kl"] == pytest.approx(2.675, abs=0.001)
    for mib, most in ((720, 0.0917), (723, 0.0842)):
        made = plan(found, max_bytes=mib * MIB)
        assert made.predicted["bytes"] <= mib * MIB
        assert made.predicted["kl"] == pytest.approx(most, abs=1e-4)
        assert made.specs["lm_head"] == INT8
        assert sum(spec == INT4 for spec in made.specs.values()) in range(160, 191)
        assert plan(found, max_kl=made.predicted["kl"]).predicted["bytes"] <= made.predicted["bytes"]
        for other in (
            plan(found, max_bytes=mib * MIB, method="greedy"),
            plan(found, max_bytes=mib * MIB, metric="sqnr_db"),
        ):
            assert other.predicted["kl"] > made.predicted["kl"]
