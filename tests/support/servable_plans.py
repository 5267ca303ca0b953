"""Servable plans of tiny models, with costs that are made up."""

import klfast
from klfast.planning.servable import unserved
from klfast.sensitivity.results import Measurement, Sensitivities

SPECS = [klfast.QuantSpec(4, 32), klfast.QuantSpec(8, 32)]


def servable_plan(model):
    """Return a servable plan of INT4 and INT8: a little larger than the smallest."""
    swept = Sensitivities.of(model)
    for i, name in enumerate(swept.layers):
        for spec in SPECS:
            cost = (1 + i % 3) / 2**spec.bits
            swept.measurements[name, spec] = Measurement({"kl_teacher_student": cost}, {}, 9)
    least = klfast.plan(swept, max_kl=1e9, servable=True).predicted["bytes"]
    most = swept.other_bytes + sum(info.float_bytes for info in swept.layers.values())
    plan = klfast.plan(swept, 0.93 * least + 0.07 * most, servable=True)
    assert not unserved(list(swept.layers), plan.specs)
    return plan
