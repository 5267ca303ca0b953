"""Order of a sweep's measurements: steps, each a few candidates that are measured together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from klfast.core.errors import InvalidInputError
from klfast.models.block_chain import Chain
from klfast.models.expert_names import expert_in
from klfast.models.families.base import Rows
from klfast.models.head import is_head_tied
from klfast.models.linears import row_parts
from klfast.models.matrices import named_matrices, sharers
from klfast.quant.spec import QuantSpec
from klfast.sensitivity.candidates import COMPARED_TOGETHER, Candidate, chunks

NOISE = 0  # the noise floor's row in the tally


@dataclass(frozen=True)
class Step:
    """Candidates that are measured together, between two saves.

    Attributes:
        place: the first block that uses their layers, or "head"; "noise" for the noise floor, which has no candidates.
        candidates: at most COMPARED_TOGETHER.
        first: their first row in the tally.
        work: approximate cost, as the number of weights that one micro-batch is multiplied with.
    """

    place: int | str
    candidates: tuple[Candidate, ...]
    first: int
    work: float

    @property
    def rows(self) -> int:
        """Rows in the tally."""
        return len(self.candidates) or 1

    def only(self, rows: Sequence[int]) -> Step:
        """Return the step with the candidates of these rows of the tally alone."""
        return replace(self, candidates=tuple(self.candidates[row - self.first] for row in rows if self.candidates))

    @property
    def name(self) -> str:
        """Name of the place, for progress reports."""
        return f"block {self.place}" if isinstance(self.place, int) else self.place


def steps(
    chain: Chain,
    names: Sequence[str],
    specs: Sequence[QuantSpec],
    rows: bool,
    activations: bool,
    corrected: Sequence[str] = (),
) -> list[Step]:
    """Return the steps of one micro-batch: the noise floor, the candidates of each block, then those of the head.

    Raises:
        InvalidInputError: as ``klfast.sweep`` says, of layers, specs and ``corrected``.
    """
    of_model = named_matrices(chain.model)
    groups = {group[0]: group for group in sharers(chain.model)}
    at: dict[int | str, list[Candidate]] = {index: [] for index in range(len(chain.blocks))} | {"head": []}
    uses = {name: row_parts(chain.model, name) for name in names if name in of_model}
    coarse = [spec for spec in specs if spec.bits == 4 and not spec.corrected]
    _require_uses(corrected, {name: of for name, of in uses.items() if not of_model[name].is_stack}, coarse)
    experts = {name: of for name in names if name not in of_model and (of := expert_in(name))}
    blocks_of = {
        name: () if of_model[name].holder is chain.head.module else _blocks(chain, groups[name])
        for name in dict.fromkeys(experts[name][0] if name in experts else name for name in names)
    }
    for name in names:
        stack, expert = experts.get(name, (name, None))
        layer, blocks, same = of_model[stack], blocks_of[stack], groups[stack]
        own = None if expert is None else row_parts(chain.model, stack)[f"expert {expert}"]
        place = blocks[0] if blocks else "head"
        # Numbers of corrected rows are for a head: tokens differ in how much they cost.
        tried = [spec for spec in specs if layer.holder is chain.head.module or not spec.corrected]
        height = layer.shape[0] if own is None else own[1] - own[0]
        if why := next(filter(None, (spec.why_unfit(height) for spec in tried)), None):
            raise InvalidInputError(f"{name}: {why}; sweep another spec")
        of_rows = uses.get(name, {})
        finer = [_corrected(spec, of_rows[use]) for use in corrected if use in of_rows for spec in coarse]
        whole = Candidate(name, layer, specs[0], blocks, rows=own, expert=expert)
        at[place] += [replace(whole, spec=spec) for spec in dict.fromkeys((*tried, *finer))]
        if activations:
            holders = tuple(dict.fromkeys(of_model[each].holder for each in same))
            by_group = {spec.group_length(layer.shape[1]): spec for spec in tried}
            at[place] += [replace(whole, spec=spec, inputs_of=holders) for spec in by_group.values()]
        for use, part in of_rows.items() if rows else ():
            at[place] += [Candidate(name, layer, spec, blocks, use, part) for spec in tried]
    if not any(at.values()):
        raise InvalidInputError(f"{specs[0]} corrects rows of the head, which is not among `layers`; add it there")
    sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in chain.blocks]
    head = chain.head.module.weight.numel()
    found = [Step("noise", (), NOISE, 2 * (sum(sizes) + head))]  # the teacher runs before it
    for place, candidates in at.items():
        before_head = sum(sizes[place:]) if isinstance(place, int) else sum(sizes) * is_head_tied(chain.model)
        each = head + before_head
        for some in chunks(candidates, 1 if place == "head" else COMPARED_TOGETHER):
            found.append(Step(place, tuple(some), found[-1].first + found[-1].rows, len(some) * each))
    return found


def _require_uses(corrected: Sequence[str], uses: Mapping[str, Rows], coarse: Sequence[QuantSpec]) -> None:
    """Raise InvalidInputError unless some layer has rows of each use, and there are specs to correct."""
    if corrected and not coarse:
        raise InvalidInputError("corrected is for specs of 4 bits, and there is none; add int4-g64-sym")
    known = sorted({use for of in uses.values() for use in of})
    if unknown := [use for use in corrected if use not in known]:
        raise InvalidInputError(
            f"none of the layers has rows for {unknown[0]!r} to be corrected (uses of their rows: "
            f"{', '.join(known) or 'none, as no layer is fused'})"
        )


def _corrected(spec: QuantSpec, rows: tuple[int, int]) -> QuantSpec:
    first, end = rows
    return replace(spec, corrected=end - first, first_corrected=first)


def _blocks(chain: Chain, names: Sequence[str]) -> tuple[int, ...]:
    """Return the indices of the blocks that contain the layers of one weight."""
    found = {name: chain.block_of(name) for name in names}
    for name, block in found.items():
        if block is None:
            what = name if len(names) == 1 else f"{names[0]} shares its weight with {name}, which"
            raise InvalidInputError(f"{what} lies in no block and is not the head; leave it out of `layers`")
    return tuple(sorted({block for block in found.values() if block is not None}))


def from_group(steps: Sequence[Step], group: int) -> int:
    """Return the first step of a group: klfast 0.1.0 counted groups, one per block however many candidates it has."""
    places = list(dict.fromkeys(step.place for step in steps))
    if not 0 <= group < len(places):
        raise ValueError(f"it stops at group {group}")
    return next(number for number, step in enumerate(steps) if step.place == places[group])
