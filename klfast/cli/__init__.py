"""The command line ``klfast``. Commands import what they need when they run, so that ``--help`` is quick.

Exit codes: 0 done, 1 failed (one line on standard error says why), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from typer.core import TyperCommand, TyperGroup

import klfast
from klfast.cli import output
from klfast.core.errors import KlfastError


class _BareFlags:
    """Help shows flags without the type of a value: they take none."""

    def get_params(self, ctx):
        found = super().get_params(ctx)
        for parameter in found:
            if getattr(parameter, "is_flag", False):
                parameter.metavar = ""
        return found


class _Command(_BareFlags, TyperCommand):
    pass


class _Group(_BareFlags, TyperGroup):
    """Commands in the order of their work; klfast's own errors and the system's end as one line and exit code 1."""

    def list_commands(self, ctx):
        return list(self.commands)

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # typer ends quietly
        except (KlfastError, OSError) as error:
            message = str(error)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            message = f"out of memory; use a smaller model, batch or window ({error or type(error).__name__})"
        print(f"klfast: {' '.join(message.split())}", file=sys.stderr)
        raise typer.Exit(1)


def _is_out_of_memory(error: Exception) -> bool:
    """Also torch's errors, which on the CPU have no type of their own."""
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


@app.callback(invoke_without_command=True)
def _klfast(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """KL-guided mixed-precision quantization of SSM-Transformer language models.

    Start with `klfast demo`. For a model of your own: sweep, plan, quantize, then eval and generate.
    """
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())
    elif ctx.invoked_subcommand not in ("generate", "bench"):
        # Threads that wait sleep instead of spinning: beside other busy programs a sweep is then several times as fast.
        # Decoding, all short waits, keeps OpenMP's default, and so does what is timed. Read when torch is imported, so it is set before.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


from klfast.cli import bench, demo, doctor, evaluate, generate, plan, quantize, report, sweep  # noqa: E402

for command in (
    demo.demo,
    sweep.sweep,
    plan.plan,
    quantize.quantize,
    evaluate.evaluate,
    generate.generate,
    bench.bench,
    report.report,
    doctor.doctor,
):
    app.command("eval" if command is evaluate.evaluate else command.__name__, cls=_Command)(command)


def main() -> None:
    """Entry point of the ``klfast`` script."""
    output.run(lambda: app(prog_name="klfast"))
