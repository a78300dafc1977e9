"""The command `baton`. It reads, checks, asks and shows; nothing here computes, and torch is never imported.

A command is a function in a module of its own; this one puts them together. Commands that operate a cluster talk to
its controller's admin API (`client.py`). Exit codes are those of `exits.py`:

    0    done, or drained in order
    1    failed
    2    wrong arguments or a wrong configuration; nothing was done
    3    no cluster found, or it does not answer
    4    refused by the cluster
    5    under way, but not reached within --timeout
    130  interrupted, or a question answered with no
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ... import __version__
from ...common.errors import BatonError
from . import bench, config, down, drain, logs, model, rollout, scale, serve, status, top, trace
from .exits import EPILOG, Exit, exit_code

app = typer.Typer(
    name="baton",
    help="Serve large language models with prefill and decode on separate workers.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(epilog=EPILOG)(serve.serve)
app.command(epilog=EPILOG)(status.status)
app.command(epilog=EPILOG)(top.top)
app.command(epilog=EPILOG)(trace.trace)
app.command(epilog=EPILOG)(logs.logs)
app.command(epilog=EPILOG)(scale.scale)
app.command(epilog=EPILOG)(drain.drain)
app.command(epilog=EPILOG)(rollout.rollout)
app.command(epilog=EPILOG)(down.down)
app.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    short_help="Measure a server: latency, throughput, goodput.",
)(bench.bench)

config_app = typer.Typer(help="Look at a configuration.", no_args_is_help=True)
config_app.command("check", epilog=EPILOG)(config.check)
app.add_typer(config_app, name="config")

model_app = typer.Typer(help="Prepare models.", no_args_is_help=True)
model_app.command("import", epilog=EPILOG)(model.import_model)
app.add_typer(model_app, name="model")


def main() -> None:
    """Console script. Every error is one line."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """The exit code of `baton ARGUMENTS`."""
    try:
        return app(arguments, prog_name="baton", standalone_mode=False) or Exit.DONE
    except typer.TyperException as error:
        return _complain(error.format_message(), Exit.ARGUMENTS)
    except BatonError as error:
        return _complain(error.message, exit_code(error))
    except (KeyboardInterrupt, typer.Abort):
        return Exit.INTERRUPTED


def _complain(message: str, code: Exit) -> int:
    if message:  # empty: a command without arguments, which has shown its help
        print(f"baton: {' '.join(message.split())}", file=sys.stderr)
    return code


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"baton {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    del version  # handled by its callback
