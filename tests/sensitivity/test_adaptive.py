"""Adaptive sweeps: within their work, resumable, and good enough for plans; the race that they run."""

import pytest
import torch
from sweep_models import KL, make, means, tokens

import klfast
from klfast.core.errors import InvalidInputError
from klfast.core.window_stats import WindowStats
from klfast.models.block_chain import Chain
from klfast.sensitivity import adaptive, racing
from klfast.sensitivity.adaptive import Schedule
from klfast.sensitivity.results import Sensitivities
from klfast.sensitivity.steps import steps

pytestmark = pytest.mark.usefixtures("one_thread")
SPECS = ("int4-g32-sym", "int8-g32-sym")


def swept(**changes):
    return klfast.sweep(make(), tokens(40, 17), SPECS, **{"budget": "adaptive", "vocabulary": 16, **changes})


def test_a_tenth_of_the_work_gives_nearly_the_same_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(adaptive, "_TOKEN_ERROR", 0.4)  # as if windows of 16 tokens had many more
    exhaustive, found = klfast.sweep(make(), tokens(40, 17), SPECS, metrics="delta_ce"), swept()
    assert found.measurements.keys() == exhaustive.measurements.keys()
    assert found.provenance["budget"] == "adaptive"
    # The head of its own is work, too, but goes through no block.
    assert found.provenance["token_forwards"] < 0.12 * exhaustive.provenance["token_forwards"]
    derived = [key for key, one in found.measurements.items() if one.is_derived]
    assert derived and all(key[1].bits == 8 for key in derived)
    for key, one in found.measurements.items():
        assert one.mean[KL] == pytest.approx(exhaustive.measurements[key].mean[KL], rel=0.5), key
    int4 = klfast.QuantSpec(4, 32)
    smallest = exhaustive.other_bytes + sum(int4.saved_bytes(info.shape) for info in exhaustive.layers.values())
    for size in (1.1, 1.3, 1.6):
        plans = [klfast.plan(each, max_bytes=int(size * smallest)) for each in (found, exhaustive)]
        costs = [sum(exhaustive.measurements[pick].mean[KL] for pick in plan.specs.items()) for plan in plans]
        assert costs[0] <= 1.2 * costs[1], size
    found.to_json(tmp_path / "s.json")
    read = Sensitivities.from_json(tmp_path / "s.json")
    assert repr(read.measurements) == repr(found.measurements)  # with NaN, the error of one window


def test_an_interrupted_sweep_goes_on_to_the_same_measurements(tmp_path):
    path, whole = tmp_path / "resume.json", swept()
    for stop_at in (2, 9, 12):

        def stop(done, total, what, stop_at=stop_at):
            if done >= stop_at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            swept(resume=path, progress=stop)
    assert means(swept(resume=path)) == means(whole)
    assert means(swept(resume=path)) == means(whole)  # there is nothing left to do
    with pytest.raises(InvalidInputError, match="other budget"):
        swept(resume=path, budget="exhaustive")


def test_error_names_a_layer_that_cannot_be_rounded():
    model = make()
    with torch.no_grad():
        model.backbone.layers[1].mixer.in_proj.weight[3, 4] = 1e7
    with pytest.raises(InvalidInputError, match=r"layers\.1\.mixer\.in_proj as int4-g32-sym: a scale does not fit"):
        klfast.sweep(model, tokens(), SPECS, budget="adaptive")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(budget="small"), 'budget must be "exhaustive" or "adaptive", got .small'),
        (dict(rows=True), "rows, activations and corrected need"),
        (dict(budget="exhaustive", max_bytes=5), 'max_bytes needs budget="adaptive"'),
        (dict(max_bytes=0), "max_bytes must be positive, got 0"),
        (dict(metrics="mse"), "mse needs .* and budget=.exhaustive.; others give kl_teacher_student and delta_ce"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(InvalidInputError, match=message) as caught:
        swept(**change)
    assert "\n" not in str(caught.value)


# Which candidates need more text ------------------------------------------------------------------------------------


def asked_for_after(windows, length, spread):
    """Return how many rows a schedule wants more of after windows whose KLs spread so far, as a share of their mean."""
    model = make()
    blank, chain = Sensitivities.of(model), Chain(model)
    order = steps(chain, list(blank.layers), [klfast.QuantSpec.parse(spec) for spec in SPECS], False, False)
    schedule = Schedule(order, blank.layers, blank.other_bytes, None, len(chain.blocks), 1000, "absmax")
    tally, had = WindowStats(order[-1].first + order[-1].rows, 1), dict.fromkeys(schedule.first(), windows)
    for place, row in enumerate(had):
        kl = 1.15**place * (1 + spread * (-1.0) ** torch.arange(windows, dtype=torch.float64))
        tally.add(row, length * kl.view(1, 1, -1), length)
    return len(schedule.following(tally, had, windows))


def test_windows_that_agree_settle_the_plan_sooner():
    assert asked_for_after(8, 50, 0.01) == 0
    assert asked_for_after(8, 50, 0.9) > 0
    assert asked_for_after(64, 50, 0.9) == 0


def test_two_windows_that_agree_are_not_believed_yet():
    assert asked_for_after(2, 50, 0.01) > 0


# The race ---------------------------------------------------------------------------------------------------------


def field(error):
    """Two layers of one size and a third whose KL is far larger: 16, 4 or 8 bits."""
    costs = torch.tensor([[0, 1.00, 0.01], [0, 1.05, 0.01], [0, 50.0, 0.5]], dtype=torch.float64)
    nbytes = torch.tensor([[16.0, 4.0, 8.0]] * 3, dtype=torch.float64)
    return racing.Field(costs, torch.full_like(costs, error), nbytes)


def test_the_best_plan_is_found():
    one = field(0.0)
    picks = [racing.best(one.costs.unsqueeze(0), one.nbytes, limit).tolist() for limit in (10, 16, 20, 24, 99)]
    assert picks == [[[1, 1, 1]], [[1, 1, 2]], [[1, 2, 2]], [[2, 2, 2]], [[0, 0, 0]]]


def test_only_what_the_plan_hesitates_about_is_contested():
    assert not racing.contested(field(0.01), [16, 24]).any()
    assert racing.contested(field(0.3), [20]).tolist() == [[False, True, True]] * 2 + [[False] * 3]


def test_a_step_too_large_does_not_end_the_plan():
    costs = torch.tensor([[0.0, 1.0, 400.0], [0.0, 0.01, 1.0], [0.0, 0.01, 2.0], [0.0, 0.01, 3.0]], dtype=torch.float64)
    nbytes = torch.tensor([[800.0, 400.0, 200.0]] + [[16.0, 8.0, 4.0]] * 3, dtype=torch.float64)
    picks = [racing.best(costs.unsqueeze(0), nbytes, limit).tolist() for limit in (212, 217, 221, 412)]
    assert picks == [[[2, 2, 2, 2]], [[2, 2, 2, 1]], [[2, 2, 1, 1]], [[1, 2, 2, 2]]]
