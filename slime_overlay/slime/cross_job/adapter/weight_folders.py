"""Folders through which slime's weights travel from v0.3 on: whose they are, and up to which number they have come.

    --update-weight-disk-dir             weight_v000001, weight_v000002 ... as the train job writes them
    --update-weight-local-checkpoint-dir on each engine's host: a copy of the newest one that was pulled

slime numbers its updates from 1 in each train job. A host that has pulled number 50 pulls nothing at 1 to 50, and
reports success: so a train job goes on behind the greatest number that anybody has seen. Two experiments in one folder
would load each other's weights, so each marks it with its job id.
"""

import contextlib
import json
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import BadInput

_MARK = "slime-cross-job"
_SYNC = ".weight_sync"  # of slime's patch to SGLang, in a local checkpoint
_PUBLISHED = re.compile(r"weight_v(\d+)")


@dataclass(frozen=True)
class Folder:
    """A folder of weights as it was found.

    Args:
        newest: greatest number of an update in it, 0: none, None: this host does not see it.
        owner: job id of the experiment that used it last; empty: nobody said.
    """

    path: str
    host: str
    newest: int | None
    owner: str


def published(path: str, job_id: str, gone: str = "") -> Folder:
    """The folder that a train job writes to; marked as this job's, if it is nobody's, or of the job `gone`.

    Raises:
        BadInput: it cannot be read or written.
    """
    folder, host = Path(path), socket.gethostname()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        numbers = [int(match[1]) for entry in folder.iterdir() if (match := _PUBLISHED.fullmatch(entry.name))]
        return Folder(path, host, max(numbers, default=0), _marked(folder / f".{_MARK}", job_id, gone))
    except OSError as error:
        raise BadInput(f"--update-weight-disk-dir {path} cannot be used on {host}: {error}") from None


def local(engine: Any, job_id: str, gone: str = "") -> Folder:
    """The local checkpoint on the host of an engine, in the process of slime's engine actor; marked likewise."""
    folder = Path(engine.args.update_weight_local_checkpoint_dir)
    host = socket.gethostname()
    if getattr(engine.args, "rollout_external", False) and not _is_here(engine.get_url()):
        return Folder(str(folder), host, None, "")
    sync = folder / _SYNC
    sync.mkdir(parents=True, exist_ok=True)
    try:
        newest = int(json.loads((sync / "state.json").read_text())["version"])
    except FileNotFoundError:
        newest = 0
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{sync}/state.json on {host} does not say which update lies there ({error}): remove {folder} on that "
            "host (it is only a copy), then start both jobs again"
        ) from None
    return Folder(str(folder), host, newest, _marked(sync / _MARK, job_id, gone))


def hosts(manager: Any) -> list[Any]:
    """One engine actor for each node of each engine, in the process of slime's RolloutManager."""
    find = getattr(manager, "_get_updatable_server", None)
    server = find() if find is not None else None
    return [] if server is None else [engine for engine in server.all_engines if engine is not None]


def _marked(mark: Path, job_id: str, gone: str) -> str:
    """Whose mark it is, which is ours if there was none, or that of a job that is gone. An empty one is nobody's: its
    writer died before it wrote, or the disk was full."""
    if mark.exists() and mark.read_text() in ("", gone):
        mark.unlink(missing_ok=True)
    with contextlib.suppress(FileExistsError), mark.open("x") as file:
        file.write(job_id)
    return mark.read_text()


def _is_here(url: str) -> bool:
    """Whether a server's address is one of this host."""
    host = urlsplit(url).hostname or ""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
        with socket.socket(socket.AF_INET6 if ":" in min(found) else socket.AF_INET) as probe:
            probe.bind((min(found), 0))  # only a host's own addresses can be bound
    except OSError:
        return False
    return True
