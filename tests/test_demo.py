"""``klfast demo`` on a bundled model: the table and the relations in it."""

import csv
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import klfast
from klfast import demo
from klfast.checkpoint.by_name import load_model
from klfast.cli import app
from klfast.models.linears import linears
from klfast.reporting.grouping import kind

EFFORT = demo.Effort(calibration_windows=2, evaluation_windows=12, length=128, new_tokens=8)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    said = []
    result = demo.run(effort=EFFORT, out=tmp_path_factory.mktemp("demo") / "mixed", say=said.append)
    return result, said


def rows(result):
    return {row.variant: row for row in result.rows}


@pytest.mark.slow
def test_mixed_model_beats_uniform_int4_of_about_its_size(ran):
    found = rows(ran[0])
    uniform, fine, mixed = found["uniform INT4"], found["uniform INT4, groups of 32"], found["KL-planned mixed"]
    assert mixed.bytes <= 1.05 * uniform.bytes and mixed.kl < 0.9 * uniform.kl
    assert mixed.bytes < fine.bytes and mixed.kl < fine.kl
    assert mixed.kl < 1.05 * found["SQNR-planned mixed"].kl  # a tie, on so little text


def test_other_variants_rank_as_expected(ran):
    found = rows(ran[0])
    full, int8, int4 = found["full precision"], found["uniform INT8"], found["uniform INT4"]
    assert full.kl == pytest.approx(0, abs=1e-9) and full.top1_agreement == 1.0 and full.bits_per_weight == 16
    assert full.bytes > int8.bytes > int4.bytes
    assert 8 < int8.bits_per_weight < 8.5 and 4 < int4.bits_per_weight < 4.5
    assert full.kl < int8.kl < int4.kl


def test_findings_on_sensitivity(ran):
    result = ran[0]
    places, *uses = result.sensitivities
    kinds = [row[0] for row in places.rows[:-1]]
    assert set(kinds) == {kind(name) for name in linears(load_model(result.model))} - {"lm_head"}
    costs = [row[-1] for row in places.rows[:-1]]
    assert costs == sorted(costs, reverse=True) and min(costs) > 0
    assert result.findings[0].startswith(
        f"Most sensitive within the blocks: {kinds[0]}. One layer in int4-g64-sym costs, in nats: {kinds[0]} "
    )
    assert any(sentence.startswith("Outside of the blocks: lm_head ") for sentence in result.findings)
    assert [len(table.rows) for table in uses] == ([5] if result.model == "hymba" else [])


def test_saved_model_is_the_one_in_the_table(ran):
    result = ran[0]
    file = Path(result.saved, "model.safetensors")
    mixed, tensors = rows(result)["KL-planned mixed"], load_file(file)
    assert mixed.bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert mixed.bytes < file.stat().st_size <= mixed.bytes + 200 * len(tensors)
    assert result.saved in " ".join(ran[1]) and len(result.continuation) > 0


def test_results_as_markdown_and_csv(ran, tmp_path):
    demo.write_results(ran[0], tmp_path)
    with open(tmp_path / "demo.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["variant"] for row in read] == [row.variant for row in ran[0].rows]
    assert float(read[0]["perplexity"]) == ran[0].rows[0].perplexity
    assert read[0]["torch"] == torch.__version__ and read[0]["threads"] == str(torch.get_num_threads())
    text = (tmp_path / "demo.md").read_text()
    assert all(part in text for part in ("| KL-planned mixed |", "threads", ran[0].findings[0], "| all kinds |"))


@pytest.mark.slow
def test_command(ran, tmp_path, monkeypatch):
    """A second run gives the same figures."""
    monkeypatch.setattr(demo, "QUICK", EFFORT)
    arguments = ["demo", "--quick", "--out", str(tmp_path / "mixed"), "--results", str(tmp_path)]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["rows"] == [asdict(row) for row in ran[0].rows] and data["continuation"] == ran[0].continuation
    tables = [table.data() | {"rows": list(map(list, table.rows))} for table in ran[0].sensitivities]
    assert data["sensitivities"] == tables and data["findings"]
    assert (tmp_path / "demo.md").exists()
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1 and again.stderr == f"klfast: {tmp_path / 'mixed'} exists; name another --out\n"
    assert klfast.load_quantized(tmp_path / "mixed") is not None


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_temporary_folder_stays_only_if_the_demo_ends_well(tmp_path, monkeypatch, error):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with demo._place(None) as saved:
        saved.mkdir()
    assert saved.is_dir() and saved.parent.parent == tmp_path

    def stopped():
        with demo._place(None) as left:
            left.mkdir()
            raise error

    with pytest.raises(error):
        stopped()
    assert list(tmp_path.iterdir()) == [saved.parent]
