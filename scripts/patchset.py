"""The command line of the patch set: apply, export, record, count, fetch.

Needs Python 3.10 and git, nothing else. Exit status: 0 done, 1 a plain no (--verify, conflicts of --port), 2 an error,
told in one line on stderr.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 10):  # noqa: UP036 - the system's python3 may be older
    sys.exit("error: Python 3.10 or newer is needed: set PYTHON to such an interpreter")

import argparse
import signal
from pathlib import Path
from typing import NoReturn

from patchset_apply import apply, reverse, verify
from patchset_export import count, export, update_readme
from patchset_git import Checkout, PatchsetError
from patchset_port import port
from patchset_series import Patchset
from patchset_upstream import fetch, record

_ROOT = Path(__file__).resolve().parent.parent


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as for every other error."""
        print(f"error: {message}: see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="patchset.py", description="The patch set of slime cross-job.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        # For tests, which bring a small upstream with patches and an overlay of its own.
        added.add_argument("--patches", type=Path, default=_ROOT / "patches", help=argparse.SUPPRESS)
        added.add_argument("--overlay", type=Path, default=_ROOT / "slime_overlay", help=argparse.SUPPRESS)
        return added

    applying = command("apply", "Apply the patches and the overlay to a slime checkout.")
    applying.add_argument("slime_dir", metavar="SLIME_DIR", help="top folder of a slime checkout at a pin")
    which = applying.add_mutually_exclusive_group()
    which.add_argument("--check", action="store_true", help="say what would be done and change nothing")
    which.add_argument("--reverse", action="store_true", help="take patches and overlay out again")
    which.add_argument("--verify", action="store_true", help="exit 0 only if the checkout is exactly patched")
    applying.add_argument("--pin", help="the pin whose patches to take (default: the commit that is checked out)")
    applying.add_argument("--port", action="store_true", help="merge a pin's patches onto another commit")
    exporting = command("export", "Write a pin's patches anew from an edited checkout.")
    exporting.add_argument("slime_dir", metavar="SLIME_DIR", help="checkout at the pin with the edited files")
    exporting.add_argument("pin", metavar="PIN")
    recording = command("record", "Work out the pins' trees and write them to upstream.json.")
    recording.add_argument("--pin", help="only this pin")
    recording.add_argument("--clone", help="a clone that has the commits (default: fetch them)")
    counting = command("count", "Print the table of patches and inserted lines per pin.")
    counting.add_argument("--update", action="store_true", help="write it into README.md beside the patches as well")
    fetching = command("fetch", "Fetch slime at a pin into a new folder.")
    fetching.add_argument("dir", metavar="DIR")
    fetching.add_argument("pin", metavar="PIN", nargs="?", help="name of a pin (default: the first)")
    fetching.add_argument("--full", action="store_true", help="the whole history, as --port needs it")
    return parser


def _apply(arguments: argparse.Namespace, patchset: Patchset) -> int:
    checkout = Checkout.open(arguments.slime_dir)
    pin: str | None = arguments.pin
    if pin is not None:
        patchset.pin(pin)  # an unknown pin is an error also where it would not be looked at
    if arguments.port:
        if arguments.reverse or arguments.verify:
            raise PatchsetError("--port goes with --check only: --reverse works without it on a ported checkout too")
        return port(checkout, patchset, pin, arguments.check)
    if arguments.reverse:
        print(reverse(checkout, patchset, pin))
    elif arguments.verify:
        print(verify(checkout, patchset, pin))
    else:
        print(apply(checkout, patchset, pin, arguments.check))
    return 0


def _run(arguments: argparse.Namespace) -> int:
    patchset = Patchset(arguments.patches, arguments.overlay)
    if arguments.command == "apply":
        return _apply(arguments, patchset)
    if arguments.command == "export":
        print("\n".join(export(Checkout.open(arguments.slime_dir), patchset, arguments.pin)))
    elif arguments.command == "record":
        print("\n".join(record(patchset, arguments.pin, arguments.clone)))
    elif arguments.command == "count":
        table = count(patchset)
        print(table, end="")
        if arguments.update:
            update_readme(patchset.folder / "README.md", table)
    else:
        print(fetch(patchset, arguments.dir, arguments.pin, arguments.full))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run a command; errors of the user's are told in one line."""

    def stop(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt  # so that SIGTERM rolls back as an interrupt does

    signal.signal(signal.SIGTERM, stop)
    parsed = _parser().parse_args(arguments)
    try:
        return _run(parsed)
    except PatchsetError as error:
        print(f"error: {error}", file=sys.stderr)
        plain_no = parsed.command == "apply" and (parsed.verify or parsed.port)
        return 1 if plain_no else 2
    except KeyboardInterrupt:
        print("error: interrupted; the checkout is as it was", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
