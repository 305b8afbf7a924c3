"""The names of slime that the overlay uses, and which of them a commit of slime has: read from both as text.

Nothing is imported or run. What is looked up, and how it is told what a name is of:

    slime.ray.rollout.RolloutManager   an import, or text that names a module of slime; `PLACES` in adapter/names.py
                                       lists several modules, one of which must have the name
    RolloutManager.generate            an attribute of an object that the overlay calls `manager` (see _OBJECTS)
    args.rollout_num_gpus              an argument, or a pattern of arguments in adapter/handshake.py
    data["total_lengths"]              a column of training data that adapter/conversion.py names
    Gateway.eval                       a method that slime calls on its `rollout_manager`, which ours must have

Old and new pins are served by one code, so that a pin lacks some names. What counts is what a commit lacks, or wants
in another way, compared with the pin whose patches it gets. Not seen: what a function returns, what is behind a name
that the code computes, and whether slime means the same by it; the tests with real slime are for that.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import NamedTuple

_SLIME = "slime."
_OURS = ("slime.cross_job", "slime.utils.cross_job")
_ADAPTER = "slime/cross_job/adapter/"
_SCRIPTS = ("cross_job_replay.py", "cross_job_rollout.py", "slime/cross_job_arguments.py")
_MANAGERS = ("RolloutManager", "RolloutController", "Buffer")
_SOURCES = ("RolloutDataSource", "RolloutDataSourceWithBuffer")
_OBJECTS = {  # what the overlay calls an object -> the classes of slime that it may be of
    **dict.fromkeys(("manager", "_manager", "owner"), _MANAGERS),
    **dict.fromkeys(("engine",), ("SGLangEngine",)),
    **dict.fromkeys(("group", "critic"), ("RayTrainGroup",)),
    **dict.fromkeys(("source", "data_source"), _SOURCES),
    **dict.fromkeys(("training_actor",), ("MegatronTrainRayActor",)),
    **dict.fromkeys(("Sample", "sample"), ("Sample",)),
}
_SELF = {"train_group.py": ("RayTrainGroup",)}  # files whose classes stand in front of one of slime's
_ASKED = {"_ask", "_ask_with_epoch", "_evaluate", "_forward", "publish_from"}  # calls that name a manager's method
_ARGS = {"args", "_args"}
_OF_THE_DATA = (
    "_convert_samples_to_train_data",
    "_split_train_data_by_dp",
    "process_rollout_data",
    "_get_parallel_config",
)


class Parameter(NamedTuple):
    """One parameter of a function: its name, whether a call may leave it out, and whether by name alone."""

    name: str
    optional: bool
    by_name: bool = False


Signature = tuple[Parameter, ...]


class Found(NamedTuple):
    """Where a commit has a name: file and line; and its parameters, if it is a function."""

    path: str
    line: int
    parameters: Signature | None = None
    imported: bool = False  # from where it is defined


@dataclass
class Slime:
    """What the code of one commit defines and mentions."""

    modules: dict[str, dict[str, Found]] = field(default_factory=dict)  # module -> name -> where
    classes: dict[str, dict[str, Found]] = field(default_factory=dict)  # class -> attribute -> where
    bases: dict[str, list[str]] = field(default_factory=dict)
    arguments: dict[str, Found] = field(default_factory=dict)
    columns: dict[str, Found] = field(default_factory=dict)  # literal texts in what makes and reads training data
    texts: dict[str, Found] = field(default_factory=dict)  # in backends/
    called: dict[str, Found] = field(default_factory=dict)  # methods that slime calls on its rollout manager
    unread: list[str] = field(default_factory=list)  # why files are not in it

    @classmethod
    def read(cls, files: Mapping[str, bytes]) -> Slime:
        """Of the files of a tree by path: slime's package, and its training scripts."""
        made = cls()
        for path, data in files.items():
            if path.startswith("slime/") or fnmatchcase(path, "train*.py"):
                try:
                    made._add(path, _parsed(data))
                except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
                    made.unread.append(f"{path} cannot be read ({error})")
        return made

    def find(self, name: str) -> Found | None:
        """Where this commit has a name as `wanted` writes it; None: it has not."""
        kind, _, rest = name.partition(" ")
        if kind in ("argument", "pattern"):
            known = [self.arguments[one] for one in sorted(self.arguments) if fnmatchcase(one, rest)]
            return known[0] if known else None
        if kind in ("column", "text"):
            return (self.columns if kind == "column" else self.texts).get(rest)
        if kind == "attribute":
            owners, attribute = rest.split(".")
            return next(filter(None, (self._attribute(owner, attribute, ()) for owner in owners.split("|"))), None)
        return next(filter(None, (self._imported(place) for place in rest.split("|"))), None)

    def _imported(self, place: str) -> Found | None:
        module, _, name = place.rpartition(".")
        if place in self.modules:
            return Found(f"{place.replace('.', '/')}.py", 1)
        return self.modules.get(module, {}).get(name)

    def _attribute(self, owner: str, name: str, below: tuple[str, ...]) -> Found | None:
        if owner not in self.classes or owner in below:
            return None
        bases = (self._attribute(base, name, (*below, owner)) for base in self.bases[owner])
        return self.classes[owner].get(name) or next(filter(None, bases), None)

    def _add(self, path: str, tree: ast.Module) -> None:
        parts = PurePosixPath(path).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        self.modules[module] = names = dict[str, Found]()
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and path.startswith("slime/"):
                self.bases.setdefault(node.name, [_name(base) for base in node.bases])
                self.classes.setdefault(node.name, {}).update(_members(path, node))
            elif isinstance(node, ast.FunctionDef) and node.name in _OF_THE_DATA:
                self.columns |= {text: Found(path, node.lineno) for text in _texts(node) if text.isidentifier()}
            elif isinstance(node, ast.Attribute):
                self._add_attribute(path, node)
            elif isinstance(node, ast.Constant) and (text := _text(node)):
                self._add_text(path, text, node.lineno)
        for node in _top_level(tree.body):
            names.update(_defined(path, node))

    def _add_attribute(self, path: str, node: ast.Attribute) -> None:
        base = node.value
        if _name(base) in _ARGS:
            self.arguments.setdefault(node.attr, Found(path, node.lineno))
        elif (
            node.attr == "remote"
            and isinstance(base, ast.Attribute)
            and _name(base.value).lstrip("_") == "rollout_manager"
        ):
            self.called.setdefault(base.attr, Found(path, base.lineno))

    def _add_text(self, path: str, text: str, line: int) -> None:
        if text.startswith("--"):
            self.arguments.setdefault(text[2:].replace("-", "_"), Found(path, line))
        elif text.isidentifier() and path.endswith(("arguments.py", "eval_config.py")):
            self.arguments.setdefault(text, Found(path, line))
        if path.startswith("slime/backends/"):
            self.texts.setdefault(text, Found(path, line))


@dataclass
class Wanted:
    """The names of slime that the overlay uses, each with the places that use it; and what slime's train job may ask
    of its rollout manager, which is our gateway there."""

    places: dict[str, list[str]] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)  # last parts of names that the overlay calls
    overridden: dict[str, bool] = field(default_factory=dict)  # methods of ours in front of slime's -> take anything
    answered: set[str] = field(default_factory=set)  # methods of the gateway

    @classmethod
    def read(cls, files: Mapping[str, bytes]) -> Wanted:
        """Of the overlay's files by path."""
        made = cls()
        for path in sorted(files):
            if path.endswith(".py") and (path.startswith(_ADAPTER) or path in _SCRIPTS):
                made._add(path, _parsed(files[path]))
        return made

    def _add(self, path: str, tree: ast.Module) -> None:
        file = PurePosixPath(path).name
        for name, line in (found for node in ast.walk(tree) for found in _used(file, node)):
            self.places.setdefault(name, []).append(f"{path}:{line}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                asked = isinstance(node.func, ast.Attribute) and node.func.attr == "remote"
                self.called |= {_name(node.func.value if asked else node.func)}  # type: ignore[attr-defined]
                self.called |= {*_texts(node)} if _name(node.func) in _ASKED else set()
            if isinstance(node, ast.ClassDef) and (file in _SELF or node.name == "Gateway"):
                methods = [one for one in node.body if isinstance(one, ast.FunctionDef) and one.name != "__init__"]
                self.overridden |= {one.name: one.args.vararg is not None for one in methods}
                self.answered |= {name for name, _ in _members(path, node)} if node.name == "Gateway" else set()
            elif isinstance(node, ast.For) and "setattr(Gateway" in ast.unparse(node):
                self.answered |= {*_texts(node.iter)}


class Verdict(NamedTuple):
    """What a commit breaks, a line for each name; and what is worth a look, and breaks nothing by itself."""

    broken: list[str]
    notes: list[str]


def compare(wanted: Wanted, pin: Slime, commit: Slime) -> Verdict:
    """Judge a commit by the pin whose patches it gets. A file of the pin that cannot be read breaks it: what is not
    known of the pin would be missed nowhere."""
    broken = [f"unread    at the pin, {why}: set PYTHON to the Python that slime runs on" for why in pin.unread]
    notes = [f"note      {why}" for why in commit.unread]
    for name, places in sorted(wanted.places.items()):
        before, now = pin.find(name), commit.find(name)
        if before is None:
            continue
        if now is None:
            moved = _elsewhere(name, commit)
            line = f"{shown(name)}: was in {before.path}{moved}; wanted by {', '.join(places[:3])}"
            if name.startswith("pattern "):  # one that matches nothing does nothing
                notes.append(f"note      gone: {line}")
            else:
                broken.append(f"missing   {line}")
        elif why := _changed(wanted, name.rpartition(".")[2], before, now):
            broken.append(f"changed   {shown(name)}: {why} ({now.path}:{now.line}); used by {places[0]}")
    for name in sorted(set(commit.called) - set(pin.called) - wanted.answered):
        where = commit.called[name]
        broken.append(f"asked     {where.path}:{where.line} calls {name}, which Gateway lacks")
    known = {name.partition(" ")[2] for name in wanted.places if name.startswith("column ")}
    if new := sorted({*commit.columns} - {*pin.columns} - known):
        notes.append(f"note      new in what makes training data, perhaps columns: {', '.join(new)}")
    return Verdict(broken, notes)


def _changed(wanted: Wanted, last: str, before: Found, now: Found) -> str:
    """What of a change nobody who calls it, or stands in front of it, bears; empty: nothing is known to break."""
    if before.imported or now.imported or before.parameters == now.parameters:
        return ""
    if last not in wanted.called and last not in wanted.overridden:
        return ""
    if before.parameters is None or now.parameters is None:
        return "it is no longer a function" if now.parameters is None else "it is a function now"
    return _breaks(before.parameters, now.parameters, not wanted.overridden.get(last, True))


def shown(name: str) -> str:
    """A name as people read it."""
    kind, _, rest = name.partition(" ")
    written = {"argument": f"args.{rest}", "pattern": f"args.{rest}", "column": f'data["{rest}"]', "text": f'"{rest}"'}
    return written.get(kind, rest.replace("|", " or "))


def _elsewhere(name: str, commit: Slime) -> str:
    if not name.startswith("import "):
        return ""
    last = name.rpartition(".")[2]
    places = [module for module, names in commit.modules.items() if last in names and not names[last].imported]
    places += [module for module in commit.modules if module.rpartition(".")[2] == last]
    return f", is in {' and '.join(sorted(places)[:2])} now" if places else ""


def _breaks(before: Signature, now: Signature, overridden: bool) -> str:
    names, known = {parameter.name: parameter for parameter in now}, {parameter.name for parameter in before}
    if ("async" in names) != ("async" in known):
        return "it is async now" if "async" in names else "it is no longer async"
    if gone := [parameter.name for parameter in before if parameter.name not in names]:
        return f"no parameter {', '.join(gone)} any more"
    new = [parameter.name for parameter in now if parameter.name not in known and not parameter.name.startswith("*")]
    stricter = [one.name for one in before if one.optional and not names[one.name].optional]
    if wanted := [*(name for name in new if not names[name].optional), *stricter]:
        return f"wants {', '.join(wanted)}, too"
    if overridden and new:
        return f"may get {', '.join(new)}, too, and ours does not take it"
    if named := [one.name for one in before if not one.by_name and names[one.name].by_name]:
        return f"takes {', '.join(named)} by name alone"
    in_place = [parameter.name for parameter in before if not parameter.by_name]
    return "" if [*names][: len(in_place)] == in_place else "its parameters have another order"


# ------------------------------------------------------------------ reading Python


def _parsed(data: bytes) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of slime's own texts
        return ast.parse(data)


def _used(file: str, node: ast.AST) -> Iterator[tuple[str, int]]:
    """(name, line) of what this node uses of slime."""
    if isinstance(node, ast.ImportFrom) and node.level == 0 and _is_slimes(node.module or ""):
        yield from ((f"import {node.module}.{alias.name}", node.lineno) for alias in node.names)
    elif isinstance(node, ast.Constant) and _is_slimes(text := _text(node)):
        if all(part.isidentifier() for part in text.split(".")) and file != "names.py":
            yield f"import {text}", node.lineno
    elif isinstance(node, ast.Attribute):
        module = _text(node.value.args[0]) if isinstance(node.value, ast.Call) and node.value.args else ""
        if _is_slimes(module):  # importlib.import_module("slime...").NAME
            yield f"import {module}.{node.attr}", node.lineno
        yield from _of_object(file, node.value, node.attr, node.lineno)
    elif isinstance(node, ast.Call):
        yield from _of_call(file, node)
    elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        yield from _of_table(file, node.targets[0].id, node)


def _of_object(file: str, base: ast.expr, attribute: str, line: int) -> Iterator[tuple[str, int]]:
    owner = _name(base)
    of_super = isinstance(base, ast.Call) and _name(base.func) == "super"
    if owner in _ARGS:
        if not attribute.startswith(_OURS_OF_ARGS):
            yield f"argument {attribute}", line
    elif owner == "placement_group":
        yield f"import slime.ray.placement_group.{attribute}", line
    elif owner in _OBJECTS:
        yield f"attribute {'|'.join(_OBJECTS[owner])}.{attribute}", line
    elif file in _SELF and (of_super or owner == "self") and attribute not in ("cross_job", "side", "remote"):
        yield f"attribute {'|'.join(_SELF[file])}.{attribute}", line


def _of_call(file: str, node: ast.Call) -> Iterator[tuple[str, int]]:
    called = _name(node.func)
    texts = [text for text in map(_text, node.args) if text]
    if called in ("getattr", "hasattr") and len(texts) == 1 and len(node.args) > 1:
        base = node.args[0]
        if isinstance(base, ast.Call) and _name(base.func) == "type":
            base = base.args[0]
        yield from _of_object(file, base, texts[0], node.lineno)
    elif called in _ASKED:
        for text in filter(str.isidentifier, texts):
            yield f"attribute {'|'.join(_MANAGERS)}.{text}", node.lineno


def _of_table(file: str, table: str, node: ast.Assign) -> Iterator[tuple[str, int]]:
    line, texts = node.lineno, [text for text in _texts(node.value) if not text.startswith(_OURS_OF_ARGS)]
    keys = node.value.keys if isinstance(node.value, ast.Dict) else [node.value]
    of_keys = [text for key in keys if key is not None for text in _texts(key)]
    if (file, table) == ("names.py", "PLACES"):
        for name, modules in ast.literal_eval(node.value).items():
            yield "import " + "|".join(f"{module}.{name}" for module in modules), line
    elif (file, table) == ("names.py", "ALSO"):
        for text in texts:
            kind = "" if text.startswith(("text ", "column ")) else "import " if _is_slimes(text) else "attribute "
            yield f"{kind}{text}", line
    elif (file == "handshake.py" and table in _TABLES_OF_ARGUMENTS) or (file, table) == ("dp_split.py", "ARGUMENTS"):
        yield from ((f"pattern {text}", line) for text in texts)
    elif file == "conversion.py" and table in _TABLES_OF_COLUMNS:
        yield from ((f"column {text}", line) for text in of_keys)
    elif (file, table) == ("arguments.py", "_REFUSED"):
        yield from ((f"argument {text}", line) for text in of_keys)


_OURS_OF_ARGS = ("cross_job", "enable_cross_job", "job_id")
_TABLES_OF_ARGUMENTS = ("MAY_DIFFER", "MUST_AGREE", "_FROM_PARTS", "_PROMPTS", "_EVALUATION", "_WEIGHT_TRANSPORT")
_TABLES_OF_COLUMNS = ("_AS_IT_IS", "_AS_LISTS", "_TOLD_APART", "_NEEDED", "_MADE")


def _is_slimes(text: str) -> bool:
    return text.startswith(_SLIME) and not text.startswith(_OURS)


def _text(node: ast.AST) -> str:
    """The text that this node is; empty: it is another."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _texts(node: ast.AST) -> Iterator[str]:
    return filter(None, map(_text, ast.walk(node)))


def _name(node: ast.AST) -> str:
    """The last part of `a.b.c`."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _top_level(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module, those of its `if` and `try` included."""
    for node in body:
        yield node
        for block in ("body", "orelse", "finalbody"):
            if isinstance(node, (ast.If, ast.Try)):
                yield from _top_level(getattr(node, block, []))
        if isinstance(node, ast.Try):
            for handler in node.handlers:
                yield from _top_level(handler.body)


def _defined(path: str, node: ast.stmt) -> Iterator[tuple[str, Found]]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        yield node.name, Found(path, node.lineno, _signature(node))
    elif isinstance(node, ast.ClassDef):
        yield node.name, Found(path, node.lineno)
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        yield from ((alias.asname or alias.name, Found(path, node.lineno, None, True)) for alias in node.names)
    else:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        yield from ((one.id, Found(path, node.lineno)) for one in targets if isinstance(one, ast.Name))


def _members(path: str, node: ast.ClassDef) -> Iterator[tuple[str, Found]]:
    """Attributes of a class: what its body defines, and what its methods set on self."""
    for one in ast.walk(node):
        if isinstance(one, ast.Attribute) and isinstance(one.ctx, ast.Store) and _name(one.value) == "self":
            yield one.attr, Found(path, one.lineno)
    for one in node.body:
        yield from _defined(path, one)


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Signature | None:
    """None: it is a property, and no function to those who use it."""
    if any(_name(one) in ("property", "cached_property") for one in node.decorator_list):
        return None
    given = node.args
    plain = [*given.posonlyargs, *given.args]
    without = len(plain) - len(given.defaults)
    named = zip(given.kwonlyargs, given.kw_defaults, strict=True)
    stars = (("*", given.vararg), ("**", given.kwarg))
    return (
        *(Parameter(one.arg, at >= without) for at, one in enumerate(plain) if one.arg not in ("self", "cls")),
        *(Parameter(one.arg, default is not None, True) for one, default in named),
        *(Parameter(star, True, True) for star, one in stars if one is not None),
        *(Parameter("async", True, True) for _ in range(isinstance(node, ast.AsyncFunctionDef))),
    )


def table(wanted: Wanted, pins: Mapping[str, Slime]) -> str:
    """Which pin has which of the names, in Markdown; those that none has are of Python or Ray, and are left out."""
    rows = []
    for name, places in sorted(wanted.places.items(), key=lambda item: shown(item[0])):
        has = [pin.find(name) is not None for pin in pins.values()]
        if any(has):
            files = sorted({PurePosixPath(place).name.partition(":")[0] for place in places})
            cells = (f"`{shown(name)}`", *("yes" if one else "" for one in has), ", ".join(files))
            rows.append(f"| {' | '.join(cells)} |")
    head = f"| name of slime | {' | '.join(pins)} | used in |"
    return "\n".join((head, f"| --- |{' --- |' * len(pins)} --- |", *rows)) + "\n"
