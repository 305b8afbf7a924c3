"""What all commands of `slime-cross-job` have in common: options, the connection, output, exit codes.

Exit codes are those of errors.py (0 well, 2 bad input, 3 refused, 4 unreachable, 5 too late, 8, 9 ...), so that a
script can tell them apart; `doctor` ends with 1 where it found an error.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType

from ..errors import BadInput, CrossJobError
from ..types import DEFAULT_NAMESPACE
from .text import dumps

CONNECT_S = 60.0

app = typer.Typer(
    name="slime-cross-job",
    help="See, ask and steer slime's split rollout and train jobs. Reading commands never disturb a run.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 well, 1 doctor found an error, 2 bad input or not found, 3 refused, 4 unreachable, 5 the "
    "deadline passed, 9 it passed while the job was paused or full.",
)

Address = Annotated[
    str | None, typer.Option("--address", "-a", help="of the Ray cluster (default: RAY_ADDRESS, else this machine's)")
]
Namespace = Annotated[str, typer.Option("--namespace", "-n", help="Ray namespace of the broker")]
JobId = Annotated[str | None, typer.Option("--job-id", "-j", help="the experiment (default: the only one)")]
Json = Annotated[bool, typer.Option("--json", help="as JSON, for programs")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="do not ask")]
RolloutId = Annotated[int, typer.Argument(metavar="ID", help="the rollout", min=0)]

DEFAULT = DEFAULT_NAMESPACE


@cache
def console() -> Console:
    """Plain text in: markup, emoji codes and highlighting are off, because jobs and models say what they like."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160
    return Console(markup=False, emoji=False, highlight=False, width=width, soft_wrap=False)


def out(shown: RenderableType) -> None:
    console().print(shown)


def say(text: str) -> None:
    """To stderr."""
    print(text, file=sys.stderr, flush=True)


def out_json(value: Any, lines: bool = False) -> None:
    print(dumps(value, None if lines else 2), flush=True)


def connected(address: str | None, namespace: str) -> Any:
    """A Viewer (viewer.py). Ends the process with exit code 4 where the cluster does not answer within CONNECT_S."""
    from ..link import find_address
    from .viewer import Viewer

    there = find_address(where(address))
    with deadline(CONNECT_S, f"the Ray cluster at {there} does not answer within {CONNECT_S:.0f} s"):
        return Viewer(namespace, there)


def where(address: str | None) -> str:
    """The address to go to, as for link.find_address."""
    return address or os.environ.get("RAY_ADDRESS") or "auto"


@contextlib.contextmanager
def deadline(seconds: float, words: str) -> Iterator[None]:
    """End this process if the block takes longer: Ray waits for some clusters without end."""

    def late() -> None:
        say(f"ClusterUnreachable: {words}: check the address, and slime-cross-job doctor")
        os._exit(4)

    timer = threading.Timer(seconds, late)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def sure(words: str, yes: bool) -> None:
    """Say what will happen, and where; ask on a terminal. BadInput: nobody can be asked. Exit: it is not wanted."""
    import ray

    say(f"on the Ray cluster at {ray.get_runtime_context().gcs_address}: {words}")
    if yes:
        return
    if not sys.stdin.isatty():
        raise BadInput("nobody can be asked here: add --yes")
    if not typer.confirm("Go on?", err=True):
        raise typer.Exit(1)


def main(words: list[str] | None = None) -> None:
    """The command line; errors are one line on stderr, and their exit code."""
    from ..jobs import tell
    from . import cli, export, steer  # noqa: F401  they add their commands

    os.environ.setdefault("RAY_LOG_TO_STDERR", "0")
    os.environ.setdefault("SLIME_CROSS_JOB_LOG_LEVEL", "ERROR")
    code = 0
    try:
        app(words, standalone_mode=True, prog_name="slime-cross-job")
    except CrossJobError as error:
        from .text import clean

        tell(type(error)(clean(error, most=4000)))
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BrokenPipeError:  # as where `head` has seen enough
        os._exit(0)
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    os._exit(code)  # Ray takes a while to say farewell, and a driver that only looked has nothing to say
