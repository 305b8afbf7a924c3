"""The command line: python3 scripts/patchset apply|export|fetch|names.

Exit status: 0 done, 1 a plain no (--verify, conflicts of --port), 2 an error, told in one line on stderr.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 10):  # noqa: UP036 - the system's python3 may be older
    sys.exit("error: Python 3.10 or newer is needed: set PYTHON to such an interpreter")

import argparse
import signal
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # the folder itself was run
    sys.path[0] = str(_ROOT / "scripts")

from patchset import apply, upstream  # noqa: E402
from patchset.checkout import Checkout  # noqa: E402
from patchset.git import Git, PatchsetError, Refused  # noqa: E402
from patchset.merge import names_of_pins  # noqa: E402
from patchset.port import port  # noqa: E402
from patchset.series import Patchset  # noqa: E402


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="patchset", description="The patch set of slime cross-job.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        # For tests, which bring a small upstream with patches and an overlay of its own.
        added.add_argument("--patches", type=Path, default=_ROOT / "patches", help=argparse.SUPPRESS)
        added.add_argument("--overlay", type=Path, default=_ROOT / "slime_overlay", help=argparse.SUPPRESS)
        return added

    applying = command("apply", "Apply the patches and the overlay to a slime checkout.")
    applying.add_argument("folder", metavar="SLIME_DIR", help="top folder of a checkout at a pin")
    which = applying.add_mutually_exclusive_group()
    which.add_argument("--check", action="store_true", help="say what would be done and change nothing")
    which.add_argument("--reverse", action="store_true", help="take patches and overlay out again")
    which.add_argument("--verify", action="store_true", help="exit 0 only if the checkout is exactly patched")
    applying.add_argument("--pin", help="the pin whose patches to take (default: the commit that is checked out)")
    applying.add_argument("--port", action="store_true", help="merge a pin's patches onto another commit")
    applying.add_argument("--anyway", action="store_true", help="with --port: also where names of slime are lost")
    exporting = command("export", "Write a pin's patches anew from an edited checkout.")
    exporting.add_argument("folder", metavar="SLIME_DIR", help="checkout at the pin, files edited")
    exporting.add_argument("pin", metavar="PIN")
    fetching = command("fetch", "Fetch slime at a pin into a new folder.")
    fetching.add_argument("folder", metavar="DIR")
    fetching.add_argument("pin", metavar="PIN", nargs="?", help="name of a pin (default: the first)")
    fetching.add_argument("--full", action="store_true", help="the whole history, as --port needs it")
    naming = command("names", "Print which pin has which of the names of slime that the overlay uses.")
    naming.add_argument("folder", metavar="GIT_DIR", help="a clone of slime that has all pins (fetch_slime.sh --full)")
    return parser


def _run(given: argparse.Namespace) -> str:
    patchset = Patchset(given.patches, given.overlay)
    if not given.folder.strip():
        raise PatchsetError("the folder is empty: name one")
    if given.command == "fetch":
        return upstream.fetch(patchset, given.folder, given.pin, given.full)
    if given.command == "names":
        return names_of_pins(Git(Path(given.folder)), patchset).rstrip()
    checkout, pin = Checkout(given.folder), given.pin
    if pin:
        patchset.pin(pin)  # an unknown pin is an error also if it would not be looked at
    if given.command == "export":
        return upstream.export(checkout, patchset, pin)
    if given.anyway and not given.port:
        raise PatchsetError("--anyway goes with --port")
    if given.port and (given.reverse or given.verify):
        raise PatchsetError("--port goes with --check only: --reverse works without it on a ported checkout too")
    if given.port:
        return port(checkout, patchset, pin, given.check, given.anyway)
    if given.reverse or given.verify:
        return (apply.reverse if given.reverse else apply.verify)(checkout, patchset, pin)
    return apply.apply(checkout, patchset, pin, given.check)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; errors of the user's are told in one line."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # rolls back as an interrupt does
    given = _parser().parse_args(arguments)
    try:
        print(_run(given))
        return 0
    except (PatchsetError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, Refused) else 2
    except KeyboardInterrupt:
        print("error: interrupted; the checkout is as it was", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
