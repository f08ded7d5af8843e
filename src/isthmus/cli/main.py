"""``isthmus``: the verbs, ``--version``, and how an error is told: one red line, no traceback.

Every verb is a thin function in a file of its own that imports what it runs when it runs, so that ``--help`` is quick.
"""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from isthmus import __version__
from isthmus.cli import bench, plan, simulate, testbed
from isthmus.cli.decouple import decouple
from isthmus.cli.demo import demo
from isthmus.cli.embed import embed
from isthmus.cli.evaluate import evaluate
from isthmus.cli.generate import generate
from isthmus.cli.pretrain import pretrain
from isthmus.cli.profile import profile
from isthmus.cli.trace import trace
from isthmus.cli.tune import tune
from isthmus.cli.worker import worker
from isthmus.spec.errors import IsthmusError


class _OneLineErrors(TyperGroup):
    """Tells errors that a user can act on in one line on stderr and exits with 2 (or the error's own ``exit_code``).

    ``ISTHMUS_TRACEBACK=1`` shows the traceback instead. Other exceptions are bugs and keep theirs.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            if os.environ.get("ISTHMUS_TRACEBACK") == "1" or isinstance(error, BrokenPipeError):
                raise
            Console(stderr=True).print(Text(_one_line(error), style="bold red"), soft_wrap=True)
            raise typer.Exit(getattr(error, "exit_code", IsthmusError.exit_code)) from error


def _one_line(error: Exception) -> str:
    message = " ".join(str(error).split()) or type(error).__name__
    # Not our own message, so possibly a bug: say how to see more.
    hint = "" if isinstance(error, IsthmusError) else " (ISTHMUS_TRACEBACK=1 shows where)"
    return f"error: {message}{hint}"


app = typer.Typer(
    cls=_OneLineErrors,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo)
app.command()(profile)
app.command()(tune)
app.command()(trace)
app.command()(decouple)
app.command()(pretrain)
app.command()(evaluate)
app.command()(embed)
app.command()(generate)
app.command()(worker)
app.add_typer(bench.app, name="bench")
app.add_typer(plan.app, name="plan")
app.add_typer(simulate.app, name="simulate")
app.add_typer(testbed.app, name="testbed")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"isthmus {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train and serve large Transformers where the links are narrow: move the computation, not the weights."""
