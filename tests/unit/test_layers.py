"""What may import what, so that the ledger needs no Ray, reading a batch no torch, and nothing Ray's private parts."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OVERLAY = ROOT / "slime_overlay"
PACKAGE = OVERLAY / "slime" / "cross_job"

ORDER = (
    *("errors", "types", "settings", "stopping"),
    *("batch", "stores"),
    *("gate", "tables", "records", "progress", "verdicts", "status"),  # the state: no Ray
    *("roster", "sources", "retention", "shelf", "pacing", "engines", "steering", "ledger", "snapshot"),
    *("records_json", "archive", "journal", "mail", "recording", "communicators"),  # what durable stores hold
    "debug_files",  # of slime
    "books",
    *("preview", "metrics"),
    *("liveness", "deposits", "vault", "keeper", "follower", "clusters", "broker"),  # the actors
    "link",
    *("weights", "cluster_watch", "member", "resources"),  # what both sides have in common
    *("producer", "consumer"),
    *("facade", "jobs"),
    *(
        "arguments",
        "parts",
        "handshake",
        "train_data",
        "data_source",
        "conversion",
        "boxes",
        "tap",
        "update_groups",
        "engine_weights",
        "weight_folders",
        "ports",
    ),  # slime's side
    "replay",
    *("tracking", "gateway", "train_side", "train_group"),
    *("hooks", "rollout_side"),
    *("ops", "__main__"),  # for those who run it
)
"""Imports point from right to left only. A new module takes its place here, as a decision."""

STRANGERS = (
    ("producer", "consumer"),
    ("jobs", "facade"),
    ("liveness", "vault"),
    ("settings", "batch"),
    ("tap", "gateway"),
    ("liveness", "keeper"),
    ("keeper", "vault"),
    ("stopping", "ledger"),
    ("recording", "producer"),
    ("debug_files", "recording"),
    ("replay", "conversion"),
)
"""Pairs that do not import each other either way, and have no reason to."""

USES_RAY = frozenset(
    [
        *("deposits", "liveness", "vault", "keeper", "broker", "link", "member", "resources", "producer", "facade"),
        *("metrics", "ops"),
        *(
            "boxes",
            "replay",
            "gateway",
            "train_side",
            "train_group",
            "hooks",
            "update_groups",
            "engine_weights",
            "rollout_side",
        ),
    ]
)
USES_SLIME = frozenset(["boxes", "conversion", "parts", "data_source", "tracking", "train_side", "rollout_side"])
"""Modules that import slime's own: they are of use on a patched checkout only."""
FLAGS = {"settings": "..cross_job_arguments"}
"""The flags lie beside the package, so that slime's parser need not import it."""
LAZY_ONLY = ("torch", "redis", "sglang", "megatron")
NOT_IMPORTED = ("ray", *LAZY_ONLY)


def modules() -> dict[str, list[Path]]:
    """Top-level module of the package -> its files."""
    files: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path != PACKAGE / "__init__.py":
            files.setdefault(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), []).append(path)
    return files


@functools.cache
def parsed(source: str) -> ast.Module:
    """`ast.parse`, of each source once. CPython 3.11 counts the depth of a tree for all threads together and takes
    another thread that parses for an error: then once more."""
    try:
        return ast.parse(source)
    except SystemError:
        return ast.parse(source)


def package_imports(source: str, depth: int = 0) -> set[str]:
    """Modules of the package that are imported, by a file `depth` folders below the package."""
    found = set()
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.ImportFrom):
            name = node.module or ""
            if node.level == depth + 1:
                found |= {name.split(".")[0]} if name else {alias.name for alias in node.names}
            elif node.level > depth + 1:
                found.add(f"{'.' * node.level}{name}")
            elif f"{name}.".startswith("slime."):
                found.add(name.removeprefix("slime.cross_job").removeprefix(".").split(".")[0] or "__init__")
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("slime.cross_job.") for a in node.names if f"{a.name}.".startswith("slime.")}
    return found


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


def test_every_module_has_its_place():
    assert sorted(modules()) == sorted(ORDER), "give the new module its place in ORDER, and say in ARCHITECTURE.md why"


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_one_way(name):
    allowed = {*ORDER[: ORDER.index(name)], FLAGS.get(name, name)}
    allowed |= {"slime"} if name in USES_SLIME else set()
    for path in modules()[name]:
        depth = len(path.relative_to(PACKAGE).parts) - 1
        inside = package_imports(path.read_text(), depth)
        assert inside <= allowed, f"{path.relative_to(ROOT)} imports {sorted(inside - allowed)}"


@pytest.mark.parametrize("pair", STRANGERS, ids="-".join)
def test_neighbours_that_need_not_know_each_other(pair):
    for one, other in (pair, pair[::-1]):
        for path in modules()[one]:
            assert other not in package_imports(path.read_text(), len(path.relative_to(PACKAGE).parts) - 1)


def test_inside_the_batch_imports_make_no_circle():
    folder = PACKAGE / "batch"
    edges = {}
    for path in folder.glob("*.py"):
        lines = parsed(path.read_text())
        eager = ast.Module([node for node in at_import(lines) if isinstance(node, (ast.Import, ast.ImportFrom))], [])
        edges[path.stem] = package_imports(ast.unparse(eager))
    while leaves := {name for name, inside in edges.items() if not inside & edges.keys()}:
        edges = {name: inside for name, inside in edges.items() if name not in leaves}
    assert not edges, f"in a circle, or on the way to one: {edges}"


def test_only_these_modules_know_slime():
    knowing = {n for n, paths in modules().items() if any("slime" in package_imports(p.read_text()) for p in paths)}
    assert knowing == USES_SLIME


def test_the_flags_need_no_line_of_the_package():
    source = (OVERLAY / "slime" / "cross_job_arguments.py").read_text()
    assert outside_imports(source, lazy_too=False) == {"argparse", "re", "typing"}


def test_only_these_modules_know_ray():
    knowing = {
        name for name, paths in modules().items() if any("ray" in outside_imports(p.read_text(), True) for p in paths)
    }
    assert knowing == USES_RAY


@pytest.mark.parametrize("library", LAZY_ONLY)
def test_heavy_libraries_are_imported_where_they_are_needed_only(library):
    for path in (OVERLAY / "slime").rglob("*.py"):
        if (library, path) == ("redis", PACKAGE / "stores" / "redis.py"):
            continue  # which is imported where such a store is opened
        source = path.read_text()
        assert library not in outside_imports(source, lazy_too=False), path
        if library in outside_imports(source, lazy_too=True):
            assert library == "torch", path
            assert path.parent == PACKAGE / "batch" or path == PACKAGE / "debug_files.py", path


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


@pytest.mark.parametrize(
    ("source", "depth", "found"),
    [
        ("from .ledger import Ledger", 0, {"ledger"}),
        ("from . import ledger, link", 0, {"ledger", "link"}),
        ("def f():\n    from .link import get", 0, {"link"}),
        ("from ..errors import BatchError\nfrom .wire import Encoded", 1, {"errors"}),
        ("import slime.cross_job.ledger", 0, {"ledger"}),
        ("from slime.cross_job.link import get", 0, {"link"}),
        ("from ..utils import cross_job_utils", 0, {"..utils"}),
        ("import json, numpy", 0, set()),
    ],
)
def test_the_search_for_imports_finds_them(source, depth, found):
    assert package_imports(source, depth) == found


@pytest.mark.parametrize(
    "module", ["slime.cross_job", *(f"slime.cross_job.{name}" for name in ORDER[: ORDER.index("liveness")])]
)
def test_the_state_and_the_batch_import_nothing_heavy(module):
    code = f"import sys, {module}; print(*[name for name in {NOT_IMPORTED} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(OVERLAY)}, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


def test_the_overlay_is_made_of_namespace_packages():
    packages = [path.parent for path in OVERLAY.rglob("__init__.py")]
    assert packages, "no package was found"
    assert [path for path in packages if not path.is_relative_to(PACKAGE)] == []


def test_the_command_line_says_what_it_needs_and_nothing_else_loads_it():
    code = "import sys; sys.modules['typer'] = None; from slime.cross_job.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(OVERLAY)}, capture_output=True, text=True, timeout=60
    )
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
