"""What this Ray job waits for because the cluster lacks it: actors and placement groups without a place.

Ray waits for a place without a word and without end. Here it is named, after seconds, to the log and to the other job
(its verdicts tell what a client does), and the wait has an end: `resources_s` where no node could ever hold it, so
that nodes that are being added have time to come; `timeout_s` where others hold what it needs.
"""

import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util import state

from ..broker.liveness import this_cluster
from ..errors import CrossJobError, NoResources, Stopped
from ..settings import Settings
from . import shutdown

logger = logging.getLogger(__name__)

_EVERY_S = 5.0
_STOPS_S = 0.5  # within which a wish to stop is heard
_AGAIN_S = 60.0  # the same is logged again after so long

Needs = Mapping[str, float]


@dataclass(frozen=True)
class Shortage:
    """Somebody waits for a place. `hopeless`: the nodes of the cluster could not hold it, even if they were free."""

    message: str
    hopeless: bool
    what: str = ""  # who waits


class Limits:
    """How long a wait for a place may last.

    Args:
        say: told the shortage in words, each time that it is looked at.
    """

    def __init__(self, settings: Settings, say: Callable[[str], None]):
        self._settings, self._say = settings, say
        self._began = time.monotonic()
        self._waits: tuple[str, bool] | None = None
        self._said, self._logged = "", 0.0

    def check(self, found: Shortage | None) -> None:
        """Say what is missing. Raises NoResources when that has lasted too long."""
        now = time.monotonic()
        if found is None:
            if self._waits is not None:
                self._say("starting")
            self._waits = None
            return
        if self._waits != (found.what, found.hopeless):  # another wait, with a limit of its own
            self._waits, self._began = (found.what, found.hopeless), now
        self._say(found.message)
        if found.message != self._said or now - self._logged > _AGAIN_S:
            self._said, self._logged = found.message, now
            logger.warning("%s", found.message)
        limit_s = self._settings.resources_s if found.hopeless else self._settings.timeout_s
        if now - self._began > limit_s:
            raise NoResources(f"nothing was started within {limit_s:g} s: {found.message}")


class Watch:
    """Looks after a driver that waits for Ray inside of code that is not ours; in a thread, until `stop`.

    Args:
        give_up: called with NoResources when the wait has lasted too long, and with Stopped when this process was
            asked to stop; it should end the process.
    """

    def __init__(self, settings: Settings, say: Callable[[str], None], give_up: Callable[[CrossJobError], None]):
        self._limits, self._give_up = Limits(settings, say), give_up
        self._over = threading.Event()
        threading.Thread(target=self._run, name="cross-job-resources", daemon=True).start()

    def stop(self) -> None:
        """What was waited for is there."""
        self._over.set()

    def _run(self) -> None:
        looked = time.monotonic()
        while not self._over.wait(_STOPS_S):
            try:
                shutdown.check()
                if time.monotonic() - looked >= _EVERY_S:
                    looked = time.monotonic()
                    self._limits.check(shortage())
            except (NoResources, Stopped) as error:
                if not self._over.is_set():
                    self._give_up(error)
                return


def shortage(actor: Any = None) -> Shortage | None:
    """What of this Ray job waits for a place: `actor`, or a placement group or any actor. None: nothing does, or
    nobody can tell (no dashboard). Public state API only."""
    job = ray.get_runtime_context().get_job_id()
    try:
        with this_cluster() as address:
            return _shortage(job, address, actor)
    except Exception as error:  # whatever Ray makes of a head that is away for a moment: this must go on looking
        logger.info("Ray cannot tell what waits for a place: %s", error)
    return None


def _shortage(job: str, address: str, actor: Any) -> Shortage | None:
    if actor is None:
        for group in state.list_placement_groups(
            address=address, filters=[("state", "=", "PENDING")], detail=True, timeout=5
        ):
            bundles = [bundle["unit_resources"] for bundle in group.bundles or []]
            if group.creator_job_id == job and bundles:
                found = _named(f"a placement group of {len(bundles)} bundles", bundles)
                if found is not None:
                    return found
    filters: Any = [("job_id", "=", job), ("state", "=", "PENDING_CREATION")]
    for waiting in state.list_actors(address=address, filters=filters, detail=True, timeout=5):
        needs = waiting.required_resources or {}
        if waiting.pid or any("_group_" in name for name in needs):  # it has its place, and is being made
            continue
        if actor is None or waiting.actor_id == _id_of(actor):
            found = _named(f"the actor {waiting.class_name}", [needs])
            if found is not None:
                return found
    return None


def _id_of(actor: Any) -> str:
    """Ray's id of an actor, as its handle shows itself."""
    found = re.search(r"[0-9a-f]{32}", repr(actor))
    return found.group() if found else ""


def _named(what: str, bundles: list[Needs]) -> Shortage | None:
    """What is missing; None: all that it needs is free, so it is being started."""
    needs: dict[str, float] = {}
    for bundle in bundles:
        for name, amount in bundle.items():
            needs[name] = needs.get(name, 0.0) + amount
    free, total = ray.available_resources(), ray.cluster_resources()
    short = [
        f"{amount:g} {name} ({free.get(name, 0):g} of {total.get(name, 0):g} free)" for name, amount in needs.items()
    ]
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    hopeless = any(amount > total.get(name, 0) for name, amount in needs.items()) or not all(
        any(_fits(bundle, node) for node in nodes) for bundle in bundles
    )
    if not hopeless and all(amount <= free.get(name, 0) for name, amount in needs.items()):
        return None
    cure = (
        "add nodes that have it, or ask for less" if hopeless else "stop what holds them, add nodes, or ask for less"
    )
    return Shortage(f"{what} waits to be started: it needs {', '.join(short)}; {cure}", hopeless, what)


def _fits(bundle: Needs, node: Needs) -> bool:
    return all(node.get(name, 0.0) >= amount for name, amount in bundle.items())
