"""Order of a sweep's measurements: steps, each a few candidates that are measured together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

from klfast.core.errors import InvalidInputError
from klfast.models.block_chain import Chain
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


def steps(chain: Chain, names: Sequence[str], specs: Sequence[QuantSpec], rows: bool, activations: bool) -> list[Step]:
    """Return the steps of one micro-batch: the noise floor, the candidates of each block, then those of the head."""
    of_model = named_matrices(chain.model)
    groups = {group[0]: group for group in sharers(chain.model)}
    at: dict[int | str, list[Candidate]] = {index: [] for index in range(len(chain.blocks))} | {"head": []}
    for name in names:
        layer = of_model[name]
        blocks = () if layer.holder is chain.head.module else _blocks(chain, groups[name])
        place = blocks[0] if blocks else "head"
        # Corrected rows are a head's: tokens differ in how much they cost.
        tried = [spec for spec in specs if layer.holder is chain.head.module or not spec.corrected]
        if tried and max(spec.corrected for spec in tried) > layer.shape[0]:
            most = max(tried, key=attrgetter("corrected"))
            raise InvalidInputError(f"{name} has {layer.shape[0]} rows, fewer than {most} corrects; sweep another spec")
        at[place] += [Candidate(name, layer, spec, blocks) for spec in tried]
        if activations:
            holders = tuple(dict.fromkeys(of_model[same].holder for same in groups[name]))
            by_group = {spec.group_length(layer.shape[1]): spec for spec in tried}
            at[place] += [Candidate(name, layer, spec, blocks, inputs_of=holders) for spec in by_group.values()]
        for use, part in row_parts(chain.model, name).items() if rows else ():
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
