"""klfast bench serve: a real server, its clients, and what they see."""

import csv

import pytest
from command_line import klf

from bench import results


@pytest.mark.slow
def test_a_small_run_shows_rates_and_waits_by_number_of_clients(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # pytest-benchmark would not time
    klf("bench", "serve", "--quick", "--threads", 1, "--device", "cpu", "--out", tmp_path)
    with (tmp_path / "serve.csv").open() as file:
        *loads, cached, uncached = csv.DictReader(file)
    assert [(row["clients"], row["tokens"]) for row in loads] == [("1", "4"), ("4", "4")]
    for row in loads:
        found = {name: float(row[name]) for name in ("tok_s", "first_p50_ms", "between_p50_ms", "median_s")}
        assert found["tok_s"] == pytest.approx(int(row["clients"]) * 4 / found["median_s"], rel=0.01)
        assert 0 < found["first_p50_ms"] <= float(row["first_p99_ms"]) and float(row["error"]) == 0
        assert 0 < found["between_p50_ms"] <= float(row["between_p99_ms"])
    assert float(cached[results.RATIO + uncached["contender"]]) > 0
    table = (tmp_path / "serve.md").read_text()
    assert "| first_p99_ms | between_p50_ms |" in table and "mamba-tiny, 4 at once, 4 tokens each" in table
