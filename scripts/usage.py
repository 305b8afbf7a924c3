"""Prints the --help of a script whose packages may be missing, from its text:

    python3 scripts/usage.py FILE           of a Python script: its parser is built, what else it needs is not
    python3 scripts/usage.py                of scripts/slime-cross-job: its commands, each in a line

Needs Python's own library only, and makes no environment.
"""

import argparse
import ast
import builtins
import sys
from pathlib import Path
from typing import Any

OPS = Path(__file__).resolve().parents[1] / "slime_overlay" / "slime" / "cross_job" / "ops"


class Unknown:
    """A value of what is not read here: it is shown by its name."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, name: str) -> "Unknown":
        if name == "__name__":  # argparse shows a default by its __name__ where it has one
            raise AttributeError(name)
        return Unknown(f"{self._name}.{name}")

    def __iter__(self) -> Any:
        return iter([self._name])

    def __str__(self) -> str:
        return self._name


class Names(dict[str, Any]):
    """What a parser's lines may name; what is not known is left open."""

    def __missing__(self, name: str) -> Any:
        return getattr(builtins, name, Unknown(name))


def help_of(file: Path) -> str:
    """What the parser says that this script calls `parser`."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = Names(argparse=argparse, Path=Path, __doc__=ast.get_docstring(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and "ArgumentParser" in ast.unparse(node):
            lines = [line for line in node.body if ast.unparse(line).startswith(("parser = ", "parser.add_argument("))]
            exec(compile(ast.Module(lines, []), str(file), "exec"), {}, names)
    return str(names["parser"].format_help())


def commands() -> str:
    """The commands of slime-cross-job, and their options, by name."""
    lines = ["Usage: slime-cross-job [OPTIONS] COMMAND [ARGS]...", "", "Commands:"]
    for file in sorted(OPS.glob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            named = [ast.unparse(one) for one in getattr(node, "decorator_list", ())]
            if isinstance(node, ast.FunctionDef) and any(one.startswith("app.command(") for one in named):
                name = named[0].removeprefix("app.command(").removesuffix(")").strip("'") or node.name
                words = (ast.get_docstring(node) or "").partition("\n")[0]
                lines.append(f"  {name:<12} {words}")
    return "\n".join([*lines, "", "Options of a command: once the environment is made (any command without --help)."])


if __name__ == "__main__":
    print(help_of(Path(sys.argv[1])) if sys.argv[1:] else commands())
