"""The faults of a chaos run on several machines: each hits a machine or the network, and says what Ray saw of it.

As in faults.py, a fault returns when it has taken effect and is over, with the moment and its witness.
"""

import time
from collections.abc import Callable
from subprocess import CalledProcessError

from tests.chaos.auditor import lines
from tests.chaos.faults import Fault, Run, Taken
from tests.chaos.nodes import wait_until

NODE_FAULTS: dict[str, Fault] = {}
_SEEN_S = 60.0  # for Ray to notice
_BACK_S = 120.0  # for a machine to be one of the cluster again


def fault(name: str) -> Callable[[Fault], Fault]:
    def add(inject: Fault) -> Fault:
        NODE_FAULTS[name] = inject
        return inject

    return add


def node_of(run: Run, name: str) -> str | None:
    """The id of the machine's node, as Ray has it; None while it has none."""
    return next(iter(run.observer.alive(run.cluster.address(name))), None)


def back(run: Run, name: str, but: str = "") -> str:
    """Wait until the machine is a node of the cluster, another than `but`, and start it where it has ended; its id."""

    def there() -> bool:
        if run.cluster.ended(name):
            run.cluster.begin(name)
        return node_of(run, name) not in (None, but)

    assert wait_until(there, _BACK_S, 0.5), f"{name} is no node of the cluster again: {run.observer.log()}"
    return node_of(run, name) or ""


def noticed(run: Run, node_id: str, since: float) -> str:
    """Wait until Ray counts the node as dead; how it says so."""
    assert wait_until(lambda: bool(run.observer.death_of(node_id)), _SEEN_S, 0.1), f"Ray did not notice {node_id}"
    return f"Ray after {time.monotonic() - since:.1f} s: {run.observer.death_of(node_id)}"


def kill(name: str) -> Fault:
    def inject(run: Run, _: str) -> Taken | None:
        node_id = node_of(run, name)
        if node_id is None:
            return None
        at = time.monotonic()
        run.cluster.kill(name)
        seen = noticed(run, node_id, at)
        run.cluster.begin(name)
        return Taken(at, name, f"{seen}; came back as {back(run, name, node_id)[:8]}", time.monotonic())

    return inject


def cut(name: str, seconds: float) -> Fault:
    def inject(run: Run, _: str) -> Taken | None:
        node_id, ip = node_of(run, name), run.cluster.address(name)
        if node_id is None:
            return None
        at = time.monotonic()
        run.cluster.cut(name)
        assert reaches(run, ip) is None, f"{name} is off the network, but answers"
        while time.monotonic() < at + seconds:
            time.sleep(0.1)
        dead = run.observer.death_of(node_id)
        run.cluster.join(name)
        seen = f"Ray: {dead}" if dead else "Ray had not noticed when it was over"
        if seconds > 30:
            assert dead, f"Ray did not notice that {name} was away for {seconds:.0f} s"
        now = back(run, name, node_id if dead else "")
        return Taken(at, name, f"nothing reached it for {seconds:.0f} s; {seen}; it is {now[:8]}", time.monotonic())

    return inject


def reaches(run: Run, ip: str) -> float | None:
    """Seconds that the control machine takes to connect to Ray's agent at this address; None: it cannot."""
    what = f"import socket, time; began = time.monotonic(); socket.create_connection(({ip!r}, 52365), 2)"
    words = f"{what}; print(time.monotonic() - began)"
    try:
        return float(run.cluster.run("control", run.cluster.python, "-c", words, timeout_s=20))
    except CalledProcessError:
        return None


def pause(name: str, seconds: float) -> Fault:
    def inject(run: Run, _: str) -> Taken | None:
        node_id = node_of(run, name)
        if node_id is None:
            return None
        at = time.monotonic()
        run.cluster.pause(name)
        try:
            seen = noticed(run, node_id, at)
            while time.monotonic() < at + seconds:
                time.sleep(0.1)
        finally:
            run.cluster.resume(name)
        now = back(run, name, node_id)
        return Taken(at, name, f"stopped for {seconds:.0f} s; {seen}; it is {now[:8]}", time.monotonic())

    return inject


def slow(name: str, delay_ms: float, loss_percent: float, seconds: float) -> Fault:
    def inject(run: Run, _: str) -> Taken | None:
        node_id, ip, steps = node_of(run, name), run.cluster.address(name), run.folder / "steps.jsonl"
        if node_id is None:
            return None
        at, before = time.monotonic(), len(lines(steps))
        how = run.cluster.slow(name, delay_ms, loss_percent)
        try:
            took = [found for _ in range(3) for found in [reaches(run, ip)] if found is not None]
            assert took, f"{name} is slow, and does not answer at all"
            assert min(took) > delay_ms / 1000, f"{name} is slow, but answers in {min(took):.3f} s"
            while time.monotonic() < at + seconds:
                time.sleep(0.1)
        finally:
            run.cluster.fast(name)
        made = len(lines(steps)) - before
        now = back(run, name)
        how = f"{delay_ms:g} ms and {loss_percent:g} % loss for {seconds:g} s by {how}, {min(took):.2f} s to connect"
        seen = f"Ray: {run.observer.death_of(node_id)}" if now != node_id else "Ray kept the node"
        return Taken(at, name, f"{how}; {made} training steps meanwhile; {seen}", time.monotonic())

    return inject


for machine in ("rollout", "train"):
    fault(f"{machine} machine slow")(slow(machine, 200, 2, 30))
    fault(f"{machine} machine killed")(kill(machine))
    fault(f"{machine} machine cut off for 5 s")(cut(machine, 5))
    fault(f"{machine} machine cut off for 60 s")(cut(machine, 60))
    fault(f"{machine} machine paused")(pause(machine, 15))


@fault("head machine killed")
def head_killed(run: Run, _: str) -> Taken | None:
    """Ray hears of it when it is back; broker, actors and training go on."""
    node_id = node_of(run, "head")
    actors = {run.supervisor.client(role).get("epoch") for role in ("rollout", "train")}
    if node_id is None or None in actors:
        return None
    at = time.monotonic()
    run.cluster.kill("head")
    assert wait_until(lambda: not run.observer.seen(2.0), 20), "the head is dead, but somebody answers for it"
    run.cluster.begin("head")
    now = back(run, "head", node_id)
    felt = time.monotonic()
    return Taken(at, "head", f"nobody answered; {felt - at:.1f} s later it is node {now[:8]}", felt)


@fault("redis killed")
def redis_killed(run: Run, _: str) -> Taken | None:
    """The tables of the head's GCS are away for 3 s; what it does then is Ray's choice."""
    node_id = node_of(run, "head")
    if node_id is None:
        return None
    at = time.monotonic()
    run.cluster.kill("redis")
    time.sleep(3)
    run.cluster.begin("redis")
    time.sleep(3)
    now = back(run, "head")
    seen = "the head's GCS lived on" if now == node_id else f"the head ended with it, and is node {now[:8]}"
    return Taken(at, "redis", f"it was dead for 3 s; {seen}", time.monotonic())


@fault("shared memory full")
def shared_memory_full(run: Run, _: str) -> Taken | None:
    """The rollout machine's /dev/shm is filled to the last byte for 10 s."""
    node_id = node_of(run, "rollout")
    if node_id is None:
        return None
    at = time.monotonic()
    run.cluster.fill_memory("rollout")
    left = run.cluster.run("rollout", "df", "--output=avail", "/dev/shm", root=True).split()[-1]
    assert left == "0", f"{left} KB are left"
    time.sleep(10)
    dead = run.observer.death_of(node_id)
    if not run.cluster.ended("rollout"):
        run.cluster.run("rollout", "rm", "-f", "/dev/shm/ballast", root=True)
    now = back(run, "rollout", node_id if dead else "")
    seen = f"Ray: {dead}" if dead else "Ray's node lived on"
    return Taken(at, "rollout", f"0 KB were left for 10 s; {seen}; it is {now[:8]}", time.monotonic())
