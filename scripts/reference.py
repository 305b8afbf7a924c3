"""Writes the tables of flags, exit codes and commands into the page cross-job-operations.md, from the code:

    python scripts/reference.py

Each table stands between two comments of the page, which name it. Needs the environment of env.sh.
"""

import argparse
import inspect
import re
import sys
from pathlib import Path
from typing import Any

OVERLAY = Path(__file__).resolve().parents[1] / "slime_overlay"
PAGE = OVERLAY / "docs" / "en" / "advanced" / "cross-job-operations.md"


def table(*rows: tuple[object, ...]) -> str:
    """A Markdown table; the first row is its head."""
    head, *rest = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rest))


def flags() -> str:
    """Every flag of the two jobs: the settings, the switch and the role."""
    from slime.cross_job_arguments import add_arguments
    from slime.cross_job_settings import ABOUT

    of_job = {f"cross_job_{name}" for name, about in ABOUT.items() if about["of_job"]} | {"job_id"}
    rows = []
    for action in add_arguments(argparse.ArgumentParser(add_help=False))._actions:
        text, _, default = (action.help or "").removesuffix(")").partition(" (default: ")
        about: dict[str, Any] = ABOUT.get(action.dest.removeprefix("cross_job_"), {})
        choices = about.get("choices") or action.choices
        kind = ", ".join(choices) if choices else "switch" if action.nargs == 0 else about.get("kind", str).__name__
        rows.append(
            (f"`{action.option_strings[0]}`", kind, default or "-", "yes" if action.dest in of_job else "", text)
        )
    return table(("flag", "value", "default", "of the job", "meaning"), *rows)


def exit_codes() -> str:
    """Every error by its exit code, with the first sentence of its docstring."""
    from slime.cross_job import errors

    rows = []
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.CrossJobError):
            text = " ".join((inspect.getdoc(kind) or "").split())
            rows.append((kind.exit_code, f"`{kind.__name__}`", re.split(r"(?<=[^.]\.)\s", text)[0]))
    return table(("exit code", "error", "meaning"), *sorted(rows, key=lambda row: row[0]))


def commands() -> str:
    """Every command of slime-cross-job."""
    import typer

    from slime.cross_job.ops import cli, export, steer  # noqa: F401  they add their commands
    from slime.cross_job.ops.app import app

    rows: list[tuple[object, ...]] = []
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        takes = [one.metavar or one.name.upper() for one in command.params if one.param_type_name == "argument"]
        about = " ".join((command.help or "").split("\n\n")[0].split())
        own = [one.opts[0] for one in command.params if one.param_type_name == "option" and one.opts[0] not in _COMMON]
        rows.append((f"`{' '.join([name, *takes])}`", about, " ".join(f"`{flag}`" for flag in own)))
    return table(("command", "what it does", "options of its own"), *rows)


_COMMON = ("--address", "--namespace", "--job-id", "--json", "--yes", "--wide", "--help")
TABLES = {"flags": flags, "exit codes": exit_codes, "commands": commands}


def page(text: str) -> str:
    """The page with every table as the code says."""
    for name, made in TABLES.items():
        between = re.compile(rf"(<!-- {name}: [^\n]* -->\n)(.*?)(<!-- end of {name} -->\n)", re.DOTALL)
        parts = between.split(text)
        if len(parts) != 5:
            raise SystemExit(f"error: {PAGE} must have the comments of the table {name!r}, once")
        text = f"{parts[0]}{parts[1]}\n{made()}\n{parts[3]}{parts[4]}"
    return text


def main() -> None:
    sys.path.insert(0, str(OVERLAY))
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
