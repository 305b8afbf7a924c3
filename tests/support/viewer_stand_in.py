"""A stand-in for ops.viewer.Viewer: a real ledger in this process, whose figures, events and errors are the real ones;
in place of Ray, broker and vaults stand this object, its counters and its switches."""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from slime.cross_job.ledger import Ledger
from slime.cross_job.ledger.history import PROGRESS
from slime.cross_job.types import ClientInfo, Payload

HOSTILE = [
    "<script>window.__pwned = 'script'</script>",
    "</script><script>window.__pwned = 'closed'</script><img src=x onerror=\"window.__pwned='img'\">",
    "<!--<script>window.__pwned = 'comment'//",
    "<svg onload=\"window.__pwned='svg';alert(1)\"><a href=\"javascript:window.__pwned='link'\">x</a></svg>",
    "<img src=http://203.0.113.7/leak.png><link rel=stylesheet href=http://203.0.113.7/leak.css>",
    "\x1b[31mred\x1b]0;title\x07\x1b[2J bell and erase",
    "\u202egnp.exe\u202c \u2066isolated\u2069 \u200bzero\ufeffwidth \U000e0041tag",
    "lone \ud800 surrogates \udfff",
    "nul \x00 and del \x7f and \x85",
    "'\"`${window.__pwned = 'template'}` {{7*7}} &lt;b&gt; &#x27;",
]
"""What a model may have generated."""


class ViewerStandIn:
    """See the module. `ledger` may be used by one thread while `lock` is held."""

    address = "10.0.0.1:6379"
    namespace = "stand-in"

    def __init__(self) -> None:
        self.ahead_s = 0.0  # of the real clocks
        self.ledger = Ledger(lambda: time.monotonic() + self.ahead_s, wall=self.now)
        self.lock = threading.RLock()
        self.calls: list[str] = []
        self.error: Exception | None = None  # raised by every call, as by a broker that is gone
        self.hangs: threading.Event | None = None  # every call waits for it, as for a broker that restarts
        self.texts: Callable[[int], dict[str, Any]] = lambda row: {
            "prompt": f"prompt {row}",
            "response": f"answer {row}",
        }
        self.num_samples = 8

    # ------------------------------------------------------------------ what a Viewer has

    def jobs(self) -> dict[str, dict[str, Any]]:
        return self._say("jobs", lambda: self.ledger.status())

    def status(self, job_id: str) -> dict[str, Any]:
        return self._say("status", lambda: self.ledger.status(job_id)[job_id])

    def the_job(self, job_id: str | None) -> str:
        return job_id or next(iter(self.ledger.jobs))

    def look(
        self, job_id: str, since: int = -1, limit: int = PROGRESS, events_since: int = 0, spans: bool = False
    ) -> dict[str, Any]:
        found = self._say(
            "look", lambda: self.ledger.look(job_id, since=since, limit=limit, events_since=events_since)
        )
        found["progress"] = [{"rollout_id": r, **asdict(known)} for r, known in found["progress"]]
        found["events"] = [{"number": number, **asdict(event)} for number, event in found["events"]]
        return found

    def detail(self, job_id: str, rollout_id: int) -> dict[str, Any]:
        return self._say("detail", lambda: self.ledger.detail(job_id, rollout_id))

    def samples(
        self, job_id: str, rollout_id: int, version: int | None = None, first: int = 0, count: int = 3
    ) -> dict[str, Any]:
        from slime.cross_job.vault.preview import shown

        def cut() -> dict[str, Any]:
            self.ledger.get(job_id, rollout_id, version)
            rows = range(first, min(self.num_samples, first + count))
            samples = [
                {"index": r, "part": 0, "values": {k: shown(v) for k, v in self.texts(r).items()}} for r in rows
            ]
            return {"num_samples": self.num_samples, "columns": {}, "samples": samples}

        return self._say("samples", cut)

    def steer(self, operation: str, job_id: str, *args: Any) -> Any:
        return self._say(f"steer {operation}", lambda: getattr(self.ledger, operation)(job_id, *args))

    def foresee(self, operation: str, job_id: str, *args: Any) -> Any:
        return self._say(f"foresee {operation}", lambda: self.ledger.foresee(job_id, operation, *args))

    def _say(self, what: str, answer: Callable[[], Any]) -> Any:
        self.calls.append(what)
        if self.hangs is not None and not self.hangs.wait(30):
            raise AssertionError("nobody let the stand-in go on")
        if self.error is not None:
            raise self.error
        with self.lock:
            return answer()

    # ------------------------------------------------------------------ what happens to its job

    def now(self) -> float:
        return time.time() + self.ahead_s

    def run(self, rollouts: int, job: str = "exp", seed: int = 0) -> None:
        """So many rollouts are trained on: a reward that rises, a producer that is slower at first; ends about now."""
        chance = random.Random(seed)
        self.ahead_s = -7.0 * rollouts
        for r in range(rollouts):
            self.demand(r, job=job)
            known = self.ledger.jobs[job].progress.get(r)
            if known is None or known.state == "demanded":
                self.ledger.next_demand(f"p-{job}")
            self.ahead_s += (generated := 3 + 2 * chance.random())
            self.ledger.views.note_wait(f"c-{job}", "claim", generated)
            reward = 0.95 / (1 + 2.0 ** (6 - 12 * r / rollouts)) + 0.04 * chance.random()
            self.make(r, job=job, meta={"reward": reward}, weight_version=max(0, r - chance.choice((0, 0, 0, 1, 2))))
            self.ledger.claim(f"c-{job}", r)
            self.ahead_s += (trained := 1.5 + 2 * chance.random())
            self.ledger.views.note_wait(f"p-{job}", "next_demand", 0.3 * trained)
            self.train(r, job=job)
            self.ledger.heartbeat(f"p-{job}", f"generates rollout {r + 1}")
            self.ledger.heartbeat(f"c-{job}", f"trains on rollout {r}")
        self.ahead_s = 0.0 if self.ahead_s < 0 else self.ahead_s

    def begin(self, job: str = "exp", **settings: Any) -> "ViewerStandIn":
        """Both jobs attach."""
        for name, role, host in (("p", "producer", "node-a"), ("c", "consumer", "node-b")):
            facts: dict[str, Any] = {
                "ray_job_id": f"0{len(name)}000000",
                "submission_id": f"raysubmit_{role}",
                "host": host,
            }
            group = "train" if role == "consumer" else ""
            info = ClientInfo(f"{name}-{job}", job, role, group=group, pid=4711, **facts)
            self.ledger.membership.attach(info, **{"max_ahead": 2, "retain": 4, **settings})
        return self

    def demand(self, *rollout_ids: int, job: str = "exp") -> None:
        for rollout_id in rollout_ids:
            self.ledger.demand(f"c-{job}", rollout_id)

    def make(self, rollout_id: int, job: str = "exp", **facts: Any) -> None:
        """The next demand is handed out, and this rollout published."""
        if rollout_id in self.ledger.jobs[job].demands:
            self.ledger.next_demand(f"p-{job}")
        facts = {"nbytes": 1_250_000, "num_samples": 8, "weight_version": rollout_id, "meta": {"reward": 0.5}, **facts}
        payload = Payload(f"{job}-{rollout_id}-{time.monotonic_ns()}", "vault/1", made_at=self.now() - 0.02, **facts)
        self.ledger.publish(f"p-{job}", rollout_id, payload)

    def train(self, rollout_id: int, job: str = "exp", ack: bool = True) -> None:
        if rollout_id not in self.ledger.jobs[job].groups["train"].leases:
            self.ledger.claim(f"c-{job}", rollout_id)
        if ack:
            self.ledger.put_value(
                f"c-{job}", "weights", Payload(f"w{job}{rollout_id}", "vault/1", 1000), rollout_id + 1
            )
            self.ledger.ack(f"c-{job}", rollout_id)

    def forget(self, job: str = "exp") -> None:
        """The job is gone, as from a broker whose memory died."""
        self.ledger.jobs.pop(job, None)
        for client_id in [c for c, client in self.ledger.clients.items() if client.info.job_id == job]:
            del self.ledger.clients[client_id]
