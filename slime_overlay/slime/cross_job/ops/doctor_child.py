"""The process in which `doctor` looks (see doctor.py): it tells each finding as a line of JSON, and ends.

Ray may end it, or hang in it; whoever reads the lines knows what had been found. A thread ends it where Ray's own log
says what it waits for in vain (it is not let in), and when its time is over.
"""

import dataclasses
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from ..errors import BadInput, BrokerLost, ClusterUnreachable, CrossJobError, WaitTimeout
from ..link import Deadline, find_address, get, namespaces, probe
from ..types import BROKER_NAME, PROTOCOL, VAULT_NAME
from . import doctor_checks as checks
from . import doctor_nodes as nodes
from .doctor_checks import Finding
from .doctor_store import look_at_store, quarantine
from .doctor_versions import find_slime, installed, look_at_slime, same_versions, versions
from .viewer import raise_if_stuck

CONNECT_S = 15.0
_LISTEN_S = 3.0
_ANSWER_S = 10.0  # of the broker: it is away for seconds while it restarts
_VAULT_S = 5.0
_NODES_S = 15.0
_STORE_S = 5.0
_MOST_JOBS = 50
_ADDRESS_DO = "give the address of the head, HOST:PORT as for ray.init (port 6379 by default)"
_TOKEN_DO = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, as the cluster has them"


def main(asked: str) -> None:
    """Look, tell, end. `asked`: what doctor.diagnose asks for, as JSON."""
    ask = json.loads(asked)
    ask["timeout_s"] = max(0.0, ask["until"] - time.monotonic())
    clock = threading.Timer(ask["timeout_s"], os._exit, [0])
    clock.daemon = True
    clock.start()
    Child(ask).look()
    os._exit(0)  # at once: nothing of it is worth waiting for


class Child:
    """See the module."""

    def __init__(self, ask: dict[str, Any]):
        self._ask = ask
        self._deadline = Deadline(ask["timeout_s"])
        self._namespace: str = ask["namespace"]
        self._broker: Any = None

    def tell(self, found: Finding | list[Finding] | None) -> None:
        """Let whoever started us have it."""
        for one in [found] if isinstance(found, Finding) else found or []:
            os.write(self._ask["tell"], json.dumps(dataclasses.asdict(one)).encode() + b"\n")

    def look(self) -> None:
        """All checks, what needs no cluster first."""
        self.tell(versions(installed()))
        slime = self._ask["slime"] or find_slime()
        if slime is None:
            self.tell(Finding("slime", "note", "not looked at: none is importable here, and none was named (--slime)"))
        else:
            self._try(["slime"], 15.0, look_at_slime, slime)
        if self._ask["store"]:
            self._try(["durable store"], 4 * _STORE_S, look_at_store, self._ask["store"], _STORE_S)
        if not self._connect():
            return
        broker_is_there = self._try(["broker"], 2 * _ANSWER_S, self._find_broker)
        jobs = self._try(["vaults"], 3 * _ANSWER_S, self._ask_broker) if broker_is_there is True else None
        self._try(["nodes"], _NODES_S + 5, self._look_at_nodes, jobs or {})
        if jobs is not None:
            self._look_at_jobs(jobs)

    def _try(self, named: list[str], seconds: float, act: Callable[..., Any], *args: Any) -> Any:
        """What `act` returns; its findings are told. Where it fails, or takes too long: a note (for `named`), None."""
        results: list[Any] = []

        def run() -> None:
            try:
                results.append(act(*args))
            except Exception as error:  # whatever it is, the other checks go on
                results.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(min(seconds, self._deadline.left()))
        result = results[0] if results else WaitTimeout(f"it took longer than {seconds:g} s")
        if isinstance(result, Exception):
            words = f"{type(result).__name__}: {str(result).strip() or 'no words'}"[:500]
            for name in named:
                hung = not results
                why = "whoever uses it hangs as well" if hung else ""
                severity = "error" if hung else "note"
                what = f"it hangs: {words}" if hung else f"not looked at: {words}"
                self.tell(Finding(name, severity, what, why, "look at its log, and at its machine" if hung else ""))
            return None
        if isinstance(result, (Finding, list)):
            self.tell(result)
        return result

    # ------------------------------------------------------------------ the cluster

    def _connect(self) -> bool:
        try:
            address = self._ask["address"] = find_address(self._ask["address"])
            probe(address, _LISTEN_S, _LISTEN_S)
        except (BadInput, ClusterUnreachable) as error:
            self.tell(self._no_cluster(str(error), _ADDRESS_DO))
            return False
        except TimeoutError as error:
            do = "see whether the head hangs (its load, its gcs_server); correct the port"
            self.tell(self._no_cluster(str(error), do))
            return False
        over = threading.Event()
        threading.Thread(target=self._watch_ray, args=(over,), daemon=True).start()
        began = time.monotonic()
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
        except Exception as error:
            over.set()
            self.tell(self._refused(error))
            return False
        over.set()
        alive = sum(1 for node in ray.nodes() if node["Alive"])
        took_s = time.monotonic() - began
        self.tell(Finding("cluster", "ok", f"{alive} nodes; connected within {took_s:.1f} s", where=address))
        mode = "with a token" if os.environ.get("RAY_AUTH_MODE") == "token" else "without a token"
        self.tell(Finding("token", "ok", f"the cluster lets us in, {mode}"))
        found_here = installed()
        self.tell(Finding("same versions", "ok", f"both have Ray {found_here['ray']}, Python {found_here['python']}"))
        return True

    def _watch_ray(self, over: threading.Event) -> None:
        """Beside ray.init, which waits 20 s and more, and tells in its log only that it is not let in."""
        until = Deadline(min(CONNECT_S, max(0.5, self._deadline.left() - 1.0)))
        while not over.wait(0.2):
            text = Path(self._ask["noise"]).read_text(errors="replace")
            if "InvalidAuthToken" in text or "Unauthenticated" in text:
                self.tell(self._not_let_in())
                os._exit(0)
            if not until:
                lines = [line for line in text.splitlines() if line.strip()]
                last = f" ({lines[-1][-200:]})" if lines else ""
                what = f"something listens there, and Ray does not come through within {until.timeout_s:.0f} s{last}"
                self.tell(self._no_cluster(what, "see whether the head hangs: its load, its gcs_server, its log"))
                os._exit(0)

    def _not_let_in(self) -> list[Finding]:
        sends = os.environ.get("RAY_AUTH_MODE") == "token"
        ours = f"this process sends none (RAY_AUTH_MODE is {os.environ.get('RAY_AUTH_MODE') or 'not set'})"
        what = f"the cluster asks for a token, and {'ours is another' if sends else ours}"
        why = "nothing without it may join the cluster, submit jobs or see them"
        ok = Finding("cluster", "ok", "a Ray cluster answers", where=self._ask["address"])
        return [ok, Finding("token", "error", what, why, _TOKEN_DO)]

    def _refused(self, error: Exception) -> list[Finding]:
        words = str(error).strip()
        ok = Finding("cluster", "ok", "a Ray cluster answers", where=self._ask["address"])
        if type(error).__name__ == "AuthenticationError":
            why = "Ray connects to nothing as long as RAY_AUTH_MODE asks for a token and there is none"
            return [Finding("token", "error", f"this process has no token: {words}", why, _TOKEN_DO)]
        other = same_versions(words)
        if other is not None:
            return [ok, Finding("token", "ok", "the cluster lets us in"), other]
        do = "run it on a node of the cluster, with the address of its head (HOST:6379)"
        return [self._no_cluster(f"Ray does not connect: {type(error).__name__}: {words[:500]}", do)]

    def _no_cluster(self, what: str, do: str) -> Finding:
        return no_cluster(self._ask["address"], what, do)

    # ------------------------------------------------------------------ broker and vaults

    def _find_broker(self) -> Finding | bool:
        try:
            self._broker = ray.get_actor(BROKER_NAME, namespace=self._namespace)
        except ValueError:
            return checks.no_broker(self._namespace, namespaces())
        return True

    def _ask_broker(self) -> dict[str, Any]:
        """Of each job that is looked at: its status, and what `look` tells. Tells of broker, protocol and vaults."""
        began = time.monotonic()
        try:
            raise_if_stuck(self._namespace)
            hello = self._call("hello")
            answered_s = time.monotonic() - began
            if hello["protocol"] != PROTOCOL:
                self.tell(Finding("broker", "ok", f"it answers within {answered_s:.2f} s", where=self._namespace))
                self.tell(checks.broker_speaks(hello, {}))
                raise BadInput("what it says may mean something else")
            status = self._call("call", "status")
        except (WaitTimeout, BrokerLost) as error:
            why = "both jobs wait for it, with all that they do"
            do = "see `ray list actors --filter state!=DEAD`: its node may be gone, or its process hang; if it hangs, "
            do += "kill its process: Ray starts it again, and it goes on where it was"
            self.tell(Finding("broker", "error", f"it does not answer: {error}", why, do, self._namespace))
            raise
        chosen = [job for job, one in status.items() if job == self._ask["job_id"] or not one["complete"]]
        chosen = [job for job in chosen if self._ask["job_id"] in (None, job)][:_MOST_JOBS]
        jobs = {job: self._call("call", "look", job, limit=200) for job in chosen}
        restarts = [event.at for one in jobs.values() for _, event in one["events"] if event.kind == "restarted"]
        count = max((one["status"]["events"].get("restarted", 0) for one in jobs.values()), default=0)
        last = {"count": count, "at": max(restarts, default=0.0), "now": time.time()}
        self.tell(checks.broker_stands(self._namespace, len(status), answered_s, last))
        self._look_at_vaults(hello, len(status))
        wanted = self._ask["job_id"]
        if wanted is not None and wanted not in status:
            there = ", ".join(sorted(status)) or "none"
            what = f"namespace {self._namespace!r} knows no job {wanted}; it knows {there}"
            why = "nobody has attached under this id here"
            self.tell(Finding("peers", "error", what, why, "correct the job id, or the namespace", wanted))
        return jobs

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        deadline = Deadline(min(_ANSWER_S, self._deadline.left()))
        while True:
            try:
                return get(getattr(self._broker, method).remote(*args, **kwargs), deadline, "the broker")
            except (ray.exceptions.RayActorError, ray.exceptions.ActorUnschedulableError) as error:
                if not deadline:
                    raise BrokerLost(f"it does not answer for {deadline.timeout_s:.0f} s: {error}") from None
                time.sleep(0.3)

    def _look_at_vaults(self, hello: dict[str, Any], jobs: int) -> None:
        named = ray.util.list_named_actors(all_namespaces=True)
        mine = [a["name"] for a in named if a["namespace"] == self._namespace and a["name"].startswith(VAULT_NAME)]
        alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        gone = [name for name in mine if name.rpartition("_")[2] not in alive]
        asked: dict[str, Any] = {}
        for name in [name for name in mine if name not in gone]:
            node = alive[name.rpartition("_")[2]]
            title = f"vault of node {node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:8]})"
            asked[title] = ray.get_actor(name, namespace=self._namespace).hello.remote()
        deadline, silent, protocols = Deadline(_VAULT_S), dict[str, str](), dict[str, int]()
        for title, ref in asked.items():
            try:
                protocols[title] = get(ref, deadline, "it")["protocol"]
            except (CrossJobError, ray.exceptions.RayError) as error:
                silent[title] = str(error).splitlines()[0][:300]
        self.tell(checks.broker_speaks(hello, protocols))
        self.tell(checks.vaults_answer(silent, gone, len(protocols), len(alive), jobs))

    # ------------------------------------------------------------------ nodes and jobs

    def _look_at_nodes(self, jobs: dict[str, Any]) -> None:
        found = nodes.look_at_nodes(min(_NODES_S, self._deadline.left()))
        needs = [need_of(job, one) for job, one in jobs.items()]
        self.tell(nodes.not_reached(found))
        self.tell(nodes.object_store(found, needs))
        for judge in (nodes.spilling, nodes.shared_memory, nodes.disks, nodes.clocks):
            self.tell(judge(found))

    def _look_at_jobs(self, jobs: dict[str, Any]) -> None:
        for job, one in jobs.items():
            self.tell(checks.peers(job, one["status"]))
            self.tell(checks.progress(job, one["status"]))
            self.tell(checks.leases(job, one["status"]))
        if not jobs:
            for name in ("peers", "progress", "leases"):
                self.tell(Finding(name, "note", "not looked at: there is no open job"))
        with_store = [job for job, one in jobs.items() if one["status"]["store"] is not None]
        uris = {job: self._try([], _ANSWER_S, self._call, "call", "store_uri", job) for job in with_store}
        for uri in sorted({uri for uri in uris.values() if uri and uri != self._ask["store"]}):
            self._try(["durable store"], 4 * _STORE_S, look_at_store, uri, _STORE_S)
        for job, uri in uris.items():
            if uri:
                self._try(["quarantine"], 2 * _STORE_S, quarantine, uri, job, _STORE_S)
        if not with_store:
            for name in ("quarantine",) if self._ask["store"] else ("durable store", "quarantine"):
                self.tell(Finding(name, "note", "not looked at: no open job has a durable store (--cross-job-store)"))


def no_cluster(address: str, what: str, do: str) -> Finding:
    return Finding("cluster", "error", what, "without the cluster there is nothing to look at", do, address)


def need_of(job: str, look: dict[str, Any]) -> nodes.Need:
    """What a job asks of the object stores, from what the broker tells of it."""
    status = look["status"]
    clients = [status["producer"], *status["consumers"].values()]
    largest = max((known.nbytes for _, known in look["progress"]), default=0)
    places = tuple({one["node_id"] for one in clients if one is not None})
    return nodes.Need(job, largest, status["max_ahead"], status["held_bytes"], places)
