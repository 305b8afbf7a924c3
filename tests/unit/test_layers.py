"""What may import what, so that the ledger needs no Ray, reading a batch no torch, and nothing Ray's private parts."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.parsing import parsed
from tests.support.patience import patient

ROOT = Path(__file__).parents[2]
OVERLAY = ROOT / "slime_overlay"
PACKAGE = OVERLAY / "slime" / "cross_job"

ROOMS = ("batch", "ledger", "storage", "vault", "broker", "client", "proposal", "adapter", "ops")
LAZY_ONLY = ("torch", "redis", "sglang", "megatron")
NOT_IMPORTED = ("ray", *LAZY_ONLY)


def outside_imports(source: str, lazy_too: bool) -> set[str]:
    """Other packages that are imported; those within functions only if `lazy_too`."""
    tree = parsed(source)
    nodes: Iterator[ast.AST] = ast.walk(tree) if lazy_too else at_import(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").split(".")[0])
    return found


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when the module is imported: everything that is in no function and not for type checkers only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        yield child
        yield from at_import(child)


def private_ray(source: str) -> list[str]:
    """Uses of what Ray keeps to itself: `ray._x`, imports of it, underscore options of its calls."""
    found = []
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Attribute) and private(node.attr) and ast.unparse(node.value).split(".")[0] == "ray":
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.startswith("ray.") and any(map(private, a.name.split(".")))]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ray":
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found += [name for name in names if private(name)]
        elif isinstance(node, ast.Call):
            found += [f"{keyword.arg}=" for keyword in node.keywords if private(keyword.arg or "")]
        elif isinstance(node, ast.Dict):  # of options, for **
            keys = [key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
            found += [f"{key!r}:" for key in keys if private(key)]
    return found


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def python(code: str) -> "subprocess.CompletedProcess[str]":
    """Another process, which has the overlay and nothing else on its path."""
    command, env = [sys.executable, "-c", code], {"PYTHONPATH": str(OVERLAY)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=patient(120))


def test_rooms_import_one_way():
    """The contracts are in pyproject.toml; import-linter keeps them."""
    words = [Path(sys.executable).with_name("lint-imports"), "--config", ROOT / "pyproject.toml"]
    env = {**os.environ, "PYTHONPATH": str(OVERLAY)}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=patient(120))
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_room_says_what_is_in_it():
    for room in ROOMS:
        said = ast.get_docstring(parsed((PACKAGE / room / "__init__.py").read_text())) or ""
        files = {path.name for path in (PACKAGE / room).glob("*.py")} - {"__init__.py"}
        assert not {name for name in re.findall(r"\b\w+\.py\b", said) if name not in files}, room


def test_only_the_adapter_knows_slime():
    knowing = {path for path in PACKAGE.rglob("*.py") if "slime" in outside_imports(path.read_text(), lazy_too=True)}
    assert {path.relative_to(PACKAGE).parts[0] for path in knowing} == {"adapter"}


@pytest.mark.parametrize(
    "module", ["slime.cross_job", *(f"slime.cross_job.{name}" for name in ("ledger", "batch", "storage"))]
)
def test_the_ledger_and_the_batch_import_nothing_heavy(module):
    done = python(f"import sys, {module}; print(*[name for name in {NOT_IMPORTED} if name in sys.modules])")
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


def test_the_flags_need_no_line_of_the_package():
    imported = set()
    for name in ("cross_job_arguments", "cross_job_settings"):
        imported |= outside_imports((OVERLAY / "slime" / f"{name}.py").read_text(), lazy_too=False)
    assert imported == {"argparse", "collections", "dataclasses", "re", "typing"}


@pytest.mark.parametrize("library", LAZY_ONLY)
def test_heavy_libraries_are_imported_where_they_are_needed_only(library):
    for path in (OVERLAY / "slime").rglob("*.py"):
        if (library, path) == ("redis", PACKAGE / "storage" / "redis.py"):
            continue  # which is imported where such a store is opened
        source = path.read_text()
        assert library not in outside_imports(source, lazy_too=False), path
        if library in outside_imports(source, lazy_too=True):
            assert library == "torch", path
            assert path.parent == PACKAGE / "batch" or path == PACKAGE / "adapter" / "debug_files.py", path


@pytest.mark.parametrize("folder", ["slime_overlay", "scripts"])
def test_nothing_private_of_ray_is_used(folder):
    found = {str(path.relative_to(ROOT)): private_ray(path.read_text()) for path in (ROOT / folder).rglob("*.py")}
    assert found, "no file was looked at"
    assert not {path: uses for path, uses in found.items() if uses}


def test_nothing_private_of_ray_is_named_in_scripts():
    for path in (ROOT / "scripts").glob("*.sh"):
        assert "ray._private" not in path.read_text(), path


@pytest.mark.parametrize(
    "bad",
    [
        "import ray._private.worker",
        "from ray._private import worker",
        "from ray import _raylet",
        "ray._private.worker.global_worker",
        "ray.put(value, _owner=vault)",
        "actor.method.options(_tensor_transport='nccl').remote()",
        "f(**{'_owner': vault})",
    ],
)
def test_the_search_for_private_parts_finds_them(bad):
    assert private_ray(bad)


def test_the_overlay_is_made_of_namespace_packages():
    packages = [path.parent for path in OVERLAY.rglob("__init__.py")]
    assert packages, "no package was found"
    assert [path for path in packages if not path.is_relative_to(PACKAGE)] == []


def test_the_command_line_says_what_it_needs_and_nothing_else_loads_it():
    done = python("import sys; sys.modules['typer'] = None; from slime.cross_job.__main__ import main; main()")
    assert done.returncode == 1
    assert "pip install typer rich" in done.stderr
    for path in PACKAGE.rglob("*.py"):
        if not path.is_relative_to(PACKAGE / "ops") and path.name != "__main__.py":
            assert not {"typer", "rich", "aiohttp"} & outside_imports(path.read_text(), lazy_too=True), path


def test_the_facade_of_names_holds_names_only():
    source = (OVERLAY / "slime" / "utils" / "cross_job_utils.py").read_text()
    assert len(source.splitlines()) < 100
    docstring, *rest = parsed(source).body
    assert isinstance(docstring, ast.Expr)
    *imports, exported = rest
    assert all(isinstance(node, ast.ImportFrom) for node in imports)
    assert isinstance(exported, ast.Assign)
    assert ast.unparse(exported.targets[0]) == "__all__"
