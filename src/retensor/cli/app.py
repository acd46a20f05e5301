"""The commands, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from retensor import __version__
from retensor.cli.bounds import bounds
from retensor.cli.check import run, verify
from retensor.cli.claims import claims
from retensor.cli.compare import compare
from retensor.cli.cost import accelerators, cost
from retensor.cli.graph import graph
from retensor.cli.pack import pack
from retensor.cli.plan import plan
from retensor.cli.sweep import sweep
from retensor.cli.systems import systems

app = typer.Typer(
    name="retensor",
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"retensor {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True, epilog="Example: retensor plan densenet121 --scratchpad M_H -o plan.json")
def retensor(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Plan where every tensor of a network lives in an accelerator's scratchpad; prove, check and run the plan.

    Exit codes: 0 done; 2 bad input, an invalid plan (verify) or outputs that differ (run); 3 the scratchpad is too
    small; 4 a packing not decided in time; 130 stopped by Ctrl-C before there was a result.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command(epilog="Example: retensor bounds densenet121 --weights")(bounds)
app.command(epilog="Example: retensor plan model.onnx --scratchpad 2MiB -o plan.json --report report.html")(plan)
app.command(epilog="Example: retensor verify plan.json model.onnx")(verify)
app.command(epilog="Example: retensor run plan.json model.onnx --seed 1")(run)
app.command(epilog="Example: retensor compare densenet121 --scratchpad M_H")(compare)
app.command(epilog="Example: retensor sweep densenet121 --points 5 --picture sweep.svg")(sweep)
app.command(epilog="Example: retensor cost mobilenet_v2 resnet50 --dtype int8 --accelerator edge-tpu")(cost)
app.command(epilog="Example: retensor accelerators --json")(accelerators)
app.command(epilog="Example: retensor pack buffers.csv --capacity 1MiB -o packed.csv --picture packed.svg")(pack)
app.command(epilog="Example: retensor graph model.onnx --input image=1x3x224x224 -o graph.json")(graph)
app.command(epilog="Example: retensor systems --json")(systems)
app.command(epilog="Example: retensor claims cosma")(claims)
