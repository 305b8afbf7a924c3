"""Where slime's source of prompts stands: read after each generation, kept with the rollout, set before the next.

slime's own sources are read as they are: the data set's position (epoch, offset, sample indices), metadata, and the
samples that wait in the buffer (partial rollouts, or what a custom generation gave back). Of any other source it is
what slime's contract says: the files that its `save(rollout_id)` writes under `args.save`, from which its
`load(rollout_id)`, with `args.load` there, goes on in another process; and the samples in its buffer, where it has
one like slime's.

A state is a Batch, so that arrays and tensors are copied and nothing else. What comes back equals what was there;
paths, sets and PIL's images do so, too. What else a batch cannot hold is refused by name. The files of a custom source
are kept as they are, and only its own `load` reads them. Runs inside the actor that generates.
"""

import contextlib
import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path, PosixPath, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from ..batch import Batch
from ..errors import BadInput, BatchError, ContentRefused
from .training_data import own

logger = logging.getLogger(__name__)

_POSITION = ("epoch_id", "sample_offset", "sample_index", "sample_group_index")
_SLIMES = ("slime.rollout.data_source", "slime.ray.rollout_data_source")  # from v0.3 on, and before
_MARK = "slime_cross_job"
_KINDS: dict[str, Any] = {kind.__name__: kind for kind in (set, frozenset, PosixPath, PurePosixPath, PureWindowsPath)}
_MODES = ("1", "L", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F")  # of images without a palette
_PLAIN = {int, float, bool, str, type(None)}
_FIELD = "sample "  # begins the name of a column that holds a field of the buffered samples


def state(manager: Any) -> Batch:
    """The state of slime's Buffer or RolloutManager.

    Raises:
        ContentRefused: the source, or a sample in its buffer, holds something that cannot be kept; the message says
            where. BadInput: a custom source does not keep slime's contract.
    """
    source = manager.data_source
    about: dict[str, Any] = {n: v for n in _POSITION if isinstance(v := getattr(source, n, None), int)}
    columns: dict[str, list[Any]] = {}
    if _is_custom(source):
        about["saved"] = rollout_id = max(0, getattr(manager, "rollout_id", 0))
        files = _saved(manager, rollout_id)
        about["files"], columns["file"] = [*files], [*files.values()]
    elif isinstance(metadata := getattr(source, "metadata", None), dict):
        about["metadata"] = metadata
    if (buffer := buffer_of(manager)) is not None:
        about["groups"] = [len(group) for group in buffer]
        samples = [sample.to_dict() for group in buffer for sample in group]
        about["fields"] = kinds = [*dict.fromkeys(tuple(sample) for sample in samples)]
        columns["fields"] = [kinds.index(tuple(sample)) for sample in samples]
        for name in dict.fromkeys(name for kind in kinds for name in kind):
            columns[_FIELD + name] = [sample.get(name) for sample in samples]
    rows = max(map(len, columns.values()), default=0)
    columns = {"row": [0] * rows, **{name: [*v, *[None] * (rows - len(v))] for name, v in columns.items()}}
    try:
        try:
            return Batch.pack(columns, about)
        except BatchError:
            marked = {**_marked(about), "marked": True}
            return Batch.pack({name: _marked(values) for name, values in columns.items()}, marked)
    except BatchError as error:
        raise ContentRefused(
            f"the state of the data source cannot be kept for a new rollout job: {error}. Here a column is a field of "
            "the samples in its buffer, a sample is named by its place there, and attrs are the data source's own"
        ) from None


def stands_at(manager: Any, state: Batch) -> bool:
    """Whether the source's position is that of `state`, as far as slime's sources have one."""
    buffer = buffer_of(manager)
    waiting = [] if buffer is None else [len(group) for group in buffer]
    return waiting == state.attrs.get("groups", []) and all(
        getattr(manager.data_source, name) == state.attrs[name] for name in _POSITION if name in state.attrs
    )


def restore(manager: Any, state: Batch) -> None:
    """Put the source to where `state` says; what it does not name stays.

    Raises:
        BadInput: a custom source's `load` does not read what its `save` wrote.
    """
    source, back = manager.data_source, _unmarked if "marked" in state.attrs else own
    about = back(dict(state.attrs))
    if "files" in about:
        _load_saved(manager, about["saved"], dict(zip(about["files"], state["file"], strict=False)))
    else:
        for name in (*_POSITION, "metadata"):
            if name in about:
                setattr(source, name, about[name])
        if getattr(source, "dataset", None) is not None and manager.args.rollout_shuffle:
            source.dataset.shuffle(source.epoch_id)
    if (buffer := buffer_of(manager)) is not None and "groups" in about:
        fields = {name: back(state[_FIELD + name].tolist()) for kind in about["fields"] for name in kind}
        rows = enumerate(state["fields"][: sum(about["groups"])])
        samples = iter([_sample({name: fields[name][row] for name in about["fields"][kind]}) for row, kind in rows])
        buffer[:] = [[next(samples) for _ in range(size)] for size in about["groups"]]


def load(manager: Any, rollout_id: int, folder: str | None) -> Batch:
    """Where the source stood after `rollout_id`, as slime's `load` finds it in the train job's --load. The source
    stays where it is: the next generation begins where the broker says that it belongs.

    Args:
        folder: the train job's --load: this job's own may be what slime falls back to while there is no checkpoint.
    """
    before = state(manager)
    with _with(manager, load=folder):
        manager.load(rollout_id)
    found = state(manager)
    if found.ipc == before.ipc:
        logger.warning(
            "load(%d) of the data source changed nothing: %s holds no state of it, or the state that it has already",
            rollout_id,
            folder,
        )
    restore(manager, before)
    return found


def _marked(value: Any) -> Any:
    """With sets, paths and images as dicts with the key _MARK, of what a batch holds."""
    kind = type(value)
    if kind in (list, tuple):
        return value if {*map(type, value)} <= _PLAIN else kind(_marked(item) for item in value)
    if kind is dict:
        return {name: _marked(item) for name, item in value.items()}
    if kind in _KINDS.values():
        return {
            _MARK: (kind.__name__, str(value) if issubclass(kind, PurePath) else sorted(map(_marked, value), key=repr))
        }
    pictures = sys.modules.get("PIL.Image")
    if pictures is not None and isinstance(value, pictures.Image) and value.mode in _MODES:
        return {_MARK: ("image", value.mode, value.size, value.tobytes())}
    return value


def _unmarked(value: Any) -> Any:
    kind = type(value)
    if kind in (list, tuple):
        return value if {*map(type, value)} <= _PLAIN else kind(_unmarked(item) for item in value)
    if kind is not dict:
        return own(value)
    if [*value] != [_MARK]:
        return {name: _unmarked(item) for name, item in value.items()}
    what, *content = value[_MARK]
    if what == "image":
        from PIL import Image

        return Image.frombytes(*content)
    return _KINDS[what](_unmarked(content[0]))


def _is_custom(source: Any) -> bool:
    """Whether this source has a `save` or `load` that is not slime's."""
    for name in ("save", "load"):
        if not callable(getattr(source, name, None)):
            raise BadInput(
                f"the data source {_name(source)} has no {name}(rollout_id): slime's contract for --data-source-path "
                "asks for it, and without it a new rollout job cannot go on where this one stood"
            )
    made_by = {next(c.__module__ for c in type(source).__mro__ if n in vars(c)) for n in ("save", "load")}
    return not made_by <= {*_SLIMES}


def _saved(manager: Any, rollout_id: int) -> dict[str, Any]:
    """Path -> bytes of the files that a custom source's `save` writes. Raises BadInput: it writes none, or fails."""
    source = manager.data_source
    with tempfile.TemporaryDirectory(prefix="slime-source-") as folder:
        with _with(manager, save=folder, load=folder, rollout_global_dataset=True):
            _call(source, "save", rollout_id)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        if not files:
            raise BadInput(
                f"the data source {_name(source)} wrote nothing under args.save when save({rollout_id}) was called: "
                "what it needs to go on in a new rollout job cannot be kept. Let save write its state to a file under "
                "self.args.save, as it is at the time of the call, and load read it from under self.args.load; a "
                "source without any state writes an empty file"
            )
        return {str(path.relative_to(folder)): np.frombuffer(path.read_bytes(), np.uint8) for path in files}


def _load_saved(manager: Any, rollout_id: int, files: dict[str, Any]) -> None:
    source, before = manager.data_source, _saved(manager, rollout_id)
    with tempfile.TemporaryDirectory(prefix="slime-source-") as folder:
        for name, content in files.items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes(content))
        with _with(manager, save=folder, load=folder, rollout_global_dataset=True):
            _call(source, "load", rollout_id)
    after = _saved(manager, rollout_id)
    if _same(before, after) and not _same(files, after):
        raise BadInput(
            f"load({rollout_id}) of the data source {_name(source)} changed nothing, though save wrote "
            f"{', '.join(files)} under args.save: let load read them from under self.args.load, as it is at the time "
            "of the call"
        )


def _call(source: Any, method: str, rollout_id: int) -> None:
    try:
        getattr(source, method)(rollout_id)
    except Exception as error:  # the user's code
        raise BadInput(
            f"{method}({rollout_id}) of the data source {_name(source)} failed: {type(error).__name__}: {error}"
        ) from error


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(bytes(one[name]) == bytes(other[name]) for name in one)


@contextlib.contextmanager
def _with(manager: Any, **values: Any) -> Iterator[None]:
    """With these arguments of slime, for the manager and its source."""
    every = {id(args): args for args in (manager.args, getattr(manager.data_source, "args", manager.args))}.values()
    before = [{name: getattr(args, name, None) for name in values} for args in every]
    try:
        for args in every:
            vars(args).update(values)
        yield
    finally:
        for args, old in zip(every, before, strict=True):
            vars(args).update(old)


def buffer_of(manager: Any) -> Any:
    """slime's list of groups of samples: of the manager itself up to 079dbcf, then of its data source. None: there is
    none, or one of another kind, which a custom source keeps itself."""
    from slime.utils.types import Sample

    for holder in (manager, manager.data_source):
        buffer = getattr(holder, "buffer", None)
        if isinstance(buffer, list):
            strange = next(
                (s for g in buffer for s in (g if isinstance(g, list) else [g]) if type(s) is not Sample), None
            )
            if strange is None:
                return buffer
            if not _is_custom(manager.data_source):
                raise ContentRefused(
                    f"the data source's buffer holds a {type(strange).__module__}.{type(strange).__qualname__}, which "
                    "cannot be kept for a new rollout job: give back lists of slime's Sample (add_samples)"
                )
    return None


def _name(source: Any) -> str:
    return f"{type(source).__module__}.{type(source).__qualname__}"


def _sample(values: dict[str, Any]) -> Any:
    from slime.utils.types import Sample

    fields = Sample.__dataclass_fields__
    sample = Sample.from_dict({name: value for name, value in values.items() if name in fields})
    for name, value in values.items():
        if name not in fields:
            setattr(sample, name, value)
    return sample
