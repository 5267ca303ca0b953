"""``Builder``: lowers the layers of a model to the instructions of a program."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from klfast.backends.cpu.extension import DTYPE_CODES, view
from klfast.core.errors import CannotLowerError
from klfast.engine.columns import Columns
from klfast.engine.routing import Routes, Routing
from klfast.engine.state import StateSpec
from klfast.nn.direct_call import Place, PreparedLinear, Watch, has, plain
from klfast.nn.embedding import QuantEmbedding
from klfast.nn.norm import Norm
from klfast.nn.untouched import why_touched

MOST_SEQUENCES = 16


NormReader = Callable[[Any], Norm]  # from a module


def _are(found: Collection[object], expected: Collection[object]) -> bool:
    """Return whether two collections hold the same objects in the same order."""
    return len(found) == len(expected) and all(map(operator.is_, found, expected))


class Builder:
    """Builds the program of a model.

    Methods named after instructions append one. Buffers have a row for each token of a run; columns of them are what
    instructions take and write. Weights are used where they lie.

    Args:
        model: the model, whose modules' names name the instructions.
        dtype: that of activations.
        rows: most tokens of a run.
        norm_of: returns what reads the parameters of a norm of a class; None for a class that is no norm.

    Attributes:
        program: the extension's.
        states: the tensors of a sequence's state.
        prefix: number of learned inputs before a sequence's tokens, the program's tokens beyond the vocabulary.
        kept: what must live as long as the program.
        checks: each returns False or None once a part of the model is no longer what the program has.

    Raises:
        CannotLowerError: klfast's extension is missing, or cannot take a part.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, rows: int, norm_of: Callable[[type], NormReader | None]
    ) -> None:
        try:
            from klfast import _C
        except ImportError as error:
            raise CannotLowerError("klfast's C++ extension is not built") from error
        if dtype not in DTYPE_CODES:
            raise CannotLowerError(f"the model computes in {dtype}")
        self.dtype, self.rows, self._norm_of = dtype, rows, norm_of
        self.program = _C.Program()
        self.states: list[StateSpec] = []
        self.prefix = 0
        self._names = {module: name for name, module in model.named_modules()}
        self._parts = frozenset(self._names) - {model}
        self._buffers: dict[tuple[str, int, int, int], Columns] = {}
        self._projections: dict[nn.Module, Any] = {}
        self.checks: list[Callable[[], object]] = []
        self.kept: list[object] = []
        # Not the modules themselves: the model would be one of them, which its engine must not keep alive.
        children = [(module._modules, tuple(module._modules.values())) for module in model.modules()]
        self.checks.append(lambda: all(_are(places.values(), found) for places, found in children))

    # Memory -------------------------------------------------------------------------------------------------------

    def buffer(self, name: str, width: int, dtype: torch.dtype | None = None, rows: int | None = None) -> Columns:
        """Return the whole of a buffer; the same one for the same name and size."""
        code, rows = DTYPE_CODES[dtype or self.dtype], rows or self.rows
        key = name, width, code, rows
        if key not in self._buffers:
            self._buffers[key] = Columns(self.program.buffer(width, code, rows), 0, width)
        return self._buffers[key]

    def state(self, *shape: int, dtype: torch.dtype, growing: int | None = None) -> int:
        """Return the number of a new tensor of the state, zero at first; see ``StateSpec``."""
        self.states.append(StateSpec(shape, dtype, growing))
        return len(self.states) - 1

    # Parts of the model -------------------------------------------------------------------------------------------

    def name(self, module: nn.Module) -> str:
        """Return a module's name in the model."""
        return self._names.get(module, type(module).__name__)

    def expect(self, module: nn.Module, *classes: str) -> None:
        """Require a module of one of these classes, or of any if none is given, that does what its class does."""
        name = self.name(module)
        if classes and type(module).__name__ not in classes:
            raise CannotLowerError(f"{name} is a {type(module).__name__}")
        if reason := why_touched(module):
            raise CannotLowerError(f"{name} {reason}")
        if module in self._parts:
            self.checks.append(lambda: not why_touched(module))

    def tensors(self, *places: Place) -> list[Any]:
        """Return tensors, or None, by their places in modules' parameters or buffers, watched from now on."""
        if not has(*places):
            raise CannotLowerError("a parameter has been replaced by a property")
        watch = Watch(*places)
        found, watch.tensors = list(watch.tensors), ()
        if not plain(*found):
            raise CannotLowerError("a parameter is not a plain tensor of floats on the CPU")
        self.checks.append(watch.hold)
        self.kept.append(found)
        return found

    def parameters(self, module: nn.Module, *names: str) -> list[Any]:
        """Return parameters of a module, tensors or None, watched from now on."""
        return self.tensors(*((module._parameters, name) for name in names))

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Keep a tensor made for the program."""
        self.kept.append(tensor)
        return tensor

    def _projection(self, layer: nn.Module, activations: bool = True) -> Any:
        if layer not in self._projections:  # several blocks may share it
            self.expect(layer, "Linear", "QuantLinear")
            prepared = PreparedLinear(layer)
            if prepared.projection is None or prepared.hold(layer) is None or not prepared.takes(self.dtype):
                raise CannotLowerError(f"{self.name(layer)} has a weight that no kernel takes")
            self.checks.append(lambda: prepared.hold(layer))
            self.kept.append(prepared.hold(layer))
            self._projections[layer] = prepared.projection
        projection = self._projections[layer]
        return projection if activations else projection.weight_only()

    def _matrix(self, module: nn.Module, name: str, dtype: torch.dtype | None = None, index: int | None = None) -> Any:
        """Return the product with a parameter [N, K], or with a stack [E, N, K], quantized or not, as [E N, K].

        A parameter of another dtype than ``dtype`` is copied; without, it must be that of activations. ``index`` picks
        one matrix of a parameter [E, N, K].
        """
        if isinstance(layer := module._modules.get(name), nn.Linear):
            return self._projection(layer)
        from klfast import _C

        [weight] = self.parameters(module, name)
        if weight is not None and dtype is not None:
            weight = self.keep(weight.to(dtype))
        if weight is None or weight.dtype is not (dtype or self.dtype):
            raise CannotLowerError(f"{self.name(module)}.{name} is not a tensor of {self.dtype}")
        rows = weight.flatten(0, -2) if index is None else weight[index]
        return _C.Projection.dense(view(rows), None, *rows.shape)

    # Instructions -------------------------------------------------------------------------------------------------

    def embed(self, embedding: nn.Module, out: Columns, scale: float = 1.0, prefix: torch.Tensor | None = None) -> None:
        """Look up the tokens' rows of an nn.Embedding or a QuantEmbedding.

        ``prefix`` [M, width], if any, comes before the tokens of each sequence, at the first positions.
        """
        self.expect(embedding, "Embedding", "QuantEmbedding")
        name, code = self.name(embedding), DTYPE_CODES[self.dtype]
        self.prefix = 0 if prefix is None else len(prefix)
        if isinstance(embedding, QuantEmbedding):
            if embedding.scale is not None:
                scale *= float(embedding.scale)
            self.program.embed_quantized(name, self._projection(embedding.head), view(prefix), code, scale, out)
            return
        [table] = self.parameters(embedding, "weight")
        self.program.embed(name, view(table), len(table), view(prefix), code, scale, out)

    def project(self, layer: nn.Module, x: Columns, out: Columns, *, weight_only: bool = False) -> None:
        """Multiply by a linear layer's weight and add its bias; ``weight_only`` leaves out the bias."""
        self.program.project(self.name(layer), self._projection(layer, not weight_only), x, out)

    def project_parameter(
        self,
        module: nn.Module,
        name: str,
        x: Columns,
        out: Columns,
        *,
        dtype: torch.dtype | None = None,
        index: int | None = None,
    ) -> None:
        """Multiply by a parameter [N, K] of a module, or by the matrix ``index`` of one of shape [E, N, K].

        It does so in a dtype, which x has; None for that of activations.
        """
        self.program.project(self.name(module), self._matrix(module, name, dtype, index), x, out)

    def project_last(self, layer: nn.Module, x: Columns, out: Columns) -> None:
        """Multiply each sequence's last token alone."""
        self.program.project_last(self.name(layer), self._projection(layer), x, out)

    def normalise(
        self, module: nn.Module, x: Columns, out: Columns, gate: Columns | None = None, *, norm: Norm | None = None
    ) -> None:
        """Normalise each row of x, or each of its parts that are as wide as the weight, as a module does.

        ``norm`` says what that is where ``norm_of`` does not know the module's class.
        """
        self.expect(module)
        if norm is None:
            read = self._norm_of(type(module))
            if read is None:
                raise CannotLowerError(f"{self.name(module)} is a {type(module).__name__}")
            norm = read(module)
        own = norm.weight is module._parameters.get("weight")
        weight = self.parameters(module, "weight")[0] if own else self.keep(norm.weight)
        self.program.normalise(
            self.name(module),
            view(weight),
            norm.group_size or 0,
            norm.eps,
            norm.weight_offset,
            norm.norm_before_gate,
            norm.gate_activation == "sigmoid",
            x.width // len(weight),
            x,
            gate,
            out,
        )

    def combine(
        self,
        how: str,
        a: Columns,
        b: Columns,
        out: Columns,
        *,
        factor: float = 1.0,
        each: int = 1,
        narrow: Columns | None = None,
    ) -> None:
        """Combine two tensors as csrc/elementwise/combine.h describes: "add", "multiply", "silu_gate" and so on.

        ``each`` is the number of rows that a token has in their buffers.
        """
        self.program.combine(how, how, factor, each, a, b, out, narrow)

    def combine_row(self, how: str, x: Columns, row: float | torch.Tensor, out: Columns) -> None:
        """Combine each row of x with one row, or with a number."""
        if not isinstance(row, torch.Tensor):
            row = torch.full((x.width,), row)
        self.program.combine_row(how, how, view(self.keep(row)), x, out)

    def scale(self, factors: float | torch.Tensor, x: Columns, out: Columns) -> None:
        """Multiply each column by its factor, or all by one."""
        self.combine_row("multiply", x, factors, out)

    def convolve(self, conv: nn.Module, silu: bool, x: Columns, out: Columns, first: int = 0) -> None:
        """Apply a causal depthwise nn.Conv1d, its channels from ``first`` on; the state has the last inputs."""
        self.expect(conv, "Conv1d")
        weight, bias = self.parameters(conv, "weight", "bias")
        weight = weight[first : first + x.width]
        bias = None if bias is None else bias[first : first + x.width]
        channels, _, width = weight.shape
        state = self.state(width - 1, channels, dtype=self.dtype)  # steps first, as vectors of channels take them
        weight = self.keep(weight.squeeze(1).t().contiguous())
        self.program.convolve(self.name(conv), view(weight), view(bias), channels, width, silu, state, x, out)

    def selective_scan(
        self,
        name: str,
        A: torch.Tensor,
        D: torch.Tensor | None,
        dt_bias: torch.Tensor | None,
        x: Columns,
        dt: Columns,
        B: Columns,
        C: Columns,
        z: Columns,
        out: Columns,
    ) -> None:
        """Apply Mamba's recurrence, with A [D, N] in float32, D [D] and the bias of dt [D]."""
        channels, states = A.shape
        state = self.state(channels, states, dtype=torch.float32)
        self.program.selective_scan(
            name, view(self.keep(A)), view(D), view(dt_bias), channels, states, state, x, dt, B, C, z, out
        )

    def head_scan(
        self,
        name: str,
        A: torch.Tensor,
        D: torch.Tensor | None,
        dt_bias: torch.Tensor | None,
        dim: int,
        groups: int,
        dt_limit: tuple[float, float],
        x: Columns,
        dt: Columns | None,
        B: Columns,
        C: Columns,
        out: Columns,
        z: Columns | None = None,
    ) -> None:
        """Apply Mamba-2's recurrence to heads of ``dim`` channels, with A, D and the bias of dt [H].

        Without ``dt``, the bias is the step size as it is.
        """
        heads, states = len(A), B.width // groups
        state = self.state(heads, dim, states, dtype=torch.float32)
        self.program.head_scan(
            name,
            view(self.keep(A)),
            view(D),
            view(dt_bias),
            heads,
            dim,
            groups,
            states,
            *dt_limit,
            state,
            x,
            dt,
            B,
            C,
            z,
            out,
        )

    def angles(
        self, name: str, frequencies: torch.Tensor, factor: float, out: Columns, rounded_to: torch.dtype | None = None
    ) -> None:
        """Compute cosines and sines of position times frequency, float32, times factor.

        They are rounded to a dtype; None for that of activations.
        """
        frequencies, code = self.keep(frequencies), DTYPE_CODES[rounded_to or self.dtype]
        self.program.angles(name, view(frequencies), len(frequencies), factor, code, out)

    def rotate(self, heads: int, angles: Columns, x: Columns) -> None:
        """Apply rotary angles to the first channels of each head of x, in place."""
        self.program.rotate("rotate", heads, angles, x)

    def pick_heads(
        self,
        heads: int,
        first: int,
        x: Columns,
        out: Columns,
        *,
        to: int = 0,
        width: int | None = None,
        shared: bool = False,
    ) -> None:
        """Copy channels of each head of x, from ``first`` on, to the heads of ``out``, from ``to`` on.

        ``width`` is their number, None for a whole head of ``out``. With ``shared``, x is one head for all of ``out``.
        """
        width = out.width // heads if width is None else width
        self.program.copy_heads("pick_heads", heads, first, to, width, shared, x, out)

    def remember(self, name: str, groups: int, k: Columns, v: Columns) -> tuple[int, int]:
        """Keep keys and values of all tokens in the state; returns the numbers of the two tensors."""
        keys, values = (self.state(groups, 0, c.width // groups, dtype=self.dtype, growing=1) for c in (k, v))
        for state, columns in ((keys, k), (values, v)):
            self.program.remember(f"{name}.cache", state, groups, columns)
        return keys, values

    def attend(
        self,
        name: str,
        heads: int,
        scale: float,
        q: Columns,
        cache: tuple[int, int],
        out: Columns,
        *,
        window: int | None = None,
        sinks: int = 0,
    ) -> None:
        """Attend causally to the keys and values that ``remember`` keeps.

        With a ``window``, a token sees itself, so many tokens before it, and the first ``sinks``.
        """
        keys, values = cache
        groups, widths = self.states[keys].shape[0], [self.states[state].shape[-1] for state in cache]
        back = -1 if window is None else window
        self.program.attend(name, heads, groups, *widths, back, sinks, scale, keys, values, q, out)

    def delta_rule(
        self,
        name: str,
        A_log: torch.Tensor,
        dt_bias: torch.Tensor,
        largest_beta: float,
        key_heads: int,
        q: Columns,
        k: Columns,
        v: Columns,
        a: Columns,
        b: Columns,
        out: Columns,
    ) -> None:
        """Apply the gated delta rule.

        For each head g = -exp(A_log) softplus(a + dt_bias) and beta = largest_beta sigmoid(b). ``a`` and ``dt_bias``
        have one value a head, or one a channel of its keys.
        """
        heads = A_log.numel()
        g, beta = (self.buffer(f"delta.{part}", c.width, torch.float32) for part, c in (("g", a), ("beta", b)))
        rate = -torch.exp(A_log.float().flatten()).repeat_interleave(a.width // heads)
        self.combine_row("add", a, dt_bias, g)
        self.combine_row("softplus_gate", g, rate, g)
        self.combine_row("sigmoid_gate", b, largest_beta, beta)
        key_dim, value_dim = k.width // key_heads, v.width // heads
        state = self.state(heads, key_dim, value_dim, dtype=torch.float32)
        self.program.delta_rule(name, key_heads, heads, key_dim, value_dim, key_dim**-0.5, state, q, k, v, g, beta, out)

    def route(
        self, name: str, routing: Routing, logits: Columns, bias: torch.Tensor | None = None, prefix: str = "router"
    ) -> Routes:
        """Choose experts for each token by the logits; ``bias`` [E] is added to the scores for the choice alone."""
        if logits.width % routing.groups or routing.open_groups > routing.groups:
            raise CannotLowerError(
                f"{name}: {logits.width} experts in {routing.groups} groups, {routing.open_groups} open"
            )
        most = logits.width // routing.groups * routing.open_groups
        if routing.each > most:
            raise CannotLowerError(f"{name}: a token meets {routing.each} of {most} experts")
        index = self.buffer(f"{prefix}.index", routing.each, torch.float32)
        weights = self.buffer(f"{prefix}.weights", routing.each, torch.float32 if routing.wide else None)
        self.program.route(
            name,
            view(bias),
            routing.sigmoid,
            routing.normalise,
            routing.epsilon,
            routing.factor,
            routing.groups,
            routing.open_groups,
            DTYPE_CODES[self.dtype if routing.rounds else torch.float32],
            logits,
            index,
            weights,
        )
        return Routes(logits.width, index, weights)

    def gather(self, name: str, routes: Routes, x: Columns, out: Columns) -> None:
        """Copy each token's row of x once for each of its experts, in the order of the experts."""
        self.program.gather(name, routes.experts, routes.chosen, x, out)

    def project_gathered(self, experts: nn.Module, stack: str, routes: Routes, x: Columns, out: Columns) -> None:
        """Multiply each of such rows by its expert's matrix in a stack."""
        name, matrices = f"{self.name(experts)}.{stack}", self._matrix(experts, stack)
        self.program.project_gathered(name, matrices, routes.experts, routes.chosen, x, out)

    def sum_gathered(self, name: str, routes: Routes, x: Columns, out: Columns) -> None:
        """Add up such rows of each token, weighted."""
        self.program.sum_gathered(name, routes.experts, routes.chosen, routes.weights, x, out)
