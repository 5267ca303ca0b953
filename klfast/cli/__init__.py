"""The command line ``klfast``. Commands import what they need when they run, so that ``--help`` is fast.

Exit codes: 0 done, 1 failed (one line on standard error says why), 2 wrong usage, 130 interrupted, 143 told to end.
"""

from __future__ import annotations

import gc
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import klfast
from klfast.cli import output
from klfast.core.errors import KlfastError

# The classes of contexts and parameters are click's or typer's own, depending on typer's version: hence Any.


def _without_flag_types(parameters: list[Any]) -> list[Any]:
    """Hide the value's type in the help of flags, which take no value."""
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    return parameters


class _Command(TyperCommand):
    def get_params(self, ctx: Any) -> list[Any]:
        return _without_flag_types(super().get_params(ctx))


class _Group(TyperGroup):
    """Lists commands in pipeline order; turns KlfastError and OSError into one line and exit code 1."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_flag_types(super().get_params(ctx))

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # typer exits quietly
        except (KlfastError, OSError) as error:
            message = str(error)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            message = f"out of memory; use a smaller model, batch or window ({error or type(error).__name__})"
        print(f"klfast: {' '.join(message.split())}", file=sys.stderr)
        raise typer.Exit(1)


def _is_out_of_memory(error: Exception) -> bool:
    """Return True for running out of memory, including torch's errors, which have no type of their own on the CPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in str(error)
    )


app = typer.Typer(cls=_Group, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]})


def _version(wanted: bool) -> None:
    if wanted:
        print(f"klfast {klfast.__version__}")
        raise typer.Exit()


def _wait(**how: str) -> None:
    """Let OpenMP's idle threads sleep, not spin as long as by default: it matters beside other busy programs.

    A sweep is several times as fast if they sleep at once. Between tokens, which come soon, they spin for a thirtieth
    of the default's time. Timings (bench) keep the default. OpenMP reads this when torch is imported; whoever has set
    it knows better.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ.update(how)


@app.callback(invoke_without_command=True)
def _klfast(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """KL-guided mixed-precision quantization of SSM-Transformer language models.

    Start with `klfast demo`. For your own model: sweep, plan, quantize, then eval and generate.
    """
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())
    elif ctx.invoked_subcommand in ("generate", "serve"):
        _wait(GOMP_SPINCOUNT="10000")
    elif ctx.invoked_subcommand not in ("bench", "plan", "pareto"):
        _wait(OMP_WAIT_POLICY="passive")
    if ctx.invoked_subcommand in ("generate", "serve"):
        # Imports of torch and transformers leave a million objects and no garbage; collections would only look at them.
        # The command goes on collecting after it has loaded its model (runtime.resume_collections).
        gc.disable()
        ctx.call_on_close(gc.enable)


from klfast.cli import (  # noqa: E402
    bench,
    compare,
    demo,
    doctor,
    evaluate,
    export,
    export_kernels,
    generate,
    lm_eval,
    pareto,
    plan,
    quantize,
    report,
    serve,
    study,
    sweep,
)

for command in (
    demo.demo,
    sweep.sweep,
    plan.plan,
    pareto.pareto,
    quantize.quantize,
    evaluate.evaluate,
    compare.compare,
    lm_eval.lm_eval,
    export.export,
    generate.generate,
    serve.serve,
    bench.bench,
    report.report,
    study.study,
    doctor.doctor,
    export_kernels.export_kernels,
):
    name = "eval" if command is evaluate.evaluate else command.__name__.replace("_", "-")
    app.command(name, cls=_Command)(command)


def main() -> None:
    """Entry point of the ``klfast`` script."""
    output.run(lambda: app(prog_name="klfast"))
