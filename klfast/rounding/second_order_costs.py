"""What layers cost under second-order rounding, from a sweep that rounded to nearest.

A small error E of a weight costs about a constant of the layer times tr(E H E^T), the squared error of its output
(``klfast.rounding.objective``; of a head each row counts by its token, ``klfast.rounding.head_rows``). The sweep gives
the constant: its cost of one spec over that error. Rows that it also measured corrected have a constant of their own:
what was saved over their error. So each layer is rounded by second order to each spec, on the inputs
of the full-precision model, and the divergence follows from the error of its output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from klfast.core.errors import InvalidInputError
from klfast.core.interrupts import interruptible
from klfast.core.progress import Progress, reporter
from klfast.models.batches import Batches
from klfast.models.block_chain import Chain
from klfast.models.fingerprint import require_match
from klfast.quant.rounding import quantize
from klfast.quant.spec import QuantSpec, storable_spec
from klfast.rounding.carries import Carries
from klfast.rounding.head_rows import Clusters, Rows
from klfast.rounding.int8_costs import error_ratios
from klfast.rounding.moments import Moments
from klfast.rounding.passes import HEAD, NOWHERE, TIED, Passes, add_inputs, named, without_entries
from klfast.rounding.second_order import on_uniform_grid, plain_and_corrected, second_order
from klfast.rounding.walk import MOST_TOKENS
from klfast.rounding.watching import watched
from klfast.sensitivity.inputs import micro_batches, parse_specs, vocabulary
from klfast.sensitivity.measuring_mode import prepared
from klfast.sensitivity.results import Measurement, Sensitivities

SPECS = ("int4-channel-sym", "int4-g128-sym", "int4-g64-sym", "int4-g32-sym", "int6-channel-sym", "int8-channel-sym")
SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)  # of the head's rows that may be corrected
_ROUNDS = 1  # of coordinate descent: more of them make all specs better alike
_QUADRATIC = ("kl_teacher_student", "kl_student_teacher", "jsd", "mse", "delta_ce")  # in a small error
_DECIBELS = 10 / math.log(10)
_LEAST = 1e-30  # of what is divided by


def second_order_costs(
    model: nn.Module,
    sensitivities: Sensitivities,
    calibration: Batches,
    specs: QuantSpec | str | Sequence[QuantSpec | str] = SPECS,
    *,
    corrected: Iterable[float] = SHARES,
    progress: Progress = None,
) -> Sensitivities:
    """Return what each layer costs in each spec if it is rounded with ``rounding="gptq"``, for ``klfast.plan``.

    Experts, layers that several blocks share and whatever the sweep did not measure keep what the sweep says. If it
    measured int8 activations, their costs in the groups of the specs are estimated, too.

    Args:
        model: the full-precision model of the sweep; left as it was.
        sensitivities: of a sweep, with one spec or more for each layer.
        calibration: token ids, as for ``klfast.quantize_model``.
        specs: to estimate; the sweep need not have measured them.
        corrected: shares of the head's rows, up to 1, that may be corrected in each of the INT4 specs.
        progress: as for ``klfast.sweep``.

    Returns:
        Sensitivities whose provenance has "rounding": "gptq". The standard errors are scaled like the means.

    Raises:
        ModelMismatchError, UnknownLayerError: the sweep was another model's.
        InvalidInputError: the text, specs or shares are not valid, the model is not a chain, or the sensitivities come
            from here.
    """
    parsed, shares = parse_specs(specs), tuple(corrected)
    if wrong := [share for share in shares if not 0 < share <= 1]:
        raise InvalidInputError(f"corrected must be shares of the head's rows, from 0 to 1, got {wrong[0]!r}")
    if sensitivities.provenance.get("rounding") == "gptq":
        raise InvalidInputError("these are costs of second-order rounding already; pass the sweep that they come from")
    if sensitivities.fingerprint is not None:
        require_match(sensitivities.fingerprint, model, "the sweep")
    windows = micro_batches(calibration, vocabulary(model), MOST_TOKENS)
    measured: dict[str, dict[QuantSpec, Measurement]] = {}
    for (name, spec), one in sensitivities.measurements.items():
        measured.setdefault(name, {})[spec] = one
    scale = str(sensitivities.provenance.get("scale", "absmax"))
    inputs: dict[str, dict[int, Measurement]] = {}
    for (name, group), one in sensitivities.activations.items():
        inputs.setdefault(name, {})[group] = one
    with prepared(model, torch.float32), reporter(progress, "round", len(measured)) as advance:
        costs = _Costs(Chain(model), measured, inputs, windows, parsed, shares, scale, advance)
        found = costs.finish()
    return replace(
        sensitivities,
        measurements={(name, spec): one for name in measured for spec, one in found[name].items()},
        activations={(name, group): one for name, groups in inputs.items() for group, one in groups.items()},
        provenance={**sensitivities.provenance, "rounding": "gptq"},
        rows={},
    )


class _Costs(Passes):
    """One pass of the full-precision model, in which each layer is rounded to all specs.

    Costs of int8 activations are added to ``inputs``, by layer and group length.
    """

    def __init__(
        self,
        chain: Chain,
        measured: Mapping[str, Mapping[QuantSpec, Measurement]],
        inputs: Mapping[str, dict[int, Measurement]],
        windows: Sequence[torch.Tensor],
        specs: Sequence[QuantSpec],
        corrected: Sequence[float],
        scale: str,
        advance: Callable[..., None],
    ) -> None:
        super().__init__(chain, measured.keys(), windows)
        self.measured, self.inputs, self.specs, self.corrected = measured, inputs, specs, corrected
        self.scale, self.advance = scale, advance
        self.found = {name: dict(of_layer) for name, of_layer in measured.items()}

    def finish(self) -> dict[str, dict[QuantSpec, Measurement]]:
        for name in self.names[NOWHERE]:
            self.advance(1, name)
        passages = self.enter(self.windows)
        carries = Carries([passage.entry for passage in passages])
        passages = without_entries(passages)
        for index in range(len(self.chain.blocks)):
            linear = {name: one for name in self.names[index] if not (one := self.matrices[name]).is_of_experts}
            moments: dict[str, Moments] = {}
            for batch, passage in enumerate(passages):
                carry = carries[batch]
                with watched(linear) as seen:
                    carries[batch] = self.step(index, carry, passage)
                add_inputs(moments, seen.inputs, seen.inputs, carry.hidden.shape[:-1].numel())
                if batch == 0:
                    self._estimate_inputs(seen.inputs)
            for name in self.names[index]:
                if name in moments:
                    self._estimate(name, moments[name])
                self.advance(1, name)
        self._estimate_head(self.end(carries, passages))
        return self.found

    def _estimate_head(self, hidden: Sequence[torch.Tensor]) -> None:
        for place in (TIED, HEAD):
            for name in self.names[place]:
                moments = self.head_moments(hidden, hidden)
                self._estimate_inputs({name: hidden[0]})
                clusters, ridge = self.clusters(hidden, hidden, moments), None
                if place == TIED:
                    ridge = self.ridges(name, self._coarsest(name).base, hidden[0], clusters)
                self._estimate(name, moments, Rows(clusters, ridge))
                self.advance(1, name)

    def _estimate_inputs(self, seen: Mapping[str, torch.Tensor]) -> None:
        """Add the costs of int8 activations in all groups of the specs, from the inputs of the first micro-batch."""
        for name, x in seen.items():
            if known := self.inputs.get(name):
                with interruptible():
                    ratios = error_ratios(self.matrices[name], x, self.specs, known)
                known |= {group: _scaled(known[max(known)], ratio) for group, ratio in ratios.items()}

    def _coarsest(self, name: str) -> QuantSpec:
        """Return the spec of fewest bits, then of fewest groups, in which the sweep measured a layer."""
        k = self.matrices[name].shape[1]
        return min(self.measured[name], key=lambda spec: (spec.bits, spec.n_groups(k), spec.corrected))

    def _estimate(self, name: str, moments: Moments, rows: Rows | None = None) -> None:
        """Add the costs of a layer in all specs, from that of the coarsest which the sweep measured."""
        if moments.why_useless():
            return  # it will be rounded to nearest
        weight = self.matrices[name].weight.detach()
        if rows is None:
            hessian = (moments.hessian / moments.tokens)[None]
            rows = Rows(Clusters(torch.zeros(len(weight), dtype=torch.int64, device=hessian.device), hessian, hessian))
        with named(name), interruptible():
            usual = self._coarsest(name)
            parts = [spec for spec in self.measured[name] if spec.first_corrected >= 0 and spec.base == usual]
            unit = rows.errors(quantize(weight, usual, scale=self.scale).dequantize(torch.float32) - weight)
            if not unit.sum() > 0:
                return
            constants = _by_row(unit, {spec: self._share(name, spec) for spec in parts})

            def cost(values: torch.Tensor) -> torch.Tensor:
                return rows.errors(values - weight) * constants

            self.found[name] = {}
            for spec in self.specs:
                if not on_uniform_grid(spec):
                    continue
                stored = storable_spec(spec, weight.shape[1])
                for each, ratio in self._rounded(weight, stored, rows, parts, cost):
                    self.found[name][each] = _scaled(self.measured[name][usual], ratio)

    def _share(self, name: str, spec: QuantSpec) -> float:
        """Return the share of a layer's KL that is due to some rows: what the sweep found correcting them to save.

        What is left of their squared error is less than a hundredth.
        """
        whole, without = (self.measured[name][each].mean["kl_teacher_student"] for each in (spec.base, spec))
        return min(max(1 - without / whole, 0.0), 1.0) if whole > 0 else 0.0

    def _rounded(
        self,
        weight: torch.Tensor,
        spec: QuantSpec,
        rows: Rows,
        parts: Sequence[QuantSpec],
        cost: Callable[[torch.Tensor], torch.Tensor],
    ) -> Iterator[tuple[QuantSpec, float]]:
        """Yield a spec and the cost of all rows in it; if it has 4 bits, also with rows corrected.

        Of a head these are the costliest, of other layers those that ``parts`` name. ``cost`` is of each row.
        """
        hessian, of_row, spread = rows.clusters.hessian, rows.clusters.of_row, rows.clusters.spread
        counts = sorted({int(share * len(weight)) for share in self.corrected} - {0}) if spread is not None else []
        if not counts or spec.bits != 4:
            plain = second_order(weight, spec, hessian, cluster=of_row, ridge=rows.ridge, rounds=_ROUNDS)
            values = plain.dequantize(torch.float32)
            before = cost(values)
            yield spec, before.sum().item()
            for part in parts if spec.bits == 4 else ():
                some = replace(spec, corrected=part.corrected)
                better = second_order(weight[_rows(part)], some, hessian, cluster=of_row[_rows(part)], rounds=_ROUNDS)
                finer = values.clone()
                finer[_rows(part)] = better.dequantize(torch.float32)
                yield replace(some, first_corrected=part.first_corrected), cost(finer).sum().item()
            return
        most = replace(spec, corrected=counts[-1])
        plain, whole = plain_and_corrected(
            weight, most, hessian, cluster=of_row, ridge=rows.ridge, cost=spread, rounds=_ROUNDS
        )
        before, after = (cost(each.dequantize(torch.float32)) for each in (plain, whole))
        yield spec, before.sum().item()
        best = whole.halves[1].long()
        gains = (before - after)[best][before[best].argsort(descending=True)].cumsum(0)
        for count in counts:
            yield replace(spec, corrected=count), (before.sum() - gains[count - 1]).item()


def _rows(spec: QuantSpec) -> slice:
    return slice(spec.first_corrected, spec.first_corrected + spec.corrected)


def _by_row(unit: torch.Tensor, shares: Mapping[QuantSpec, float]) -> torch.Tensor:
    """Return what each row's error counts for, float [N], so that ``unit``, errors [N], cost 1 together.

    Rows whose share of this is known have their own factor, by the spec that corrects them; the others share the rest.
    """
    found, others = torch.zeros_like(unit), torch.ones_like(unit, dtype=torch.bool)
    for spec, share in shares.items():
        rows = _rows(spec)
        found[rows], others[rows] = share / unit[rows].sum().clamp(min=_LEAST), False
    found[others] = max(1 - sum(shares.values()), 0) / unit[others].sum().clamp(min=_LEAST)
    whole = (found * unit).sum()
    return found / whole if whole > 0 else torch.ones_like(unit) / unit.sum()


def _scaled(measured: Measurement, ratio: float) -> Measurement:
    """Return what a layer costs whose output has ``ratio`` times the squared error."""
    mean = {metric: value * ratio for metric, value in measured.mean.items() if metric in _QUADRATIC}
    if "sqnr_db" in measured.mean:
        mean["sqnr_db"] = measured.mean["sqnr_db"] - _DECIBELS * math.log(max(ratio, _LEAST))
    stderr = {metric: value * (ratio if metric in _QUADRATIC else 1.0) for metric, value in measured.stderr.items()}
    return replace(measured, mean=mean, stderr={metric: stderr[metric] for metric in mean if metric in stderr})
