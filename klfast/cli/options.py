"""Arguments and options shared by several commands, and their parsers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from klfast.core.arguments import parse_bytes as _parse_bytes
from klfast.core.errors import InvalidInputError
from klfast.core.io import require_writable

if TYPE_CHECKING:
    from klfast.quant.spec import QuantSpec


def parse_bytes(text: str) -> int:
    """Parse a size as ``klfast.core.arguments.parse_bytes`` does; an invalid one is wrong usage."""
    try:
        return _parse_bytes(text)
    except InvalidInputError as error:
        raise typer.BadParameter(str(error)) from None


def parse_spec(text: str) -> QuantSpec:
    """Parse a quantization spec; an invalid one is wrong usage."""
    from klfast.quant.spec import QuantSpec

    try:
        return QuantSpec.parse(text)
    except InvalidInputError as error:
        raise typer.BadParameter(str(error)) from None


def parse_keep(texts: Iterable[str] | None) -> dict[str, QuantSpec | None] | None:
    """Parse texts PATTERN=SPEC or PATTERN=full into klfast.plan's ``keep``; anything else is wrong usage."""
    found: dict[str, QuantSpec | None] = {}
    for text in texts or ():
        pattern, equals, spec = text.rpartition("=")  # the last one, since a regular expression may hold others
        if not (pattern and equals):
            raise typer.BadParameter(
                f"--keep takes PATTERN=SPEC (examples: lm_head=int8-g64-sym, in_proj=full), got {text!r}"
            )
        wanted = None if spec == "full" else parse_spec(spec)
        if found.setdefault(pattern, wanted) != wanted:
            raise typer.BadParameter(f"--keep gives {pattern!r} two precisions")
    return found or None


USUAL_GGUF = "int8-g32-asym"


def parse_gguf(text: str) -> str:
    """Check the option --gguf; anything but exact, dense or a spec is wrong usage."""
    if text not in ("exact", "dense", USUAL_GGUF):  # to parse a spec takes torch
        parse_spec(text)
    return text


def one_of(*choices: str) -> Callable[[str], str]:
    """Return the parser of an option that takes one of ``choices``; anything else is wrong usage."""

    def parse(text: str) -> str:
        if text not in choices:
            raise typer.BadParameter(f"{text!r} is not one of {', '.join(choices)}")
        return text

    return parse


def in_range(name: str, holds: Callable[[float], bool], wanted: str) -> Callable[[float | None], float | None]:
    """Return the callback of a numeric option; a number for which ``holds`` is false is wrong usage."""

    def check(value: float | None) -> float | None:
        if value is not None and not holds(value):
            raise typer.BadParameter(f"{name} must be {wanted}, got {value}")
        return value

    return check


def window_count(given: str | int) -> int | None:
    """Parse a number of windows; None for "all"."""
    text = str(given)  # typer parses defaults, too
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is neither a positive integer nor all")
    return int(text)


# Repeated from the library, whose import would delay --help by a second.
dtype_name = one_of("float32", "bfloat16", "float16", "auto")
scale_name = one_of("absmax", "mse")
activation_name = one_of("exact", "int8", "auto")
device_name = one_of("cpu", "cuda", "xpu")
rounding_name = one_of("nearest", "gptq")
objective_name = one_of("size", "latency")
method_name = one_of("optimal", "greedy", "uniform")
metric_name = one_of("kl_teacher_student", "kl_student_teacher", "jsd", "mse", "sqnr_db", "delta_ce", "top1_agree")

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A local folder, a GGUF file, a hub id, or a bundled model: hymba, mamba, mamba2.",
        show_default=False,
    ),
]
HeldOut = Annotated[
    str, typer.Option(help='A text file, a token file (.npy, .json), or "evaluation", the bundled text.')
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else, on standard output.")]
_WINDOWS = "Windows of the text, from its start, or all."
Windows = Annotated[int | None, typer.Option(parser=window_count, metavar="N|all", help=_WINDOWS)]
GPTQ_WINDOWS = 64  # to round on, unless others are asked for
GptqWindows = Annotated[
    int | None,
    typer.Option(
        parser=window_count,
        metavar="N|all",
        help=f"{_WINDOWS} By GPTQ, windows to round on.",
        show_default=f"32; {GPTQ_WINDOWS} for GPTQ",
    ),
]
AllWindows = Annotated[
    int | None, typer.Option(parser=window_count, metavar="N|all", help=_WINDOWS, show_default="all")
]
Length = Annotated[int, typer.Option(help="Tokens in a window.", min=2)]
BatchSize = Annotated[int, typer.Option(help="Windows to compute at once.", min=1)]
_SCALE = "absmax, or mse: clip each group for the least squared error."
Scale = Annotated[str, typer.Option(parser=scale_name, metavar="NAME", help=_SCALE)]
_PATTERN = 'a name, its last part ("in_proj"), wildcards ("layers.0.*") or "re:" and a regular expression; repeatable'
Layers = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help=f"Quantize only the selected layers: {_PATTERN}.", show_default=False),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN", help="Leave the selected layers in full precision; repeatable.", show_default=False
    ),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN=SPEC",
        show_default=False,
        help="Give the selected layers this precision whatever the budget: lm_head=int8-g64-sym, or in_proj=full; "
        "repeatable.",
    ),
]
PlanScale = Annotated[
    str | None,
    typer.Option(
        parser=scale_name,
        metavar="NAME",
        show_default=False,
        help=f"{_SCALE} By default the plan's; absmax with --uniform.",
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        parser=dtype_name, metavar="NAME", help="Compute in float32, bfloat16, float16, or auto for the stored dtype."
    ),
]
Gguf = Annotated[
    str,
    typer.Option(
        parser=parse_gguf,
        metavar="exact|dense|SPEC",
        help="Quantized matrices of a GGUF file: those that klfast's formats hold are kept; a spec quantizes the "
        "others anew, exact expands them, and dense expands all.",
    ),
]
Device = Annotated[
    str, typer.Option(parser=device_name, metavar="NAME", help="Compute on cpu, cuda (NVIDIA) or xpu (Intel).")
]
LocalFilesOnly = Annotated[
    bool, typer.Option("--local-files-only", help="Look up a hub id in the local cache only, without network.")
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that comes with the model. Only for trusted sources."),
]
# No machine has more hardware threads; far more than that are too many for torch's counter.
Threads = Annotated[int | None, typer.Option(help="CPU threads; torch decides by default.", min=1, max=4096)]
Resume = Annotated[
    bool,
    typer.Option("--resume/--no-resume", help="Continue from OUT.partial, which a stopped run leaves, or discard it."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing --out.")]


def loads_models(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options for loading models before a command's last one; it receives them as ``loading``."""
    own = inspect.signature(command, eval_str=True)
    parameters = [parameter for parameter in own.parameters.values() if parameter.name != "loading"]
    parameters[-1:-1] = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=False, annotation=annotation)
        for name, annotation in (("local_files_only", LocalFilesOnly), ("trust_remote_code", TrustRemoteCode))
    ]

    @functools.wraps(command)
    def run(*, local_files_only: bool, trust_remote_code: bool, **rest: object) -> None:
        command(**rest, loading={"local_files_only": local_files_only, "trust_remote_code": trust_remote_code})

    run.__dict__["__signature__"] = own.replace(parameters=parameters)  # which typer reads
    return run


def require_free(out: Path, force: bool | None, *, folder: bool = False, option: str = "--out") -> None:
    """Raise, before the work begins, if the file (or folder) ``out`` must not be replaced or cannot be written.

    ``force`` is None for commands without --force.
    """
    if out.exists() and not force:
        remedy = "" if force is None else " or pass --force to replace it"
        raise InvalidInputError(f"{out} exists; name another {option}{remedy}")
    if not out.absolute().parent.is_dir():
        raise InvalidInputError(
            f"the folder {out.absolute().parent} does not exist; create it or name another {option}"
        )
    if folder and out.exists() and not out.is_dir():
        raise InvalidInputError(f"{out} is a file; name a folder with {option}")
    if not folder and out.is_dir():
        raise InvalidInputError(f"{out} is a folder; name a file with {option}")
    if not folder and out.exists() and not out.is_file():
        raise InvalidInputError(f"{out} is not a regular file; name another {option}")
    require_writable(out, folder=folder)


def given(context: typer.Context, name: str) -> bool:
    """Return True if a parameter was given on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def gptq_windows(context: typer.Context, windows: int | None) -> int | None:
    """Return how many windows GPTQ rounds on: those asked for by ``GptqWindows``, else 64; None for all."""
    return windows if given(context, "windows") else GPTQ_WINDOWS


def goes_with(context: typer.Context, what: str, *names: str) -> None:
    """Raise BadParameter if one of these parameters was given, which would say nothing without ``what``."""
    for parameter in context.command.params:
        if parameter.name in names and given(context, parameter.name):
            raise typer.BadParameter(f"{'/'.join([*parameter.opts, *parameter.secondary_opts])} goes with {what}")


def exactly_one(**options: object) -> None:
    """Raise BadParameter unless exactly one of the options is given."""
    if sum(value is not None for value in options.values()) != 1:
        names = [name if name.isupper() else f"--{name.replace('_', '-')}" for name in options]
        raise typer.BadParameter(f"give exactly one of {', '.join(names)}")
