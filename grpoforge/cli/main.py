"""The program: its commands, and the one place where an error becomes a line, a hint and an exit code."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grpoforge import __version__
from grpoforge.cli import data_command, plugins_command, preference_command, recipes_command
from grpoforge.cli.bench_command import bench
from grpoforge.cli.eval_command import evaluate
from grpoforge.cli.lab_command import lab
from grpoforge.cli.train_command import train

if TYPE_CHECKING:
    from grpoforge.errors import GrpoforgeError

SETTING = re.compile(r"[A-Za-z_][\w.-]*=")
"""How a setting begins that follows another one."""

# What the parser raises for a flag or an argument; typer exports it under no name of its own.
UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(
    name="grpoforge",
    help="GRPO post-training in which every scientific choice is a plugin.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train)
app.command("eval")(evaluate)
app.command("bench")(bench)
app.command("lab")(lab)
app.add_typer(data_command.app, name="data")
app.add_typer(plugins_command.app, name="plugins")
app.add_typer(recipes_command.app, name="recipes")
app.add_typer(preference_command.app, name="preference")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 a failed run, 2 a user's mistake, 130 interrupted."""
    from grpoforge.errors import GrpoforgeError
    from grpoforge_kernels.errors import KernelError

    _log_to_stderr()
    try:
        given = _spread_settings(sys.argv[1:] if arguments is None else list(arguments))
        code = app(args=_complete_resume(given) or ["--help"], prog_name="grpoforge", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except (GrpoforgeError, KernelError) as error:
        print_error(error)
        sys.exit(error.exit_code)
    except UsageError as error:
        print_error(_of_command_line(error))
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("\ninterrupted\n")
        sys.exit(130)
    except BrokenPipeError:
        # The reader left (`| head`): nothing more can be said, and Python would complain on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _of_command_line(error: Any) -> GrpoforgeError:
    """A flag or argument that the parser refuses, said as every other mistake is."""
    from grpoforge.errors import GrpoforgeError

    command = error.ctx.command_path if error.ctx else "grpoforge"
    message = error.format_message().strip().removesuffix(".")
    return GrpoforgeError(message[:1].lower() + message[1:], f"see `{command} --help`")


def print_error(error: Exception) -> None:
    """``error:`` and ``hint:`` on stderr, made safe: a message may quote a file or a model.

    A run that was interrupted says where it stands and how to go on.
    """
    from grpoforge.errors import Interrupted
    from grpoforge.sanitize import one_line

    # Stopping a run is no mistake.
    before_message, before_hint = ("", "") if isinstance(error, Interrupted) else ("error: ", "hint: ")
    message, hint = getattr(error, "message", str(error)), getattr(error, "hint", "")
    sys.stderr.write(f"{before_message}{_safe(message)}\n")
    if hint:
        sys.stderr.write(f"{before_hint}{one_line(hint, max_chars=1000)}\n")


def _safe(message: str) -> str:
    """Control characters shown; the lines of a message that lists several sources stay lines."""
    from grpoforge.sanitize import sanitize

    return sanitize(message, max_chars=4000)


def _complete_resume(arguments: list[str]) -> list[str]:
    """``--resume`` without a value means the latest run."""
    completed: list[str] = []
    for index, argument in enumerate(arguments):
        completed.append(argument)
        following = arguments[index + 1] if index + 1 < len(arguments) else "-"
        if argument == "--resume" and following.startswith("-"):
            completed.append("latest")
    return completed


def _spread_settings(arguments: list[str]) -> list[str]:
    """``--set a.b=1 c.d=2`` means ``--set a.b=1 --set c.d=2``."""
    spread: list[str] = []
    is_setting = False
    for index, argument in enumerate(arguments):
        is_value = index > 0 and arguments[index - 1] in ("--set", "-s")
        if is_setting and not is_value and SETTING.match(argument):
            spread.append("--set")
        else:
            is_setting = is_value
        spread.append(argument)
    return spread


class _Talk(logging.Handler):
    """``warning: ...`` on whatever standard error is at the time: a live display puts itself in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        from grpoforge.sanitize import sanitize

        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        sys.stderr.write(f"{level}{sanitize(record.getMessage())}\n")


def _log_to_stderr() -> None:
    for name in ("grpoforge", "grpoforge_plugins", "grpoforge_kernels"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [_Talk()]
        logger.setLevel(logging.INFO)
        logger.propagate = False
    # Which backend runs what is said by the commands that are about it.
    logging.getLogger("grpoforge_kernels").setLevel(logging.WARNING)
