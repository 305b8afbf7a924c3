"""What all commands of `slime-cross-job` have in common: options, the connection, output, exit codes.

Exit codes are those of errors.py (0 well, 2 bad input, 3 refused, 4 unreachable, 5 too late, 8, 9 ...), so that a
script can tell them apart; `doctor` ends with 1 where it found an error.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console, RenderableType

from ..errors import BadInput
from ..types import DEFAULT_NAMESPACE
from .text import dumps

CONNECT_S = 60.0
_WIDEST = 2000  # columns of what is printed as wide as it is

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
Wide = Annotated[bool, typer.Option("--wide", "-w", help="every column, whatever the width of the terminal")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="do not ask")]
RolloutId = Annotated[int, typer.Argument(metavar="ID", help="the rollout", min=0)]

DEFAULT = DEFAULT_NAMESPACE


_ours: TextIO | None = None  # stdout, where Ray is given stderr in its place
_cluster = ""  # address of the Ray cluster that the command asks
_named = False  # whether its output names that cluster


def stdout() -> TextIO:
    """Where commands print."""
    return _ours if _ours is not None and sys.stdout is sys.stderr else sys.stdout


def console(wide: bool = False) -> Console:
    """Plain text in: markup, emoji codes and highlighting are off, because jobs and models say what they like. `wide`:
    lines are as long as they are; the terminal wraps them."""
    to = stdout()
    width = _WIDEST if wide else None if to.isatty() or "COLUMNS" in os.environ else 160
    return Console(file=to, markup=False, emoji=False, highlight=False, width=width, soft_wrap=False)


def out(shown: RenderableType, wide: bool = False) -> None:
    """Print what people read; its first line names the cluster."""
    _name_cluster(stdout())
    console(wide).print(shown)


def out_text(text: str) -> None:
    """Print what may be read by programs; the cluster is named on stderr."""
    _name_cluster(sys.stderr)
    print(text, file=stdout(), flush=True)


def say(text: str) -> None:
    """To stderr."""
    _name_cluster(sys.stderr)
    print(text, file=sys.stderr, flush=True)


def cluster() -> str:
    """Address of the Ray cluster that this command asks; empty: it has not come so far."""
    return _cluster


def _name_cluster(to: TextIO) -> None:
    global _named
    if _cluster and not _named:
        _named = True
        print(f"Ray cluster at {_cluster}", file=to, flush=True)


def out_json(value: Any, lines: bool = False) -> None:
    out_text(dumps(value, None if lines else 2))


def connected(address: str | None, namespace: str) -> Any:
    """A Viewer (viewer.py). Ends the process with exit code 4 where the cluster does not answer within CONNECT_S."""
    from .viewer import Viewer

    there = cluster_at(address)
    with deadline(CONNECT_S, f"the Ray cluster at {there} does not answer within {CONNECT_S:.0f} s"):
        return Viewer(namespace, there)


def named(address: str | None) -> str:
    """What to give to connection.find_address."""
    return address or os.environ.get("RAY_ADDRESS") or "auto"


def cluster_at(address: str | None) -> str:
    """The address of the cluster to ask: `address`, else RAY_ADDRESS, else that of the only cluster that has a node on
    this machine. The output names it. Raises as connection.find_address."""
    from ..client.connection import find_address

    global _ours, _cluster, _named
    there = find_address(named(address))
    if there != _cluster:
        _cluster, _named = there, False
    if sys.stdout is not sys.stderr:  # Ray prints warnings of any raylet to it, in the midst of what programs read
        _ours, sys.stdout = sys.stdout, sys.stderr
    return there


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
    global _named
    _named = True
    say(f"on the Ray cluster at {_cluster}: {words}")
    if yes:
        return
    if not sys.stdin.isatty():
        raise BadInput("there is no terminal to ask on: add --yes")
    if not typer.confirm("Go on?", err=True):
        raise typer.Exit(1)
