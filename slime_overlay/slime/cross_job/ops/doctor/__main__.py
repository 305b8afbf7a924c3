"""The process in which `doctor` looks, see __init__.py: it reads from stdin what to look at, and prints findings.

Each check runs in a thread and is given up after a while, so that one that hangs keeps no other from being made.
"""

import dataclasses
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TextIO

from ...errors import NoBroker, ProtocolMismatch
from ...types import shortened
from . import Finding
from .versions import find_slime, look_at_slime, look_at_versions

_CONNECT_S = 15.0
_LISTEN_S = 3.0  # for somebody to take a connection, and to say something
_NODES_S = 15.0
_STORE_S = 5.0
_MOST = 4000  # characters of an error: it may list the namespaces of a whole cluster
_CURES = {
    "auth": "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, as the cluster has them",
    "version mismatch": "run this with the cluster's interpreter and packages, as in its image",
    "": "correct the address, HOST:PORT (port 6379 by default); see whether the head hangs: its load, its gcs_server",
}
"""Of a cluster that cannot be joined: what to do, by a word of what was said; the first that fits."""
_DO: dict[type[Exception], str] = {
    NoBroker: "start a job there; where one runs already, name its namespace (--namespace)",
    ProtocolMismatch: "run this with the slime cross-job that the jobs have; see that both jobs have the same",
}
"""What to do after an error of another check."""
_told: TextIO | None = None  # where findings go, if not to stdout


def main() -> None:
    """Make all checks, what needs no cluster first."""
    ask = json.load(sys.stdin)
    tell(look_at_versions())
    if slime := ask["slime"] or find_slime():
        within("slime", 15.0, look_at_slime, slime)
    else:
        tell([Finding("slime", "note", "not looked at: none is importable here, and none was named (--slime)")])
    from . import jobs, nodes, stores  # the packages that they need may be missing

    if ask["store"]:
        within("durable store", 4 * _STORE_S, stores.look_at_store, ask["store"], _STORE_S)
    if within("cluster", _CONNECT_S, connect, ask["address"]) is None:
        return
    found = within("nodes", _NODES_S + 5.0, nodes.look_at_nodes, _NODES_S) or []
    tell(nodes.judged(found) if found else [])
    looked = within("broker", 4 * jobs.ANSWER_S, jobs.look_at_broker, ask["namespace"], ask["job_id"])
    if looked is None:
        return
    connection, told, known = looked
    tell(told)
    within("vaults", jobs.ANSWER_S, jobs.look_at_vaults, ask["namespace"], len(known))
    tell(nodes.object_stores(found, known))
    for job, one in known.items():
        tell(jobs.look_at_job(job, one["status"]))
    with_store = [job for job, one in known.items() if one["status"]["store"] is not None]
    uris = {job: within("durable store", jobs.ANSWER_S, connection.call, "store_uri", job) for job in with_store}
    for uri in sorted({*uris.values()} - {None, ask["store"]}):
        within("durable store", 4 * _STORE_S, stores.look_at_store, uri, _STORE_S)
    for job, uri in uris.items():
        within("quarantine", 2 * _STORE_S, stores.quarantine, uri, job, _STORE_S)
    if not with_store:
        for check in ("quarantine",) if ask["store"] else ("durable store", "quarantine"):
            tell([Finding(check, "note", "not looked at: no open job has a durable store (--cross-job-store)")])


def connect(address: str) -> Finding:
    """Join the cluster, as a driver. Raises what keeps it from that."""
    import ray

    from ...client.connection import ensure_ray, find_address, probe

    address = find_address(address)
    probe(address, _LISTEN_S, _LISTEN_S)
    ensure_ray(address, logging_level=logging.CRITICAL)
    alive = sum(node["Alive"] for node in ray.nodes())
    mode = "with a token" if os.environ.get("RAY_AUTH_MODE") == "token" else "without a token"
    return Finding("cluster", "ok", f"it lets us in, {mode}; {alive} nodes are alive", where=address)


def tell(found: list[Finding]) -> None:
    """Print findings for the process that started this one."""
    for one in found:
        print(json.dumps(dataclasses.asdict(one)), file=_told, flush=True)


def within(check: str, seconds: float, act: Callable[..., Any], *args: Any) -> Any:
    """What `act` returns; findings are told. None where it fails, or takes longer: an error of this check is told."""
    result = ThreadPoolExecutor(1).submit(act, *args)
    try:
        found = result.result(seconds)
    except Exception as error:  # whatever it is, the other checks go on
        said = str(error) if result.done() else f"no answer within {seconds:g} s. {_last_line()}"
        words = f"{type(error).__name__}: {' '.join(said.split())}"
        do = _DO.get(type(error), "look at its log, and at its machine")
        if check == "cluster":
            do = next(cure for word, cure in _CURES.items() if word in words.lower())
        tell([Finding(check, "error", shortened(words, _MOST), do=do)])
        return None
    findings = found if isinstance(found, list) else [found]
    if all(isinstance(one, Finding) for one in findings):
        tell(findings)
    return found


def _last_line() -> str:
    """Of what Ray has logged here: in its own log alone it says that it is not let in."""
    try:
        log = os.pread(2, 1 << 20, 0).decode(errors="replace")
    except OSError:  # it goes elsewhere
        return ""
    return log.strip().rpartition("\n")[2][-300:]


if __name__ == "__main__":
    _told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints, as warnings of its raylets, is no finding
    code = 1
    try:
        main()
        code = 0
    except Exception:
        traceback.print_exc()
    os._exit(code)  # at once, whichever check still hangs: nothing of it is worth waiting for
