"""How a job's script ends: one clear line and an exit code that tells the verdicts apart (see errors.py)."""

import logging
import os
import sys
from collections.abc import Callable

from ..errors import CrossJobError
from . import shutdown


def run(main: Callable[[], None]) -> None:
    """Run a job's `main`. SIGTERM is a wish to stop (shutdown.py). A CrossJobError that nobody caught becomes one line
    on stderr and the error's exit code; any other exception stays a traceback with exit code 1.
    """
    log_to_stderr()
    shutdown.want()
    try:
        main()
    except CrossJobError as error:
        if not error.exit_code:
            return
        tell(error)
        sys.exit(error.exit_code)


def tell(error: BaseException) -> None:
    """Print an error as one line."""
    sys.stdout.flush()
    print(f"{type(error).__name__}: {' | '.join(str(error).splitlines())}", file=sys.stderr, flush=True)


def log_to_stderr() -> None:
    """Show what is logged, from SLIME_CROSS_JOB_LOG_LEVEL on, unless logging was set up before."""
    level = os.environ.get("SLIME_CROSS_JOB_LOG_LEVEL", "INFO")
    logging.basicConfig(level=level, format="%(asctime)s %(name)s %(levelname)s %(message)s")
