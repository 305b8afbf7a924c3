"""The settings of cross-job as they are read and checked; the table of them is `slime/cross_job_settings.py`."""

import argparse
import logging
import math
import os
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from ..cross_job_settings import ABOUT, OF_JOB, STORE_SOURCES, Table, add_settings, flag, holds_password
from .errors import BadInput
from .types import check_number, check_seconds

__all__ = ["ABOUT", "OF_JOB", "Settings"]

logger = logging.getLogger(__name__)

COMPRESSIONS: tuple[str, ...] = ABOUT["compression"]["choices"]


@dataclass(frozen=True)
class Settings(Table):
    """How a client behaves. Those of the job (see OF_JOB) must agree among its clients (None: as the other side says,
    or the default); the rest is the client's own. Bytes are of payloads, `_s` are seconds.

    Raises:
        BadInput: a value that is out of range, naming the flag.
    """

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not None or one.default is not None:
                object.__setattr__(self, one.name, check_setting(one.name, value))
        for name in ("store_mode", "compression"):
            if getattr(self, name) is not None and self.store is None:
                raise BadInput(f"{flag(name)} {getattr(self, name)} has no effect without {flag('store')}")
        if self.on_stale is not None and self.max_staleness is None:
            raise BadInput(f"{flag('on_stale')} {self.on_stale} has no effect without {flag('max_staleness')}")
        if not self.dead_after_s >= 3 * self.heartbeat_s:
            raise BadInput(
                f"{flag('dead_after_s')} {self.dead_after_s:g} must be at least 3 times {flag('heartbeat_s')} "
                f"({self.heartbeat_s:g}), or one late heartbeat counts as a death"
            )

    @classmethod
    def from_args(cls, args: Any) -> "Settings":
        """Read the `cross_job_*` attributes of `args` (slime's, or any argparse namespace); absent: defaults.

        Raises:
            BadInput: see the class, and store_uri.
        """
        given = {name: getattr(args, f"cross_job_{name}", None) for name in ABOUT}
        variable, file = (getattr(args, f"cross_job_{name}", None) for name in STORE_SOURCES)
        given["store"] = store_uri(given["store"], variable, file)
        return cls(**{name: value for name, value in given.items() if value is not None})


def check_setting(name: str, value: Any) -> Any:
    """Return the value of a setting in its type (numpy's numbers as Python's). Raises BadInput, naming its flag."""
    kind, choices, least = (ABOUT[name][what] for what in ("kind", "choices", "least"))
    shown = flag(name) if name == "store" else f"{flag(name)} {value!r:.100}"  # that may hold a password
    if name == "namespace" and not (isinstance(value, str) and value.strip()):
        raise BadInput(f"{shown} must be a name, the same in both jobs")
    if choices and value not in choices:
        raise BadInput(f"{shown} must be one of {', '.join(choices)}")
    if kind is int:
        return check_number(value, flag(name), int(least))
    if kind is str:
        if not isinstance(value, str):
            raise BadInput(f"{shown} must be a str, not {type(value).__name__}")
        return value
    seconds = check_seconds(value, flag(name))
    if not least <= seconds < math.inf or value < 0:
        raise BadInput(f"{shown} must be a number of seconds, {least} or more")
    return seconds


def store_uri(
    uri: str | None, variable: str | None, file: str | None, option: str = "--cross-job-store"
) -> str | None:
    """The URI of a durable store, from the one source that is given; None: none is.

    A command line is seen by everybody on the machine (`ps`) and on the cluster (`ray job list`, the dashboard), hence
    the other two sources, and a warning where the command line holds a password.

    Args:
        uri: from the command line.
        variable: name of the environment variable that holds it.
        file: path of the file that holds it.
        option: the flag of `uri`; those of the other sources are the same with -env and -file.

    Raises:
        BadInput: several are given, or the variable or the file holds no URI. No message shows what they hold.
    """
    given = {"": uri, "-env": variable, "-file": file}
    named = [option + end for end, value in given.items() if value is not None]
    if len(named) > 1:
        raise BadInput(f"{' and '.join(named)} say the same in several ways: give one of them")
    if uri is not None:
        if isinstance(uri, str) and holds_password(uri):
            _warn_of_password(option)
        return uri
    for end in ("-env", "-file"):
        if "://" in (given[end] or ""):  # as where a shell has put in what the variable holds
            raise BadInput(f"{option}{end} wants a name or a path, and was given a URI, which is not shown here")
    if variable is not None:
        if variable not in os.environ:
            raise BadInput(
                f"{option}-env {variable}: there is no such environment variable in this process. Set it where Ray is "
                "started on this node (--env of a job would show it), or put the URI into a file: "
                f"{option}-file PATH"
            )
        return _checked_uri(os.environ[variable], f"{option}-env {variable}: the variable")
    if file is not None:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no text"
            raise BadInput(f"{option}-file {file} cannot be read on {os.uname().nodename}: {why}") from None
        return _checked_uri(text, f"{option}-file {file}: the file")
    return None


def _checked_uri(text: str, what: str) -> str:
    uri = text.strip()
    if "://" not in uri or len(uri.split()) != 1:
        raise BadInput(f"{what} must hold one URI, such as redis://:PASSWORD@HOST:6379/0, and nothing else")
    return uri


@cache
def _warn_of_password(option: str) -> None:
    """Once a process."""
    logger.warning(
        "%s has a password in it, which `ps`, `ray job list` and Ray's dashboard show to others: put the URI into an "
        "environment variable of the nodes and give %s-env NAME, or into a file and give %s-file PATH",
        *(option, option, option),
    )


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--job-id` and the `--cross-job-*` flags to `parser` and return it. Defaults stay those of `Settings`."""
    return add_settings(parser)
