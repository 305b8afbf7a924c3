"""The broker: a thin Ray shell around the ledger. Detached, named, one per namespace; it never sees a payload.

It adds to the ledger what needs a running process: waiting (long polls that end when something changed), the watch
over silent clients and over vaults (it asks Ray whether they are gone), telling vaults what they may free, and memory:
a change is kept in vaults before it is answered (replicas.py), and a broker that restarts begins with what they kept.
Undecorated, so that it can be tested without Ray; `connection.py` makes the actor.
"""

import asyncio
import contextlib
import logging
import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from ..errors import BadInput, BrokerLost, CrossJobError, JobIdTaken, PayloadLost
from ..ledger import Ledger
from ..ledger.operations import Operation
from ..ledger.state import DEAD, SILENT, Client
from ..types import PROTOCOL, VAULT_NAME, ClientInfo, Located, LocatedValue, ids_text
from ..vault.protocol import Durably
from .durability import BEAT_S, COLLECT_S, REPLACED, Durability
from .exporter import Exporter
from .liveness import JOB_IS, ask_ray, is_over, job_words, over_reason
from .replicas import Replicas, alive_nodes, answer_of, in_a_line

logger = logging.getLogger(__name__)

_WATCH_EVERY_S = 0.5
_COMPLETE_EVERY_S = 2.0
_COMPLETE_AGAIN_S = 60.0  # after which what did not succeed is tried again
_STOOD_STILL_S = 0.5  # by which a round of that watch is late where this process was stopped, or had no CPU
_ASK_RAY_AFTER_S = 2.0  # silence after which Ray is asked about a client
_RAY_ANSWERS_S = 10.0  # within which it tells, or nobody can
_ASK_AGAIN_S = 5.0  # about a client whose lease is over
_VAULTS_EVERY_S = 5.0
_IDLE_S = 600.0  # after which a vault ends that nobody needs, so that its node may be scaled down
_IDLE_EVERY_S = 60.0
_SILENT_S = 3.0  # after which a vault is named while the broker begins
_FAILURES = 3  # to begin, after which clients are told
_JOB_ENDS_S = 6  # within which Ray knows how the job of a process that is gone has ended


class Broker:
    """See the module. Every method is a coroutine on one event loop, so that the ledger needs no lock."""

    def __init__(self, namespace: str, protocol: int = PROTOCOL):
        self._namespace = namespace
        self._protocol = protocol
        self._given_up: set[str] = set()  # names of vaults
        self._anew()
        self._changed = asyncio.Event()
        self._drops: dict[str, list[str]] = defaultdict(list)
        self._tried: dict[str, float] = {}  # complete jobs -> when they may be closed or forgotten again
        self._tasks: set[asyncio.Task[None]] = set()
        self._begun: asyncio.Task[None] | None = None
        self._began_at = 0.0
        self._failures, self._failure = 0, ""  # to begin: how many, one after the other, and the last one
        self._gcs_survives: bool | None = None
        self._asking: set[str] = set()  # clients about which Ray is being asked
        self._ticked_at: float | None = None

    async def hello(self) -> dict[str, Any]:
        """Who is here: {"protocol", "namespace", "actor_id", "gcs_survives": whether Ray's GCS comes back when it
        ends (None: nobody knows)}.
        Begins, with what the vaults remember.

        Raises:
            BrokerLost: it failed to begin, several times; it goes on trying.
        """
        begun = self._beginning()
        while not begun.done():
            if self._failures >= _FAILURES:
                raise BrokerLost(self._how_it_begins())
            await asyncio.wait([begun], timeout=1.0)
        actor_id = ray.get_runtime_context().get_actor_id()
        return {
            **{"protocol": self._protocol, "namespace": self._namespace, "actor_id": actor_id},
            "gcs_survives": self._gcs_survives,
        }

    async def starting(self) -> dict[str, Any] | None:
        """None: it has begun, and answers. Else, at once, what it waits for while it begins: {"waits_for": [{"vault",
        "node_id", "silent_s"}], "since_s": how long it has been at it, "failures": how often it had to begin again,
        "stuck": whether it takes longer than it should, "message": all of it in words}."""
        if self._beginning().done():
            return None
        since_s = asyncio.get_running_loop().time() - self._began_at
        return {
            "waits_for": self._replicas.waits_for(),
            "since_s": since_s,
            "failures": self._failures,
            "stuck": self._failures >= _FAILURES or bool(self._silent_vaults()),
            "message": self._how_it_begins(),
        }

    async def give_up(self, vault: str) -> None:
        """Begin without this vault, which is silent: what only it knows is lost, unless it answers again.

        Raises:
            BadInput: the broker does not wait for a vault of this name.
        """
        if self._beginning().done():
            raise BadInput(f"the broker of namespace {self._namespace!r} has begun: it waits for no vault")
        self._replicas.give_up(vault)

    async def unanswered(self) -> list[str]:
        """Names of vaults for which it waits now, at once: what changes is kept there before it is answered."""
        return self._replicas.unanswered()

    async def attach(self, info: ClientInfo, settings: dict[str, Any]) -> dict[str, Any]:
        """Membership.attach; a producer that stands in the way is first checked with Ray, not only by its heartbeat.

        Raises Fenced, too: another broker keeps the job in its durable store, and is alive."""
        await self.hello()
        await self._replicas.know(f"{VAULT_NAME}_{info.node_id}")  # which may not have introduced itself yet
        if settings.get("store") is not None:
            await self._durability.open(info.job_id, settings["store"])
        try:
            granted = self._ledger.membership.attach(info, **settings)
        except JobIdTaken:
            if not await self._are_over([self._ledger.jobs[info.job_id].producer]):
                raise
            granted = self._ledger.membership.attach(info, **settings)
        logger.info(
            "job %s: %s attached, epoch %d (Ray job %s)", info.job_id, info.role, granted["epoch"], info.ray_job_id
        )
        mark = self._ledger.jobs[info.job_id].mark = self._durability.marks.get(info.job_id, "")
        await self._changed_in(info.job_id)
        return {**granted, "mark": mark}

    async def recall(self, job_id: str, client_id: str, uri: str) -> None:
        """The broker forgot this client, with the vaults that kept its memory: it reads what the store at `uri` says
        of the job.

        Raises:
            Fenced: another broker keeps the job there, and is alive.
        """
        await self.hello()
        if client_id not in self._ledger.clients:
            await self._durability.open(job_id, uri)

    async def call(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        """Carry out a ledger operation by name."""
        await self.hello()
        ask = self._operation(operation)
        named = self._ledger.jobs.get(args[0]) if operation == "forget" else None
        await self._note_sign_of_life(operation, *args)
        try:
            result = ask(*args, **kwargs)
        except JobIdTaken:  # a consumer resumes a group in which another one lives
            mine = self._ledger.clients[args[0]]
            group = [c for c in self._ledger.clients.values() if c.attached and c.info.group == mine.info.group]
            if not await self._are_over([c for c in group if c is not mine and c.info.job_id == mine.info.job_id]):
                raise
            result = ask(*args, **kwargs)
        if self._declared(operation).changes:
            if operation == "forget":
                await self._forget(args[0], named.store if named is not None else None)
            else:
                await self._changed_by(operation, *args)
        return await self._with_its_job(result) if operation == "peer_verdict" else result

    async def wait(self, wait_s: float, operation: str, *args: Any, **kwargs: Any) -> Any:
        """Like `call`, asked again at every change until it finds something; None after `wait_s` seconds."""
        await self.hello()
        ask, loop = self._operation(operation), asyncio.get_running_loop()
        await self._note_sign_of_life(operation, *args)
        deadline = loop.time() + wait_s
        while (found := ask(*args, **kwargs)) is None:
            left = deadline - loop.time()
            if left <= 0:
                return None
            began = loop.time()
            with contextlib.suppress(asyncio.TimeoutError):  # a second at most: some answers change with time alone
                await asyncio.wait_for(self._changed.wait(), min(left, 1.0))
            self._ledger.views.note_wait(str(args[0]), operation, loop.time() - began)
        if self._declared(operation).changes:
            await self._changed_by(operation, *args)
        return found

    async def unreadable(self, client_id: str, rollout_id: int, vault: str, token: str) -> bool:
        """A consumer cannot read what it claimed. Returns whether it is lost: then its lease ended, and the rollout is
        generated again; else the vault has it, and it may try again."""
        await self.hello()
        lost = False
        name = vault.partition("/")[0]
        try:
            if name.rpartition("_")[2] not in await alive_nodes():
                raise PayloadLost(f"the node of {name} is gone")
            handle = await asyncio.to_thread(ray.get_actor, name, namespace=self._namespace)
            await answer_of(handle.check.remote(token), 30)
        except ray.exceptions.RayTaskError as error:
            lost = isinstance(error.cause, PayloadLost)
        except (ValueError, ray.exceptions.ActorDiedError, PayloadLost):
            lost = True
        except (ray.exceptions.RayError, asyncio.TimeoutError) as error:
            logger.warning(
                "%s is silent (%s): nobody can tell whether it holds rollout %d", vault, in_a_line(error), rollout_id
            )
        if lost:
            job_id = self._ledger.clients[client_id].info.job_id
            if what := self._ledger.rollouts.payload_lost(job_id, token):
                logger.error("job %s: %s is lost, with its vault %s", job_id, what, vault)
            await self.call("unreadable", client_id, rollout_id)
        return lost

    async def vault_here(self, name: str, incarnation: str) -> None:
        """A vault was started or restarted: what an earlier incarnation held is lost."""
        await self.hello()
        await self._vault_is(name, incarnation)
        await self._replicas.vault_here(name)
        await asyncio.gather(*map(self._keep, [*self._ledger.jobs]))

    async def collect(self) -> int:
        """Free, now, what nobody knows of in the durable stores of the jobs that are kept here; how much that was."""
        await self.hello()
        return await self._durability.collect()

    # ------------------------------------------------------------------ inside

    def _beginning(self) -> asyncio.Task[None]:
        if self._begun is None:
            loop = asyncio.get_running_loop()
            self._begun, self._began_at = loop.create_task(self._begin()), loop.time()
        return self._begun

    def _anew(self) -> None:
        """An empty memory, to begin with."""
        self._ledger = Ledger()
        self._durability = Durability(self._ledger, "")
        self._replicas = Replicas(self._namespace, self._ledger, self._durability, self._given_up)

    def _silent_vaults(self) -> list[dict[str, Any]]:
        return [vault for vault in self._replicas.waits_for() if vault["silent_s"] > _SILENT_S]

    def _how_it_begins(self) -> str:
        """In words: what it waits for, or why it cannot begin."""
        loop = asyncio.get_running_loop()
        words = f"the broker of namespace {self._namespace!r} began {loop.time() - self._began_at:.0f} s ago"
        if self._failures >= _FAILURES:
            return (
                f"{words}, failed {self._failures} times, and tries again: {self._failure}. See the log of "
                "actor slime_cross_job_broker (`ray logs`), and slime-cross-job doctor"
            )
        silent = self._silent_vaults()
        if not silent:
            return f"{words}, and reads what {len(self._replicas.waits_for())} vaults keep"
        who = ", ".join(f"{v['vault']} on node {v['node_id']} (silent for {v['silent_s']:.0f} s)" for v in silent)
        return (
            f"{words}, and waits for what is kept by {who}: Ray calls it alive. The broker goes on as soon as the "
            "vault answers. If it never will, end the process of the vault, or go on without it: slime-cross-job "
            f"give-up {silent[0]['vault']}"
        )

    async def _begin(self) -> None:
        """Go on where the broker before this one was. What fails is tried again, in this process, which counts the
        failures and can tell of them: one that Ray restarts knows nothing of those of before."""
        while True:
            try:
                await self._try_to_begin()
                return
            except Exception as error:  # whatever it is, to begin without memory would lose what it said
                self._failures, self._failure = self._failures + 1, f"{type(error).__name__}: {error}"
                logger.exception("the broker cannot begin, and tries again")
                await self._replicas.stop()
                await asyncio.sleep(min(30.0, 2.0 ** min(self._failures - 1, 5)))
                self._anew()

    async def _try_to_begin(self) -> None:
        await self._know_the_cluster()
        missing = await self._replicas.restore()
        for job_id, rollouts in missing.items():
            logger.error("job %s: lost, because no vault holds them any more: %s", job_id, ids_text(rollouts))
        exporter = Exporter(self._ledger)  # what happened until now was exported before
        for job_id in self._ledger.jobs:
            self._ledger.history.note_event(job_id, "restarted", "the broker was restarted, and goes on where it was")
        self._ticked_at = None
        watches = (self._watch_clients, self._watch_silence, self._watch_vaults, self._watch_stores, self._collect)
        for name in [*self._given_up]:
            self._spawn(self._wait_for_given_up(name))
        for watch in (*watches, self._watch_idle_vaults, self._watch_complete, exporter.watch):
            self._spawn(self._forever(watch))
        self._wake()

    async def _know_the_cluster(self) -> None:
        """Its name is that of Ray's session, which outlives this process, and a head with a fault-tolerant GCS."""
        nodes = await asyncio.to_thread(ray.nodes)
        context = ray.get_runtime_context()
        here: dict[str, Any] = next((node for node in nodes if node["NodeID"] == context.get_node_id()), {})
        if "node:__internal_head__" in here.get("Resources", {}):  # whose environment is that of the GCS
            self._gcs_survives = bool(os.environ.get("RAY_REDIS_ADDRESS"))
        if hasattr(context, "get_session_name"):
            cluster = context.get_session_name()
        else:  # Ray 2.47: .../SESSION/sockets/raylet
            cluster = Path(nodes[0]["RayletSocketName"]).parts[-3]
        self._durability.me = f"{self._namespace}/{cluster}"

    async def _over_reason(self, info: ClientInfo, silent_s: float = 0.0) -> str | None:
        """See liveness.over_reason. None also where Ray does not answer in time."""
        try:
            return await asyncio.wait_for(ask_ray(over_reason, info, silent_s), _RAY_ANSWERS_S)
        except asyncio.TimeoutError:
            logger.warning("job %s: Ray does not say within %g s whether %s lives", info.job_id, _RAY_ANSWERS_S, info)
        except Exception:  # whatever Ray throws, the client may live, and others are asked about
            logger.exception("job %s: Ray cannot tell whether %s lives", info.job_id, info)
        return None

    def _operation(self, name: str) -> Callable[..., Any]:
        if name not in self._ledger.operations:
            raise AttributeError(f"the broker has no operation {name!r}")
        return self._ledger.operations[name]

    def _declared(self, name: str) -> Operation:
        found: Operation = self._operation(name).operation  # type: ignore[attr-defined]
        return found

    async def _note_sign_of_life(self, operation: str, first: str = "", *_: Any) -> None:
        """Who asks is alive, before anything else: while it waits for the answer, nobody takes what it holds."""
        how = self._declared(operation)
        if not how.of_job and not how.proxied and self._ledger.membership.heard(first):
            await self._changed_in(self._ledger.clients[first].info.job_id)

    async def _changed_by(self, operation: str, first: str, *_: Any) -> None:
        if self._declared(operation).of_job:
            await self._changed_in(first)
        elif first in self._ledger.clients:  # else one that nobody remembers has ended
            await self._changed_in(self._ledger.clients[first].info.job_id)

    async def _forget(self, job_id: str, uri: str | None) -> None:
        """The ledger has forgotten this job, which had this store."""
        try:
            await self._replicas.forget(job_id, uri)
        finally:
            self._wake()

    async def _changed_in(self, job_id: str) -> None:
        """Keep the change, then let everybody know: what was answered is never forgotten."""
        await self._replicas.keep(job_id)
        self._wake()

    async def _keep(self, job_id: str) -> None:
        """Keep what nobody waits for; where the durable store does not answer, it is kept with what comes next."""
        try:
            await self._replicas.keep(job_id)
        except CrossJobError as error:
            logger.error("job %s: %s", job_id, error)

    async def _keep_and_wake(self, job_id: str) -> None:
        await self._keep(job_id)
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        for vault, token in self._ledger.garbage.take_drops():
            self._drops[vault.partition("/")[0]].append(token)
        if self._drops:
            self._spawn(self._tell_vaults())
        if self._durability.may_free:
            self._spawn(self._durability.free())

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(self._tasks.discard)

    async def _tell_vaults(self) -> None:
        drops, self._drops = self._drops, defaultdict(list)
        for vault, tokens in drops.items():
            try:
                handle = await asyncio.to_thread(ray.get_actor, vault, namespace=self._namespace)
                await answer_of(handle.drop.remote(tokens), 30)
            except (ValueError, ray.exceptions.ActorDiedError):
                logger.info("vault %s is gone, and with it %d payloads that were to be freed", vault, len(tokens))
            except (ray.exceptions.RayError, asyncio.TimeoutError) as error:
                logger.warning(
                    "vault %s is silent (%s): %d payloads are freed later", vault, in_a_line(error), len(tokens)
                )
                self._drops[vault].extend(tokens)

    async def _are_over(self, clients: list[Client | None]) -> bool:
        """Whether Ray says of any of these clients that it cannot be alive; it is then counted as dead."""
        return any(await asyncio.gather(*(self._is_over(client) for client in clients if client is not None)))

    async def _is_over(self, client: Client) -> bool:
        reason = await self._over_reason(client.info, self._ledger.membership.silent_s(client))
        if reason == "":
            self._ledger.membership.vouch(client)
        elif reason and client.attached:
            crashed = "its node " not in reason and f"{JOB_IS}STOPPED" not in reason
            self._ledger.membership.end(client.info.client_id, DEAD, reason, crashed)
            logger.warning("job %s: %s is dead: %s", client.info.job_id, client.info.role, reason)
            if not is_over(reason):
                self._spawn(self._add_its_job(client))
        return not client.attached

    async def _add_its_job(self, client: Client) -> None:
        """Ray knows that a process is gone some seconds before it knows how its job ended: say that, too."""
        reason, words = client.reason, ""
        for _ in range(_JOB_ENDS_S):
            words = await _job_of(client.info.ray_job_id)
            if is_over(words):
                break
            await asyncio.sleep(1)
        if client.reason != reason:
            return  # it was told otherwise meanwhile
        if words and JOB_IS not in reason:
            client.reason = f"{reason}; {words}"
        elif words:
            client.reason = f"{reason.partition(JOB_IS)[0]}{words}"
        await self._keep(client.info.job_id)

    async def _with_its_job(self, verdict: dict[str, Any]) -> dict[str, Any]:
        """A verdict on a client that is not through, with what Ray says of its job."""
        if verdict["kind"] not in ("alive", "slow", "silent", "dead") or JOB_IS in verdict["message"]:
            return verdict
        if verdict.get("reason") == REPLACED:  # another job has that id here: each cluster counts its jobs from 1
            return verdict
        words = await _job_of(verdict["ray_job_id"])
        return {**verdict, "message": f"{verdict['message']}; {words}"} if words else verdict

    async def _watch_clients(self) -> None:
        """End leases on time. It waits for nothing else, so that a late round means that this process stood still."""
        await asyncio.sleep(_WATCH_EVERY_S)
        late = self._ledger.membership.tick(self._stood_still_s())
        expired = self._ledger.lifetime.expire()
        for job_id in {*expired, *(client.info.job_id for client in late)}:
            self._spawn(self._keep_and_wake(job_id))  # one whose store is away holds up no other
        if late or self._drops:
            self._wake()

    def _stood_still_s(self) -> float:
        """For how long this process did nothing since the last round, though it was due; 0 where it was on time."""
        now = asyncio.get_running_loop().time()
        late_s = 0.0 if self._ticked_at is None else max(0.0, now - self._ticked_at - _WATCH_EVERY_S)
        self._ticked_at = now
        if late_s < _STOOD_STILL_S:
            return 0.0
        logger.warning("this broker stood still for %.1f s: no lease ends because of that", late_s)
        return late_s

    async def _watch_silence(self) -> None:
        """Ask Ray about clients that are silent: each in a task of its own, so that none holds up another."""
        await asyncio.sleep(_WATCH_EVERY_S)
        for client in self._ledger.membership.silent(_ASK_RAY_AFTER_S):
            if client.info.client_id not in self._asking:
                self._asking.add(client.info.client_id)
                self._spawn(self._ask_about(client))

    async def _ask_about(self, client: Client) -> None:
        try:
            if await self._is_over(client):
                await self._keep(client.info.job_id)
                self._wake()
            elif client.state == SILENT:
                await asyncio.sleep(_ASK_AGAIN_S)
        finally:
            self._asking.discard(client.info.client_id)

    async def _watch_vaults(self) -> None:
        await asyncio.sleep(_VAULTS_EVERY_S)
        nodes = await alive_nodes()
        await asyncio.gather(*(self._look_at_vault(name, nodes) for name in self._ledger.rollouts.vaults()))
        self._spawn(self._replicas.forget_again())

    async def _watch_idle_vaults(self) -> None:
        """End vaults that hold nothing, on nodes where no client is; not that of the broker's own node."""
        await asyncio.sleep(_IDLE_EVERY_S)
        for name in self._replicas.vaults():  # one after the other: what one keeps goes to those that stay
            if not self._is_needed(name):
                await self._end_if_idle(name)

    async def _end_if_idle(self, name: str) -> None:
        try:
            if not await self._replicas.is_idle(name, _IDLE_S):
                return
            await self._have_a_vault_here()
            if await self._replicas.retire(name, _IDLE_S, lambda: self._is_needed(name)):
                logger.info("vault %s has ended: it held nothing, and no client is on its node", name)
        except (CrossJobError, ray.exceptions.RayError, asyncio.TimeoutError) as error:
            logger.warning("vault %s, which holds nothing, does not end yet: %s", name, in_a_line(error))

    async def _have_a_vault_here(self) -> None:
        """On the broker's node, which stays, its memory may lie as well."""
        from ..vault.actor import vault_actor

        node_id = ray.get_runtime_context().get_node_id()
        if (here := f"{VAULT_NAME}_{node_id}") not in self._replicas.vaults():
            await answer_of(vault_actor(here, self._namespace, node_id).hello.remote())
            await self._replicas.know(here)

    def _is_needed(self, vault: str) -> bool:
        """Whether a client may need this vault, or it is that of the broker's node, as far as the ledger knows."""
        nodes = {c.info.node_id for c in self._ledger.clients.values() if c.attached}
        nodes.add(ray.get_runtime_context().get_node_id())
        return vault.rpartition("_")[2] in nodes or vault in self._ledger.rollouts.vaults()

    async def _wait_for_given_up(self, name: str) -> None:
        while name in self._given_up:
            try:
                if await self._replicas.answers_again(name):
                    for job_id in self._ledger.jobs:
                        self._spawn(self._keep_and_wake(job_id))
            except Exception:  # whatever Ray answers; the next round tries again
                logger.exception("cannot tell whether vault %s, which was given up, answers again", name)
                await asyncio.sleep(_VAULTS_EVERY_S)

    async def _watch_stores(self) -> None:
        await asyncio.sleep(BEAT_S)
        await self._durability.beat()
        for job_id in self._durability.take_let_go():
            self._spawn(self._replicas.let_go(job_id))
        for job_id, held in self._durability.take_emptied().items():
            self._spawn(self._store_again(job_id, held))

    async def _watch_complete(self) -> None:
        """Close the stores of jobs that are through, and forget those that have been for as long as they say; delete
        what forgotten jobs have left in a store that failed."""
        await asyncio.sleep(_COMPLETE_EVERY_S)
        now = asyncio.get_running_loop().time()
        for job_id, is_old in self._ledger.lifetime.through().items():
            job = self._ledger.jobs[job_id]
            is_open = self._durability.is_open(job_id) or (job.store is not None and not job.closed)
            if (is_old or is_open) and self._tried.get(job_id, 0.0) <= now:
                self._tried[job_id] = now + _COMPLETE_AGAIN_S
                self._spawn(self._forget_old(job_id, job.store) if is_old else self._close(job_id))
        for job_id in self._durability.left:
            if self._tried.get(job_id, 0.0) <= now:
                self._tried[job_id] = now + _COMPLETE_AGAIN_S
                self._spawn(self._durability.delete_left(job_id))
        self._tried = {job_id: at for job_id, at in self._tried.items() if at > now}

    async def _close(self, job_id: str) -> None:
        try:
            await self._replicas.close(job_id)
            logger.info("job %s: it is complete, and its durable store is not asked any more", job_id)
        except CrossJobError as error:
            logger.warning("job %s: it is complete, and its durable store cannot be closed yet: %s", job_id, error)

    async def _forget_old(self, job_id: str, uri: str | None) -> None:
        try:
            self._ledger.lifetime.forget(job_id)
            logger.info("job %s: it has been complete for long enough, and is forgotten", job_id)
            await self._forget(job_id, uri)
        except CrossJobError as error:
            logger.warning("%s", error)

    async def _store_again(self, job_id: str, held: list[Located | LocatedValue]) -> None:
        """The store of this job has lost what vaults hold. Where one does not answer, that counts as unstored."""
        await self._keep_and_wake(job_id)
        job = self._ledger.jobs.get(job_id)
        if job is None or job.store is None:
            return
        durably = Durably(job.store, job_id, job.compression, behind=True)
        by_vault = defaultdict(list)
        for record in held:
            by_vault[record.payload.vault.partition("/")[0]].append(record)
        for name, records in by_vault.items():
            try:
                handle = await asyncio.to_thread(ray.get_actor, name, namespace=self._namespace)
                await answer_of(handle.store_again.remote(durably, records), 30)
            except (ValueError, ray.exceptions.RayError, asyncio.TimeoutError) as error:
                logger.warning(
                    "job %s: %s does not store %d payloads again: %s", job_id, name, len(records), in_a_line(error)
                )

    async def _collect(self) -> None:
        await asyncio.sleep(COLLECT_S)
        await self._durability.collect()

    async def _look_at_vault(self, name: str, nodes: set[str]) -> None:
        incarnation = ""
        if name.rpartition("_")[2] in nodes:
            try:
                handle = await asyncio.to_thread(ray.get_actor, name, namespace=self._namespace)
                incarnation = (await answer_of(handle.hello.remote(), 30))["incarnation"]
            except (ValueError, ray.exceptions.ActorDiedError):
                pass
            except (ray.exceptions.RayError, asyncio.TimeoutError) as error:
                logger.warning("vault %s is silent, but Ray calls it alive: %s", name, in_a_line(error))
                return
        if not incarnation:
            self._replicas.vault_gone(name)
        await self._vault_is(name, incarnation)

    async def _vault_is(self, name: str, incarnation: str) -> None:
        """What this vault's other incarnations held is lost; none at all lives where `incarnation` is empty."""
        lost = self._ledger.rollouts.vault_lost(name, incarnation)
        for job_id, what in lost.items():
            logger.error("job %s: vault %s died, and with it %s", job_id, name, ", ".join(what))
            self._ledger.history.note_event(job_id, "vault died", f"{name}, and with it {', '.join(what)}")
            self._spawn(self._keep_and_wake(job_id))

    async def _forever(self, watch: Callable[[], Any]) -> None:
        while True:
            try:
                await watch()
            except Exception:  # the watch must outlive whatever Ray answers; the next round tries again
                logger.exception("a watch of the broker failed, and goes on")


async def _job_of(ray_job_id: str) -> str:
    """How this Ray job stands, in words; empty where nobody can tell."""
    try:
        found = await asyncio.wait_for(ask_ray(job_words, ray_job_id), _RAY_ANSWERS_S)
    except Exception as error:  # whatever the state API makes of a dashboard that is not there
        logger.info("Ray cannot tell about Ray job %s: %s", ray_job_id, error)
        return ""
    return found[1] if found else ""
