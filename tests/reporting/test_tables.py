"""klfast.reporting: figures and renderings of the tables."""

import io
import json
import math
import re

import pytest

import klfast
from klfast.core.errors import InvalidInputError, ModelMismatchError
from klfast.models.fingerprint import Fingerprint
from klfast.planning.plan_file import Plan
from klfast.quant.spec import QuantSpec
from klfast.reporting import plot, table
from klfast.reporting import sweep_tables as sweep_module
from klfast.reporting.activation_table import activation_costs
from klfast.reporting.grouping import kind
from klfast.reporting.plan_tables import plan_by_layer, plan_tables
from klfast.reporting.sweep_tables import agreement, by_kind, by_kind_and_depth, by_use, ranking, sweep_tables
from klfast.sensitivity.results import LayerInfo, Measurement, Sensitivities

INT4, INT8 = QuantSpec(4, 32), QuantSpec(8, 32)
NAMES = [
    "backbone.layers.0.mixer.in_proj",
    "backbone.layers.0.mixer.x_proj",
    "backbone.layers.1.mixer.in_proj",
    "backbone.layers.1.mixer.x_proj",
    "lm_head",
]


@pytest.fixture
def found():
    """KL of 0.01 to 0.05 at 4 bits, a hundredth of that at 8; the SQNR ranks the same except for one pair."""
    measurements = {}
    for n, name in enumerate(NAMES):
        for spec, scale in ((INT4, 1e-2), (INT8, 1e-4)):
            mean = {"kl_teacher_student": scale * (n + 1), "sqnr_db": 30.0 - [0, 2, 1, 3, 4][n]}
            measurements[name, spec] = Measurement(
                mean, {"kl_teacher_student": 1e-5, "sqnr_db": math.nan}, 10, below_noise=scale < 1e-3
            )
    return Sensitivities(None, {name: LayerInfo((64, 64), 8192) for name in NAMES}, 100, measurements)


def titled(tables, start):
    return next(t for t in tables if t.title.startswith(start))


def test_sweep_figures(found):
    tables = sweep_tables(found, top=2)
    assert titled(tables, "Most").rows[:2] == (
        ("int4-g32-sym", "lm_head", 0.05, 1e-5, ""),
        ("int4-g32-sym", "backbone.layers.1.mixer.x_proj", 0.04, 1e-5, ""),
    )
    assert [row[4] for row in titled(tables, "Most").rows] == ["", "", "below", "below"]
    kinds = {row[0]: row[1:] for row in titled(tables, "By kind").rows}
    assert kinds["in_proj"] == pytest.approx((0.02, 0.0002)) and kinds["x_proj"] == pytest.approx((0.03, 0.0003))
    assert list(kinds) == ["in_proj", "x_proj", "lm_head"]
    depths = {row[0]: row[1:] for row in titled(tables, "By depth").rows}
    assert [row[0] for row in titled(tables, "By kind and depth in int4-g32-sym").rows] == [
        "x_proj",
        "in_proj",
        "all kinds",
    ]
    assert list(depths) == ["0", "1"] and depths["1"] == pytest.approx((0.035, 0.00035))
    # four layers in blocks, one of six pairs reversed: (5 - 1) / 6
    assert titled(tables, "Kendall").rows[0] == ("int4-g32-sym", "sqnr_db", pytest.approx(4 / 6), 4)


def test_by_kind_and_depth(found):
    places = by_kind_and_depth(found, "kl_teacher_student", INT4)
    assert places.headings == ("kind", "block 0", "block 1", "all blocks")
    expected = (("x_proj", 0.02, 0.04, 0.03), ("in_proj", 0.01, 0.03, 0.02), ("all kinds", 0.015, 0.035, 0.025))
    assert [(row[0], *map(pytest.approx, row[1:])) for row in expected] == [tuple(row) for row in places.rows]
    assert [row[0] for row in by_kind_and_depth(found, "sqnr_db", INT4).rows] == ["x_proj", "in_proj", "all kinds"]
    deep = {f"m.layers.{i}.up": found.measurements[NAMES[0], INT4] for i in range(8)}
    many = Sensitivities(
        None, dict.fromkeys(deep, found.layers[NAMES[0]]), 0, {(name, INT4): m for name, m in deep.items()}
    )
    assert by_kind_and_depth(many, "kl_teacher_student", INT4).headings == (
        "kind",
        "blocks 0-2",
        "blocks 3-4",
        "blocks 5-7",
        "all blocks",
    )
    assert not by_kind_and_depth(many, "kl_teacher_student", INT8).rows


def test_metrics_where_more_is_better_are_ranked_ascending(found):
    assert [row[1] for row in ranking(found, "sqnr_db", 5).rows[:5]] == [NAMES[i] for i in (4, 3, 1, 2, 0)]
    with pytest.raises(InvalidInputError, match=r"jsd was not measured.*choose one of kl_teacher_student, sqnr_db"):
        sweep_tables(found, "jsd")
    with pytest.raises(InvalidInputError, match="no measurements"):
        sweep_tables(Sensitivities(None, {}, 0))


def test_rows_are_grouped_once(found, monkeypatch):
    """Of experts one by one there are thousands: a look at all rows for each kind, use and spec takes minutes."""
    asked = []
    monkeypatch.setattr(sweep_module, "kind", lambda name: asked.append(name) or kind(name))
    rows = {
        (name, use, spec): Measurement({"kl_teacher_student": 10 * n + len(use) + spec.bits / 100}, {}, 10)
        for n, name in enumerate(NAMES)
        for use in ("dt", "gate")
        for spec in (INT8, INT4)
        if (use, spec) != ("gate", INT8)
    }
    found.rows = rows
    made = by_use(found, "kl_teacher_student")
    assert made.headings == ("kind", "rows", "int4-g32-sym", "int8-g32-sym")
    assert len(asked) == len(rows)
    for label, use, *means in made.rows:
        for spec, mean in zip((INT4, INT8), means, strict=True):
            some = [
                rows[key].mean["kl_teacher_student"] for key in rows if (kind(key[0]), *key[1:]) == (label, use, spec)
            ]
            assert mean == (pytest.approx(sum(some) / len(some)) if some else None)
    assert [row[:2] for row in made.rows[:2]] == [("in_proj", "dt"), ("in_proj", "gate")] and len(made.rows) == 6
    asked.clear()
    by_kind(found, "kl_teacher_student")
    assert len(asked) == len(NAMES)


def test_unfinished_sweeps_leave_cells_empty(found):
    del found.measurements[NAMES[4], INT8]
    kinds = by_kind(found, "kl_teacher_student")
    assert kinds.rows[2] == ("lm_head", 0.05, None)
    assert "| lm_head | 0.05 |  |" in kinds.markdown()


def test_published_perplexity_is_compared(found):
    found.provenance["perplexity"] = {"int4-g32-sym": {name: 20.0 + n for n, name in enumerate(NAMES)}}
    rows = agreement(found, "kl_teacher_student").rows
    assert ("int4-g32-sym", "perplexity", pytest.approx(1.0), 4) in rows
    assert not any(row[:2] == ("int8-g32-sym", "perplexity") for row in rows)


def test_plan_tables(found):
    plan = Plan(
        {NAMES[0]: INT4, NAMES[2]: INT8, NAMES[4]: INT8},
        "optimal",
        None,
        {"bytes": 1234567, "kl": 0.0123456, "perplexity": 12.5},
        ("a | note",),
    )
    facts, layers = plan_tables(plan, found)
    assert layers.headings == ("kind", "int4-g32-sym", "int8-g32-sym", "full precision")
    assert layers.rows == (("in_proj", 1, 1, 0), ("x_proj", 0, 0, 2), ("lm_head", 0, 1, 0))
    assert ("kl", 0.0123456) in facts.rows
    perplexity = "perplexity on the calibration text, if the layers' contributions are additive"
    assert (perplexity, 12.5) in facts.rows
    assert "| bytes | 1,234,567 |" in facts.markdown() and "a \\| note" in facts.markdown()
    assert plan_tables(plan)[1].headings == ("kind", "int4-g32-sym", "int8-g32-sym")


def test_plan_by_layer(found):
    g48 = QuantSpec(4, 48)  # stored as groups of 32, since 64 inputs are not a multiple of 48
    found.measurements[NAMES[3], g48] = Measurement({"kl_teacher_student": 0.5, "sqnr_db": 1.0}, {}, 10)
    found.measurements.pop((NAMES[3], INT4))
    plan = Plan({NAMES[0]: INT4, NAMES[2]: INT8, NAMES[3]: INT4, NAMES[4]: QuantSpec(8, 16)}, "optimal")
    rows = {
        NAMES[0]: ("int4-g32-sym", 2320, 0.01),
        NAMES[1]: ("full precision", 8192, None),
        NAMES[2]: ("int8-g32-sym", 4368, 0.0003),
    }
    rows |= {NAMES[3]: ("int4-g32-sym", 2320, 0.5), NAMES[4]: ("int8-g16-sym", 4624, None)}
    by_layer = plan_by_layer(plan, found)
    assert by_layer.headings == ("layer", "precision", "bytes", "kl_teacher_student")
    assert {row[0]: row[1:] for row in by_layer.rows} == {
        name: (*row[:2], row[2] and pytest.approx(row[2])) for name, row in rows.items()
    }
    assert plan_by_layer(plan, found, "sqnr_db").rows[0][3] == 30.0
    for spec, kl in ((INT4, 0.25), (g48, 0.5)):  # in this order: the second must not replace the first
        found.measurements.pop((NAMES[3], spec), None)
        found.measurements[NAMES[3], spec] = Measurement({"kl_teacher_student": kl, "sqnr_db": 1.0}, {}, 10)
    assert plan_by_layer(plan, found).rows[3][3] == 0.25
    for strange in (Plan({"other": INT4}, "optimal"), Plan({}, "optimal", Fingerprint("x", (1.0,)))):
        found.fingerprint = Fingerprint("x", (2.0,))
        with pytest.raises(ModelMismatchError, match="different models"):
            plan_by_layer(strange, found)


def test_plans_show_their_activations(found):
    activations = {NAMES[0]: "int8", NAMES[2]: "exact"}
    plan = Plan({NAMES[0]: INT4, NAMES[2]: INT8, NAMES[4]: INT4}, "optimal", activations=activations)
    by_precision = plan_tables(plan, found)[1]
    assert by_precision.headings[-2:] == ("full precision", "int8 activations")
    assert [(row[0], row[-1]) for row in by_precision.rows] == [("in_proj", 1), ("x_proj", 0), ("lm_head", 0)]
    by_layer = plan_by_layer(plan, found)
    assert by_layer.headings[4:] == ("activations",)
    assert [row[4] for row in by_layer.rows] == ["int8", None, "exact", None, None]


def test_costs_of_int8_activations(found):
    """A KL of 1e-3 beside 1e-2 to 5e-2 at 4 bits: below a tenth of it but in the first layer."""
    assert not activation_costs(found).rows
    for name in NAMES:
        found.activations[name, 32] = Measurement({"kl_teacher_student": 1e-3}, {}, 10)
    rows = {row[:2]: row[2:] for row in activation_costs(found).rows}
    assert list(rows) == [(kind, str(spec)) for kind in ("in_proj", "x_proj", "lm_head") for spec in (INT4, INT8)]
    assert rows["in_proj", "int4-g32-sym"] == (pytest.approx(0.02), pytest.approx(1e-3), pytest.approx(0.05), 1, 2)
    assert rows["x_proj", "int8-g32-sym"] == (pytest.approx(3e-4), pytest.approx(1e-3), pytest.approx(10 / 3), 0, 2)
    assert rows["lm_head", "int4-g32-sym"][3:] == (1, 1)
    assert titled(sweep_tables(found), "Int8 activations").rows == activation_costs(found).rows


def test_unfinished_sweeps_are_noted(found):
    assert not any("nfinished" in one.title for one in sweep_tables(found))
    found.provenance["micro_batches"] = [8, 8]
    assert not any("nfinished" in one.title for one in sweep_tables(found))
    found.provenance["micro_batches"] = [3, 8]
    [note] = sweep_tables(found)[0].rows[0]
    assert "unfinished: it has measured 3 of 8 parts" in note
    found.provenance["micro_batches"] = [0, 8]
    for name in NAMES[3:]:
        del found.measurements[name, INT4], found.measurements[name, INT8]
    [note] = sweep_tables(found)[0].rows[0]
    assert "unfinished: 2 of 5 layers have not been measured yet" in note
    made = klfast.plan(found, max_kl=1.0)
    assert made.notes[0] == note and "lm_head" not in made.specs


def test_renderings(found, tmp_path):
    from rich.console import Console

    tables = sweep_tables(found)
    console = Console(record=True, width=120, file=io.StringIO())
    for one in tables:
        console.print(one.rich())
    text = console.export_text()
    assert "backbone.layers.1.mixer.x_proj" in text and "0.05" in text
    table.write(tmp_path / "report.md", tables)
    assert (
        "| spec | layer | kl_teacher_student | standard error | noise floor |\n| --- | --- | ---: | ---: | --- |"
        in (tmp_path / "report.md").read_text()
    )
    table.write(tmp_path / "report.json", tables)
    data = json.loads((tmp_path / "report.json").read_text())
    assert [entry["title"] for entry in data] == [one.title for one in tables]
    assert data[0]["rows"][0][2] == 0.05
    json.dumps(ranking(found, "sqnr_db", 1).data(), allow_nan=False)  # a NaN standard error is null
    with pytest.raises(InvalidInputError, match=r"written as .md or .json"):
        table.write(tmp_path / "report.html", tables)


def printed(one, width):
    """Return the lines of a table on a console, and the text of each of its cells, with folded parts joined."""
    from rich.console import Console

    console = Console(width=width, file=io.StringIO())
    console.print(one.rich(), crop=False)
    lines = console.file.getvalue().splitlines()
    rows = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in lines if line[:1] in "│┃"]
    return lines, ["".join(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120, 300])
def test_narrow_consoles_fold_names_and_cut_no_number(width):
    name = "backbone.layers.23.mixer.in_proj"
    rows = (("int4-g32-sym", name, 0.00001234, 1.235e-06, 123456789, None),)
    made = table.Table("A title", ("spec", "layer", "kl_teacher_student", "standard error", "tokens", "note"), rows)
    lines, columns = printed(made, width)
    assert columns == ["specint4-g32-sym", f"layer{name}", "kl_teacher_student1.234e-05", *columns[3:5], "note"]
    assert columns[3].replace(" ", "") == "standarderror1.235e-06" and columns[4] == "tokens123,456,789"
    widest = max(map(len, lines))
    assert widest <= max(width, 76) and sum("1.234e-05" in line for line in lines) == 1
    assert all(any(number in line for line in lines) for number in ("1.235e-06", "123,456,789"))
    if width == 300:
        assert len(lines) == 6 and widest == 3 * 6 + 1 + 12 + 32 + 18 + 14 + 11 + 4


def test_words_of_at_most_eight_letters_stay_whole_on_a_narrow_console():
    made = table.Table("", ("spec", "tau"), (("int4-channel-sym", "0.25 (0.00 to 0.46)"),))
    lines, _ = printed(made, 24)
    assert max(map(len, lines)) <= 24 and all(any(w in line for line in lines) for w in ("0.25", "(0.00", "0.46)"))


def test_plot(found, tmp_path):
    with pytest.raises(InvalidInputError, match=r"written as .png"):
        plot.plot(found, tmp_path / "plot.gif")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"pip install klfast\[plot\]"):
            plot.plot(found, tmp_path / "plot.svg")
        assert not list(tmp_path.iterdir())
        return
    plot.plot(found, tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert "<svg" in text and [p.name for p in tmp_path.iterdir()] == ["plot.svg"]


@pytest.mark.parametrize("specs", [1, 2, 4])
def test_legend_covers_no_panel(found, specs):
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import to_rgba

    for spec in [INT4, INT8, QuantSpec(4, 16), QuantSpec(8, 16)]:
        for name in NAMES:
            if spec in [INT4, INT8, QuantSpec(4, 16), QuantSpec(8, 16)][:specs]:
                found.measurements[name, spec] = Measurement({"kl_teacher_student": 0.1, "sqnr_db": 1.0}, {}, 10)
            else:
                found.measurements.pop((name, spec), None)
    del found.measurements[NAMES[0], INT4], found.measurements[NAMES[2], INT4]  # in_proj is not in the first panel
    figure = plot.figure(found, "kl_teacher_student")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert len(figure.axes) == specs and not any(box.overlaps(axes.get_tightbbox()) for axes in figure.axes)
    assert figure.bbox.containsx(box.x0) and figure.bbox.containsx(box.x1 - 1)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(labels) == ["in_proj", "lm_head", "x_proj"][0 if specs > 1 else 1 :]
    colors = [{line.get_label(): to_rgba(line.get_color()) for line in axes.get_lines()} for axes in figure.axes]
    assert all(one[label] == colors[-1][label] for one in colors for label in one)
