"""The command line's entry: runs a command, and says its error in one line."""

import contextlib
import io
import os
import sys

from ..client.jobs import tell
from ..errors import CrossJobError
from . import cli, export, steer  # noqa: F401  they add their commands
from .app import app, cluster, stdout
from .text import clean


def main(words: list[str] | None = None) -> None:
    """The command line; errors are one line on stderr, and their exit code."""
    os.environ.setdefault("RAY_LOG_TO_STDERR", "0")
    os.environ.setdefault("SLIME_CROSS_JOB_LOG_LEVEL", "ERROR")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a character is shown its number
            stream.reconfigure(errors="backslashreplace")
    code = 0
    try:
        app(words, standalone_mode=True, prog_name="slime-cross-job")
    except CrossJobError as error:
        said, asked = clean(error, most=4000), cluster()
        tell(type(error)(f"{said} (Ray cluster at {asked})" if asked and asked not in said else said))
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BrokenPipeError:  # as where `head` has seen enough
        os._exit(0)
    with contextlib.suppress(BrokenPipeError):
        stdout().flush()
    os._exit(code)  # Ray takes a while to say farewell, and a driver that only looked has nothing to say
