"""``klfast report --html``: what is on the page, that it asks for nothing, and what a browser makes of it."""

import json
import math
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from command_line import fails, klf
from scipy import stats

import klfast
from klfast.core.bundled import ASSETS
from klfast.core.errors import InvalidInputError
from klfast.evaluation.comparison import Comparison, Part
from klfast.evaluation.front import Front, FrontPoint
from klfast.evaluation.windowed import Estimate
from klfast.models.fingerprint import Fingerprint
from klfast.models.precisions import digest
from klfast.quant.spec import QuantSpec
from klfast.reporting.page import colors
from klfast.reporting.page.axis import Axis, number
from klfast.reporting.page.document import html_page
from klfast.reporting.page.intervals import Row, interval_table
from klfast.reporting.page.markup import Markup, tag
from klfast.sensitivity.coverage import measured_note
from klfast.sensitivity.results import LayerInfo, Measurement, Sensitivities

INT4, INT8 = QuantSpec(4, 32), QuantSpec(8, 32)
NAMES = [*(f"backbone.layers.{i}.mixer.{kind}" for i in range(3) for kind in ("in_proj", "x_proj")), "lm_head"]


@pytest.fixture(scope="module")
def swept():
    """KL of 0.001 to 0.007 at 4 bits, a hundredth of that at 8."""
    measurements = {
        (name, spec): Measurement({"kl_teacher_student": scale * n}, {"kl_teacher_student": scale / 50}, 1000)
        for n, name in enumerate(NAMES, 1)
        for spec, scale in ((INT4, 1e-3), (INT8, 1e-5))
    }
    layers = {name: LayerInfo((64, 64), 8192) for name in NAMES}
    provenance = {
        "model": "a <b>ode",
        "seconds": {"teacher": 1.0, "suffix": 3.0},
        "token_forwards": 5,
        "dtype": "float32",
    }
    return Sensitivities(Fingerprint("x", (1.0,) * len(NAMES)), layers, 100, measurements, {}, provenance)


@pytest.fixture(scope="module")
def plan(swept):
    return klfast.plan(swept, mean_bits=6)


@pytest.fixture(scope="module")
def card(plan):
    """Of the plan's model, as ``klfast compare`` records it."""
    figures = {"Mean KLD": Estimate(0.02, 0.018, 0.022), "Maximum KLD": Estimate(1.5)}
    part = {"Mean KLD": Estimate(0.0123, 0.01, 0.03), "Same top p": Estimate(0.9)}
    parts = (Part(1, 64, 640, part), Part(65, 128, 640, part))
    of = {"fingerprint": plan.fingerprint.to_data(), "precisions_sha256": digest(plan.specs)}
    return Comparison(1280, 10, figures, parts, parts, {"base": "a", "model": "b", "text": "c", **of})


@pytest.fixture(scope="module")
def page(swept, plan, card):
    return html_page(swept, [plan], [card])


class Outline(HTMLParser):
    """The elements of a page with their attributes and texts; raises for tags that do not match."""

    VOID = ("meta", "input")

    def __init__(self, page):
        super().__init__()
        self.found, self._open = [], []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        element = (tag, dict(attributes), [])
        self.found.append(element)
        if tag not in self.VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes), []))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        for _, _, texts in self._open:
            texts.append(data)

    def all(self, name):
        return [(attributes, "".join(texts)) for tag, attributes, texts in self.found if tag == name]


def test_sections_headings_and_figures(page):
    outline = Outline(page)
    assert [text for _, text in outline.all("h1")] == ["klfast: a <b>ode"] and "<b>ode" not in page
    headings = ["What each layer suffers", "Most sensitive layers", "Size against KL", "The plan", "KL card"]
    assert [text for _, text in outline.all("h2")] == [*headings, "What the sweep took"]
    facts = dict(zip([t for _, t in outline.all("dt")], [t for _, t in outline.all("dd")], strict=True))
    assert facts["layers"] == "7" and facts["KL measured"] == "0.02" and float(facts["bits a weight"]) <= 6
    cells = {attributes.get("title"): text for attributes, text in outline.all("td")}
    assert cells["backbone.layers.1.mixer.x_proj: kl_teacher_student 0.004"] == "4"
    assert cells["lm_head: kl_teacher_student 7e-05"] == "0.07"
    assert any(title and title.startswith("lm_head int") for title in cells)
    ranked = [attributes["title"] for attributes, _ in outline.all("th") if "title" in attributes]
    assert ranked[:7] == NAMES[::-1]


def test_accessible_structure(page):
    outline = Outline(page)
    [(root, _)] = outline.all("html")
    assert root["lang"] == "en" and next(text for _, text in outline.all("title")) == "klfast report: a <b>ode"
    ids = Counter(attributes["id"] for _, attributes, _ in outline.found if "id" in attributes)
    assert max(ids.values()) == 1
    for attributes, _ in outline.all("section"):
        assert attributes["aria-labelledby"] in ids
    tables = outline.all("table")
    assert len(tables) == len(outline.all("caption")) and all(text for _, text in outline.all("caption"))
    assert all(attributes["scope"] in ("col", "row") for attributes, _ in outline.all("th"))
    for attributes, text in outline.all("svg"):
        assert attributes.get("aria-hidden") == "true" or (attributes["role"] == "img" and "the table below" in text)
    for _, attributes, _ in outline.found:
        if "wide" in attributes.get("class", ""):
            assert attributes["tabindex"] == "0" and attributes["role"] == "region" and attributes["aria-label"]
    assert len(outline.all("label")) == len(outline.all("input")) == 3


def test_nothing_is_asked_of_the_network(page):
    outline = Outline(page)
    assert not {"script", "img", "link", "iframe", "object", "base"} & {tag for tag, _, _ in outline.found}
    for _, attributes, _ in outline.found:
        assert attributes.get("href", "#").startswith("#") and "src" not in attributes
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"url\(|@import|https?:|//", page)
    [policy] = [a["content"] for a, _ in outline.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


@pytest.mark.parametrize("ramp", [colors.HEAT, colors.DEPTH])
def test_cells_can_be_read(ramp):
    for step in range(101):
        found = dict(one.split(":") for one in colors.style(step / 100, ramp).split(";"))
        assert (
            colors.contrast(found["--l"], found["--lt"]) >= 4.5 and colors.contrast(found["--d"], found["--dt"]) >= 4.5
        )
    assert colors.contrast("#000000", "#ffffff") == 21


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_texts_and_marks_can_be_seen(theme):
    style = (ASSETS / "report" / "style.css").read_text()
    named = {name: pair[theme] for name, *pair in re.findall(r"--(\w+): light-dark\((#\w+), (#\w+)\)", style)}
    for text in ("ink", "soft", "accent", "cool"):
        assert all(colors.contrast(named[text], named[ground]) >= 4.5 for ground in ("paper", "panel")), text


def test_without_plans_cards_or_kl(swept):
    outline = Outline(html_page(swept, metric="kl_teacher_student", top=2))
    assert [text for _, text in outline.all("h2")][-2:] == ["Size against KL", "What the sweep took"]
    noise = {key: Measurement({"sqnr_db": 20.0 + n}, {}, 10) for n, key in enumerate(swept.measurements)}
    published = Sensitivities(None, swept.layers, 100, noise)
    assert [text for _, text in Outline(html_page(published)).all("h2")] == [
        "What each layer suffers",
        "Most sensitive layers",
    ]
    with pytest.raises(InvalidInputError, match="no measurements"):
        html_page(Sensitivities(None, {}, 0))


@pytest.mark.parametrize("windows", [2, 4, 33])
def test_intervals_are_students(swept, windows):
    """As those of ``klfast compare``: with few windows, 1.96 standard errors are far too short."""
    each = {key: replace(m, windows=windows) for key, m in swept.measurements.items()}
    from_text = {**swept.provenance, "windows": windows}
    half = stats.t.ppf(0.975, windows - 1) * 1e-3 / 50
    for found in (replace(swept, measurements=each), replace(swept, provenance=from_text)):
        page = html_page(found, top=1)
        assert f'<td class="number">{number(7e-3 - half)} to {number(7e-3 + half)}</td>' in page
    stopped = replace(swept, provenance={**from_text, "windows": 2 * windows, "micro_batches": [1, 2]})
    assert f"{number(7e-3 - half)} to {number(7e-3 + half)}<" in html_page(stopped, top=1)
    assert '<td class="number">none</td>' in html_page(swept, top=1)  # of how many windows is not known


@pytest.mark.parametrize(
    ("metric", "value", "interval"),
    [
        *((name, 0.01, "0 to 2.6") for name in ("kl_teacher_student", "kl_student_teacher", "mse")),
        ("jsd", 0.01, "0 to 0.69"),
        ("top1_agree", 0.8, "0 to 1"),
        ("delta_ce", 0.01, "-2.5 to 2.6"),
        ("sqnr_db", 0.01, "-2.5 to 2.6"),
    ],
)
def test_intervals_end_where_the_metric_does(swept, metric, value, interval):
    """Two windows: half an interval is 12.7 standard errors."""
    each = {key: Measurement({metric: value}, {metric: 0.2}, 10, windows=2) for key in swept.measurements}
    page = html_page(replace(swept, measurements=each), top=1)
    assert f'<td class="number">{interval}</td>' in page


def test_intervals_are_drawn_whole_on_a_linear_axis():
    def bars(*figures):
        page = interval_table("c", "h", [Row(str(i), one) for i, one in enumerate(figures)])
        return [(float(left), float(width)) for left, width in re.findall(r"left:([\d.]+)%;width:([\d.]+)%", page)]

    [(left, width), _] = bars(Estimate(0.01, -0.02, 0.04), Estimate(0.02, 0.01, 0.03))
    assert left > 1 and left + width < 99
    [(left, width), (other, _)] = bars(Estimate(0.01, 0.0, 0.2), Estimate(1.0, 0.5, 1.5))
    assert left == 0 and width > 30 and other > 50, "logarithmic, where 0 is its end"


def test_notes_name_what_was_not_measured_in_full(swept):
    derived = {key: replace(m, is_derived=key[1] == INT8) for key, m in swept.measurements.items()}
    provenance = {**swept.provenance, "vocabulary": 128, "not_finite": ["lm_head as int4-g16-sym"]}
    outline = Outline(html_page(replace(swept, measurements=derived, provenance=provenance)))
    [note] = [text for attributes, text in outline.all("p") if attributes.get("class") == "note"]
    assert note == measured_note(replace(swept, measurements=derived, provenance=provenance))
    assert "7 of 14 measurements follow from another spec of the layer" in note
    assert "KL from a sample of the vocabulary" in note and "lm_head as int4-g16-sym left out" in note


def test_several_plans_are_numbered(swept, plan):
    found = Outline(html_page(swept, [plan, klfast.plan(swept, mean_bits=9)]))
    assert {"The plan 1", "The plan 2"} <= {text for _, text in found.all("h2")}


def measured(page):
    """Return the measured points in a page's table, and the measured KL among its facts, as text."""
    outline = Outline(page)
    facts = dict(zip([t for _, t in outline.all("dt")], [t for _, t in outline.all("dd")], strict=True))
    texts = [text for _, text in outline.all("tr")]
    return [text for text in texts if "plan" in text and "measured" in text], facts.get("KL measured")


def test_only_cards_of_a_plans_model_are_its_measured_kl(swept, plan, card):
    size = f"{plan.predicted['bytes'] / 1e6:.4g}"
    assert measured(html_page(swept, [plan], [card])) == ([f"the plan, measured{size}0.02"], "0.02")
    assert measured(html_page(swept, (), [card])) == ([], "0.02")
    other = klfast.plan(swept, mean_bits=9)
    assert measured(html_page(swept, [other], [card])) == ([], None)
    assert measured(html_page(swept, [other, plan], [card])) == ([f"plan 2, measured{size}0.02"], None)
    both = [replace(card, figures={"Mean KLD": Estimate(0.03)}, provenance={}), card]
    assert measured(html_page(swept, [plan], both)) == ([f"the plan, measured{size}0.02"], "0.02")
    for base in (None, [], {"structure": "x"}, Fingerprint("x", (2.0,) * len(NAMES)).to_data()):
        of_another = replace(card, provenance={**card.provenance, "fingerprint": base})
        assert measured(html_page(swept, [plan], [of_another])) == ([], None)


def test_experts_of_a_layer_share_a_cell():
    stack = "model.layers.0.mlp.experts.down_proj"
    names = [f"{stack}.{i}" for i in range(5)]
    measurements = {(name, INT4): Measurement({"kl_teacher_student": 1e-3}, {}, 1000) for name in names}
    layers = {name: LayerInfo((64, 64), 8192) for name in names}
    swept = Sensitivities(Fingerprint("x", (1.0,)), layers, 100, measurements, {}, {})
    for specs, text, said in (
        ({names[0]: INT4, names[1]: INT8, names[2]: INT8, names[3]: INT4, names[4]: INT4}, "4 to 8", "int4-g32-sym x3"),
        ({names[0]: INT4, names[1]: INT8}, "4 to full", "full precision x3"),
        (dict.fromkeys(names, INT8), "8 g32", "int8-g32-sym x5"),
    ):
        found = html_page(swept, [klfast.Plan(specs, "uniform")])
        assert f">{text}<" in found and f"{stack} {said}" in found
        assert f"{stack}: kl_teacher_student 0.001" in found


def test_axes():
    log = Axis.of([0.0, 2e-4, 3e-2])
    assert (log.low, log.high, log.is_logarithmic) == (pytest.approx(1e-4), pytest.approx(0.1), True)
    assert [log.share(x) for x in (0.0, 1e-4, 1e-3, 1.0)] == pytest.approx([0, 0, 1 / 3, 1])
    assert log.ticks() == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])
    linear = Axis.of([3.0, 7.0])
    assert not linear.is_logarithmic and linear.ticks() == pytest.approx([3, 4, 5, 6, 7])
    assert Axis.of([5.0]).low < 5 < Axis.of([5.0]).high and Axis.of([]).ticks()
    assert Axis.of([-1.0, 100.0]).share(-1.0) > 0
    assert Axis.spanning([1.0, math.inf, 100.0]).share(10.0) == pytest.approx(0.5)
    assert Axis.spanning([2.0, 2.0]).share(2.0) == 1 and not Axis.spanning([-3.0, 3.0]).is_logarithmic


@pytest.mark.parametrize(
    "values",
    [
        (5e-324, 1e-300),
        (1e-322, 1e-200),
        (5e-324, 1.7e308),
        (1e308, -1e308),
        (1.7e308,),
        (-1.7e308, 0.0),
        (5e-324,),
        (0.0,),
    ],
)
@pytest.mark.parametrize("linear", [False, True])
def test_axes_of_extreme_values(values, linear):
    for axis in (Axis.of(values, linear=linear), Axis.spanning(values)):
        assert all(0 <= axis.share(value) <= 1 for value in values)
        assert axis.share(max(values)) >= axis.share(min(values))
    assert 1 <= len(Axis.of(values, linear=linear).ticks()) <= 12 and all(map(number, Axis.of(values).ticks()))


def test_markup_is_escaped():
    assert (
        tag("p", "a < b & c", Markup("<b>d</b>"), None, title='"') == '<p title="&quot;">a &lt; b &amp; c<b>d</b></p>'
    )
    assert tag("input", checked=True, class_=None, id=False) == "<input checked>"


def test_names_that_are_no_text(swept, card, tmp_path):
    """Linux lets a file's name be any bytes, which Python holds as lone surrogates."""
    named = replace(card, provenance={**card.provenance, "text": "t\udcff.txt"})
    named.to_json(tmp_path / "card.json")
    replace(swept, provenance={**swept.provenance, "model": "m\udcff"}).to_json(tmp_path / "sens.json")
    klf("report", tmp_path, "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert r"on t\udcff.txt.</p>" in page and r"<h1>klfast: m\udcff</h1>" in page
    assert tag("p", title="\udcff") == r'<p title="\udcff"></p>'


def test_tokens_of_an_adaptive_sweep(swept):
    """Of 14 candidates, 7 are on 1,000 tokens and 7 on 200: 4 s, 0.476 s for each and 1,000 tokens."""
    each = {key: replace(m, tokens=200 if key[1] == INT8 else 1000) for key, m in swept.measurements.items()}
    assert "<td>200 to 1,000</td>" in (page := html_page(replace(swept, measurements=each)))
    assert re.search(r"1,000 tokens</th><td[^>]*>0.4762</td>", page) and "each on 200 to 1,000 tokens" in page
    assert re.search(r"of each</th><td[^>]*>1,000</td>", html_page(swept))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seconds": {"teacher": None}}, "the seconds of teacher is None, not a finite number"),
        ({"seconds": {"teacher": "1"}}, "the seconds of teacher is '1', not a finite number"),
        ({"token_forwards": [5]}, "token_forwards is [5], not an integer"),
    ],
)
def test_edited_costs_are_refused_in_one_line(swept, tmp_path, changed, said):
    swept.to_json(tmp_path / "sens.json")
    data = json.loads((tmp_path / "sens.json").read_text())
    del data["sha256"]
    data["provenance"].update(changed)
    (tmp_path / "sens.json").write_text(json.dumps(data))
    line = fails("report", tmp_path / "sens.json", "--html", tmp_path / "page.html")
    assert f"what the sweep took is damaged ({said}" in line and "\n" not in line
    assert not (tmp_path / "page.html").exists()


def test_a_front_without_its_machine(swept, plan):
    front = Front((FrontPoint("planned", plan, None, 0.01, 0.001, 60.0, 100.0),), {"tokens": 1000})
    [caption] = [text for _, text in Outline(html_page(swept, fronts=[front])).all("figcaption") if "whole" in text]
    assert caption == "KL of whole models, measured on 1000 tokens. Lower left is better."
    of = replace(front, provenance={**front.provenance, "machine": "a CPU", "tier": "avx2"})
    assert "better. Tokens per second: a CPU, avx2.</figcaption>" in html_page(swept, fronts=[of])


def test_command(swept, plan, card, tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    assert "no sensitivities" in fails("report", folder, "--html", tmp_path / "page.html")
    swept.to_json(folder / "sens.json")
    plan.to_json(folder / "plan.json")
    card.to_json(folder / "card.json")
    (folder / "other.json").write_text("[1]")
    assert klf("report", folder, "--html", tmp_path / "page.html").stdout == f"Written: {tmp_path / 'page.html'}\n"
    page = (tmp_path / "page.html").read_text()
    assert page == html_page(swept, [plan], [card])
    assert "exists" in fails("report", folder, "--html", tmp_path / "page.html")
    named = (folder / "sens.json", folder / "card.json", "--plan", folder / "plan.json")
    klf("report", *named, "--html", tmp_path / "page.html", "--force")
    assert (tmp_path / "page.html").read_text() == page
    (folder / "card.json").write_text((folder / "card.json").read_text().replace("0.0123", "0.0124"))
    assert "damaged" in fails("report", folder, "--html", tmp_path / "page.html", "--force")
    assert (tmp_path / "page.html").read_text() == page
    assert "lm_head" in klf("report", folder).stdout


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """<script>
const wide = [...document.querySelectorAll(".wide")].map(box => box.getBoundingClientRect().right);
document.body.dataset.seen = [
  document.documentElement.scrollWidth, innerWidth, Math.max(...wide), getComputedStyle(document.body).backgroundColor,
  document.querySelectorAll("details[name=spec][open]").length].join(" ");
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_in_a_browser(page, tmp_path, theme):
    """The page fits a narrow screen, wide tables scroll within it, and the choice of colours works without scripts."""
    page = page.replace(" checked>", ">").replace(f'id="theme-{theme}"', f'id="theme-{theme}" checked')
    page = re.sub(r"<meta http-equiv[^>]*>", "", page).replace("</body>", f"{PROBE}</body>")  # the policy bars scripts
    (tmp_path / "page.html").write_text(page)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    dump = [*command, "--window-size=390,800", "--dump-dom", Path(tmp_path / "page.html").as_uri()]
    done = subprocess.run(dump, capture_output=True, text=True, timeout=120)
    [seen] = re.findall(r'data-seen="([^"]*)"', done.stdout)
    content, window, widest, *color, opened = seen.split(" ")
    assert float(content) <= float(window) and float(widest) <= float(window)
    assert " ".join(color) == {"light": "rgb(255, 255, 255)", "dark": "rgb(18, 22, 27)"}[theme] and opened == "1"
