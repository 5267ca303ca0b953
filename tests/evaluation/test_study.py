"""``study``: what it measures, and how it judges metrics."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from tiny_models import batch, tiny

import klfast
from klfast import Plan, Study
from klfast.core.errors import CheckpointError, InvalidInputError
from klfast.evaluation import studying
from klfast.evaluation.study_results import Alone
from klfast.evaluation.studying import published
from klfast.models.linears import linears
from klfast.reporting.study_tables import study_tables
from klfast.sensitivity.results import LayerInfo, Measurement, Sensitivities

STUDIES = Path(__file__).parents[2] / "bench" / "results" / "study"
LAYER, OTHER = "backbone.layers.1.mixer.x_proj", "lm_head"


@pytest.fixture(scope="module")
def found():
    texts = batch(4, 12), batch(5, 9, seed=3)
    return texts, klfast.study(tiny("mamba"), *texts, ["int4-g16-sym"], layers=[LAYER, OTHER], progress=False)


def test_measures_metrics_and_perplexity_on_halves(found):
    (calibration, held_out), study = found
    alone = study.specs["int4-g16-sym"]
    assert alone.layers == (LAYER, OTHER) and study.provenance["tokens"] == [22, 22, 24, 16]
    teacher = tiny("mamba")
    student = klfast.quantize_model(tiny("mamba"), Plan({LAYER: "int4-g16-sym"}, "uniform"))
    for half in (0, 1):
        truth = klfast.evaluate(student, calibration[half::2], teacher)
        assert alone.metrics["kl_teacher_student"][half, 0] == pytest.approx(truth.kl, rel=1e-3)
        assert alone.metrics["top1_agree"][half, 0] == pytest.approx(-truth.top1_agreement)
        ratio = klfast.evaluate(student, held_out[half::2], teacher)
        change = math.log(ratio.perplexity / ratio.teacher_perplexity)
        assert alone.perplexity[half, 0] == pytest.approx(change, rel=1e-3, abs=1e-6)
    assert alone.metrics["weights"].tolist() == [[linears(teacher)[name].weight.numel() for name in (LAYER, OTHER)]]


def test_an_interrupted_study_goes_on(found, tmp_path):
    texts, study = found
    options = {"specs": ["int4-g16-sym"], "layers": [LAYER, OTHER], "progress": False, "resume": tmp_path / "study"}
    klfast.study(tiny("mamba"), *texts, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["study.1", "study.2", "study.3", "study.4"]
    (tmp_path / "study.4").unlink()
    again = klfast.study(tiny("mamba"), *texts, **options)
    assert (again.specs["int4-g16-sym"].perplexity == study.specs["int4-g16-sym"].perplexity).all()


def overflowing(monkeypatch, *broken):
    """Let candidates, (sweep of the four, layer) each, make NaN."""
    numbers, whole = itertools.count(), studying.sweep

    def sweep(*args, **kwargs):
        made, number = whole(*args, **kwargs), next(numbers)
        for layer in (layer for half, layer in broken if half == number):
            spec = next(spec for name, spec in made.measurements if name == layer)
            del made.measurements[layer, spec]
            made.provenance.setdefault("not_finite", []).append(f"{layer} as {spec}")
        return made

    monkeypatch.setattr(studying, "sweep", sweep)


@pytest.mark.parametrize("half", range(4))
def test_what_breaks_on_one_half_is_left_out_and_named(monkeypatch, half):
    overflowing(monkeypatch, (half, OTHER))
    study = klfast.study(tiny("mamba"), batch(2, 8), batch(2, 8), ["int4-g16-sym"], layers=[LAYER, OTHER])
    alone = study.specs["int4-g16-sym"]
    assert alone.layers == (LAYER,)
    assert {values.shape[1] for values in (alone.perplexity, *alone.metrics.values())} == {1}
    assert study.provenance["not_finite"] == [f"{OTHER} as int4-g16-sym"]
    said = [row[0] for row in study_tables(study)[0].rows]
    assert said[0] == f"{OTHER} as int4-g16-sym left out: the model's outputs become NaN or infinite"


def test_a_precision_in_which_every_layer_breaks(monkeypatch):
    texts = batch(2, 8), batch(2, 8)
    overflowing(monkeypatch, (0, LAYER), (3, OTHER))
    with pytest.raises(InvalidInputError, match=r"nothing to compare: .*x_proj as int4-g16-sym and 1 more left out"):
        klfast.study(tiny("mamba"), *texts, ["int4-g16-sym"], layers=[LAYER, OTHER])
    monkeypatch.undo()
    overflowing(monkeypatch, *((half, LAYER) for half in range(4)))
    study = klfast.study(tiny("mamba"), *texts, ["int4-g16-sym", "int8-g16-sym"], layers=[LAYER])
    assert list(study.specs) == ["int8-g16-sym"]


def test_one_layer_has_no_ranking():
    halves = np.array([[1.0], [2.0]])
    study = Study({"int4-g16-sym": Alone((LAYER,), {"kl_teacher_student": halves, "mse": halves}, halves)})
    for one in study.agreements("int4-g16-sym"):
        assert (one.tau, one.rho, one.gain, one.halves) == (None, None, None, None)
    notes, agreement, *_ = study_tables(study)
    assert notes.rows == ((f"int4-g16-sym was measured on {LAYER} alone; a ranking needs two layers or more",),)
    assert {row[2:] for row in agreement.rows} == {(None, None, None, None)}
    assert "nan" not in json.dumps(agreement.data())


def test_ties_have_no_ranking(made):
    alone = made.specs["int4-channel-sym"]
    tied = Study({"a": Alone(alone.layers, {"kl_teacher_student": 0 * alone.perplexity}, alone.perplexity)})
    first, last = tied.agreements("a")
    assert (first.tau, first.rho, first.halves) == (None, None, None) and last.halves > 0.5


@pytest.fixture
def made():
    """Create a study of 12 layers in which one metric ranks right, one at random and one in reverse."""
    generator = np.random.default_rng(0)
    truth = generator.exponential(size=12)
    halves = np.stack([truth, truth + generator.normal(size=12) / 10])
    metrics = {"kl_teacher_student": halves, "sqnr_db": generator.normal(size=(2, 12)), "mse": -halves[:1]}
    layers = tuple(f"m.layers.{i}.{kind}" for i in range(6) for kind in ("in_proj", "x_proj"))
    return Study({"int4-channel-sym": Alone(layers, metrics, halves)}, {"model": "m"})


def test_agreements(made):
    first, second, third, last = made.agreements("int4-channel-sym")
    alone = made.specs["int4-channel-sym"]
    truth, noise = alone.perplexity.mean(0), alone.metrics["sqnr_db"].mean(0)
    assert (first.tau.value, first.rho.value, first.gain) == pytest.approx((1, 1, None))
    assert second.tau.value == pytest.approx(stats.kendalltau(noise, truth).statistic)
    assert second.rho.value == pytest.approx(stats.spearmanr(noise, truth).statistic)
    assert second.tau.low < second.tau.value < second.tau.high
    assert second.gain.value == pytest.approx(second.tau.value - 1) and second.gain.high < 0
    assert third.tau.value < -0.8 and third.halves is None
    assert (last.metric, last.tau) == ("perplexity", None)
    assert last.halves == pytest.approx(stats.kendalltau(*alone.perplexity).statistic) == first.halves


def test_tables(made):
    agreement, worst, kinds, blocks = study_tables(made, top=3)
    assert [row[1] for row in agreement.rows] == ["kl_teacher_student", "sqnr_db", "mse", "perplexity"]
    layers, added = made.specs["int4-channel-sym"].layers, made.specs["int4-channel-sym"].perplexity.mean(0)
    assert [row[1] for row in worst.rows] == [layers[i] for i in np.argsort(-added)[:3]]
    found = {row[0]: row[1:] for row in (*kinds.rows, *blocks.rows)}
    assert kinds.headings == ("kind", "int4-channel-sym, mean", "int4-channel-sym, median")
    assert found["in_proj"] == pytest.approx((added[::2].mean(), np.median(added[::2])))
    assert found["x_proj"] == pytest.approx((added[1::2].mean(), np.median(added[1::2])))
    assert found["5"] == pytest.approx((added[10:].mean(), added[10:].mean()))


def test_json(made, tmp_path):
    text = made.to_json(tmp_path / "study.json")
    assert Study.from_json(tmp_path / "study.json").to_json() == text
    for broken, match in (
        ("{}", "not a study"),
        ('{"schema": "klfast-study/1", "provenance": {}, "specs": {"a": {"layers": ["x"], "metrics": {}}}}', "damaged"),
        (
            (
                '{"schema": "klfast-study/1", "provenance": {}, '
                '"specs": {"a": {"layers": ["x"], "metrics": {}, "perplexity": [[1, 2]]}}}'
            ),
            "2] figures for 1 layers",
        ),
    ):
        with pytest.raises(CheckpointError, match=match):
            Study.from_json(broken)


def test_layers_that_change_as_many_predictions_tie():
    """Shares of halves sum up differently from layer to layer, and older files round them to seven digits."""
    generator = np.random.default_rng(1)
    counts, truth = generator.integers(1500, 2040, (2, 60)), generator.normal(size=(2, 60))
    counts[1] = 3400 + counts[0] % 7 - counts[0]
    of_sums = stats.kendalltau(counts.sum(0), truth.mean(0)), stats.spearmanr(counts.sum(0), truth.mean(0))
    made = Study({"a": Alone(tuple(map(str, range(60))), {"top1_agree": counts / 2040}, truth)})
    assert len(set(made.specs["a"].metrics["top1_agree"].mean(0))) > len(set(counts.sum(0))), "split by rounding"
    rounded = {"top1_agree": np.round(counts / 2040, 7)}
    again = Study.from_json(made.to_json())
    for study in (made, again, Study({"a": replace(made.specs["a"], metrics=rounded)})):
        first, _ = study.agreements("a")
        assert (first.tau.value, first.rho.value) == pytest.approx([one.statistic for one in of_sums], abs=1e-12)
        assert study.agreements("a") == made.agreements("a")
    assert (again.specs["a"].perplexity == truth).all()


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.json")), ids=lambda path: path.stem)
def test_committed_studies_show_their_committed_tables(path):
    tables = study_tables(Study.from_json(path))
    assert "\n".join(one.markdown() for one in tables) == path.with_suffix(".md").read_text(encoding="utf-8")


def test_published_results():
    names, spec = ["m.layers.0.a", "m.layers.1.a", "lm_head"], klfast.QuantSpec(4, -1)
    measured = {
        (name, spec): Measurement({"kl_student_teacher": n, "sqnr_db": -n}, {}, 10) for n, name in enumerate(names)
    }
    provenance = {"model": "m", "source": "s", "perplexity": {str(spec): {names[0]: 9.0, names[1]: 3.0, names[2]: 4.0}}}
    layers = dict.fromkeys(names, LayerInfo((2, 3), 12))
    study = published(Sensitivities(None, layers, 0, measured, {}, provenance))
    alone = study.specs[str(spec)]
    assert alone.perplexity[0] == pytest.approx([math.log(3), 0, math.log(4 / 3)])
    assert [one.metric for one in study.agreements(str(spec))] == [
        "kl_student_teacher",
        "sqnr_db",
        "weights",
        "perplexity",
    ]
    assert (alone.metrics["sqnr_db"] == alone.metrics["kl_student_teacher"]).all()
    with pytest.raises(InvalidInputError, match="no measured perplexity"):
        published(Sensitivities(None, layers, 0, measured))


def test_refuses_single_windows():
    with pytest.raises(InvalidInputError, match="held_out has one window"):
        klfast.study(tiny("mamba"), batch(2, 5), batch(1, 5), progress=False)


def test_command(made, tmp_path):
    from command_line import fails, klf

    made.to_json(tmp_path / "study.json")
    data = json.loads(klf("study", tmp_path / "study.json", "--json", "--report", tmp_path / "study.md").stdout)
    assert data["tables"][0]["rows"][0][:3] == ["int4-channel-sym", "kl_teacher_student", "1.00 (1.00 to 1.00)"]
    assert "| int4-channel-sym | kl_teacher_student | 1.00 (1.00 to 1.00) |" in (tmp_path / "study.md").read_text()
    assert "give one model" in fails("study", "a", "b", code=2)
    assert "exists" in fails("study", "mamba", "--out", tmp_path / "study.json")
    assert "--report" in fails("study", tmp_path / "study.json", "--out", tmp_path / "other.json", code=2)
