"""The broker's memory without a cluster: kept before anybody is answered, by whoever is quick (ray_stand_in.py)."""

import asyncio
import time
from typing import Any

import pytest
import ray

from slime.cross_job.broker import replicas as replicas_module
from slime.cross_job.broker.replicas import Replicas
from slime.cross_job.errors import BadInput, NotKept, StoreUnreachable
from slime.cross_job.ledger import Ledger
from slime.cross_job.types import BROKER_NAME
from slime.cross_job.vault import actor as vault_module
from slime.cross_job.vault.actor import Vault
from tests.support.ledger import attach, ends_at, publish
from tests.support.ray_stand_in import NAMESPACE, OTHER, VAULT, Troubled, settle, unavailable

THIRD = "slime_cross_job_vault_3"
ALL = (VAULT, OTHER, THIRD)
Trouble = Exception | float | None


@pytest.fixture
def ledger(loop) -> Ledger:
    made = Ledger(loop.time, loop.time)
    attach(made, "p")
    return made


@pytest.fixture
def replicas(ray_stand_in, ledger) -> Replicas:
    return Replicas(NAMESPACE, ledger)


@pytest.fixture
def vaults(ray_stand_in, replicas):
    """Make vaults, each with its troubles in `remember`, and let the owner know them."""

    async def make(*troubles: list[Trouble]) -> list[Troubled]:
        made = [Troubled(name, remember=found) for name, found in zip(ALL, troubles)]
        ray_stand_in.actors |= {vault._name: vault for vault in made}
        for vault in made:
            await replicas.vault_here(vault._name)
        return made

    return make


def serials(vault: Troubled) -> list[int]:
    """Which snapshots this vault was told, in order."""
    return [snapshot.serial for snapshot in vault.told("remember")]


def newest(vault: Vault) -> Any:
    """(snapshot, tables) of the job in this vault."""
    return vault._snapshots["exp"]


def sources_of(vault: Vault) -> Any:
    return newest(vault)[1]["sources"]


# ---------------------------------------------------------------------- before anybody is answered


async def test_a_change_is_kept_when_it_is_answered(replicas, vaults, ledger):
    one, other = await vaults([], [])
    ledger.demand(attach(ledger, "c"), 3)
    await replicas.keep("exp")
    for vault in (one, other):
        snapshot, _ = newest(vault)
        assert snapshot.job.demands == {3}
        assert [client.info.client_id for client in snapshot.clients] == ["p", "c"]


async def test_a_snapshot_is_what_was_not_what_has_become_of_it(replicas, vaults, ledger, loop):
    (one,) = await vaults([5.0])
    attach(ledger, "c")
    keeping = loop.create_task(replicas.keep("exp"))
    await settle()
    ledger.demand("c", 3)  # while it is under way
    await keeping
    assert newest(one)[0].job.demands == set()


async def test_without_any_copy_nobody_is_answered(replicas, vaults, loop):
    await vaults([5.0], [7.0])
    await replicas.keep("exp")
    assert loop.time() == pytest.approx(1005.5)


async def test_two_jobs_at_once_have_two_copies_each(replicas, vaults, ledger, loop):
    one, other, third = await vaults([0.3], [0.3], [])
    attach(ledger, "p2", job="second")
    first = loop.create_task(replicas.keep("exp"))
    await asyncio.sleep(0.1)
    await asyncio.gather(first, replicas.keep("second"))
    for vault in (one, other):
        assert {*vault._snapshots} == {"exp", "second"}
    assert not third._snapshots


async def test_a_slow_vault_does_not_hold_up_answers_when_another_has_kept_it(replicas, vaults, loop):
    slow, quick = await vaults([10.0], [])
    await replicas.keep("exp")
    assert loop.time() == pytest.approx(1000.5)  # it had its chance
    for _ in range(5):
        await replicas.keep("exp")
    assert loop.time() == pytest.approx(1000.5)
    assert serials(quick) == [1, 2, 3, 4, 5, 6]
    await settle()
    assert newest(slow)[0].order == newest(quick)[0].order, "it is told, though nobody waits for it"
    await asyncio.sleep(10)
    assert newest(slow)[0].order == newest(quick)[0].order
    await replicas.keep("exp")  # it answers again
    assert serials(slow)[-1] == 7


async def test_a_third_vault_takes_the_place_of_a_slow_one(replicas, vaults):
    made = await vaults([10.0], [], [])
    for _ in range(2):
        await replicas.keep("exp")
    assert [serials(vault) for vault in made] == [[], [1, 2], [2]]


async def test_writers_share_a_snapshot_and_each_waits_for_one_with_its_own_change(replicas, vaults, loop, ledger):
    (one,) = await vaults([1.0, 1.0])
    attach(ledger, "c")

    async def write(rollout_id: int) -> float:
        ledger.demand("c", rollout_id)
        await replicas.keep("exp")
        assert rollout_id in newest(one)[0].job.demands
        return loop.time()

    async def crowd() -> list[float]:
        tasks = [loop.create_task(write(0))]
        await settle()
        tasks += [loop.create_task(write(rollout_id)) for rollout_id in range(1, 20)]
        return [await task for task in tasks]

    done = await crowd()
    assert done == [pytest.approx(1001)] + [pytest.approx(1002)] * 19
    assert serials(one) == [1, 2]


async def test_who_shared_a_word_that_could_not_be_kept_tries_again(replicas, vaults, loop, monkeypatch):
    """Two wait for the one that is at it; the first of them fails in both names."""
    await vaults([])
    outcomes = [None, StoreUnreachable("away"), None]

    async def write(entry: Any) -> None:
        await asyncio.sleep(1)
        if (error := outcomes.pop(0)) is not None:
            raise error

    monkeypatch.setattr(replicas.durability, "write", write)

    async def crowd() -> list[Any]:
        tasks = [loop.create_task(replicas.keep("exp")) for _ in range(3)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, second, third = await crowd()
    assert (first, third) == (None, None)
    assert isinstance(second, StoreUnreachable)
    assert outcomes == [], "the third was told that it was kept, and it was not"


async def test_jobs_do_not_wait_for_each_other(replicas, vaults, loop, ledger):
    await vaults([10.0])
    attach(ledger, "p-other", job="other")
    keeping = loop.create_task(replicas.keep("exp"))
    await settle()
    await replicas.keep("other")
    assert not keeping.done()
    assert loop.time() == 1000.0
    await keeping


# ---------------------------------------------------------------------- vaults that do not answer


async def test_where_no_vault_answers_in_time_nobody_is_answered(replicas, vaults, caplog, loop, ledger):
    one, _ = await vaults([unavailable()], [25.0])
    with pytest.raises(NotKept, match=f"no vault keeps how job exp stands.*Ray calls it alive: {VAULT} on node 1"):
        await replicas.keep("exp")
    assert loop.time() == pytest.approx(1020)
    assert f"vault {VAULT} is silent, and does not keep the state of a job" in caplog.text
    assert f"vault {OTHER} is silent, and does not keep the state of a job: TimeoutError" in caplog.text
    await replicas.keep("exp")
    assert newest(one)[0].serial == 2


async def test_where_a_journal_has_it_no_vault_needs_to_answer(replicas, vaults, monkeypatch):
    await vaults([unavailable()])
    written: list[Any] = []

    async def write(entry: Any) -> None:
        written.append(entry)

    monkeypatch.setattr(replicas.durability, "entry", lambda job_id: job_id)
    monkeypatch.setattr(replicas.durability, "write", write)
    await replicas.keep("exp")
    assert written == ["exp"]


async def test_one_copy_is_enough_and_none_where_every_vault_died_is_not(replicas, vaults, ray_stand_in):
    await vaults([], [unavailable()])
    await replicas.keep("exp")
    ray_stand_in.actors.clear()
    with pytest.raises(NotKept, match="every vault died, none is there yet"):
        await replicas.keep("exp")


async def test_a_dead_vault_is_not_asked_again(replicas, vaults, ray_stand_in, loop):
    one, other = await vaults([ray.exceptions.ActorDiedError()], [])
    for _ in range(3):
        await replicas.keep("exp")
    assert (serials(one), serials(other)) == ([], [1, 2, 3])
    del ray_stand_in.actors[OTHER]
    with pytest.raises(NotKept):
        await replicas.keep("exp")
    assert replicas._vaults == {}
    assert loop.time() == 1000.0


async def test_a_vault_that_goes_while_it_is_told_is_no_error(replicas, vaults, loop):
    _, other = await vaults([], [])
    keeping = loop.create_task(replicas.keep("exp"))
    while not replicas._asked:
        await asyncio.sleep(0)
    replicas.vault_gone(VAULT)  # as the watch over vaults says, between the call and the wait for its answer
    await keeping
    assert serials(other) == [1]


async def test_a_late_word_of_a_vault_that_was_restarted_since_does_not_leave_it_out(
    replicas, vaults, loop, ledger, ray_stand_in
):
    """Or the other one would be the only one that knows what follows, and its death the end of it."""
    _, other = await vaults([], [])
    await replicas.keep("exp")
    died = ray_stand_in.actors[VAULT] = Troubled(VAULT, remember=[])
    late = loop.create_future()

    async def never_in_time(*_: Any) -> bool:
        await late
        raise ray.exceptions.ActorDiedError()

    died.remember = never_in_time
    await replicas.keep("exp")
    back = ray_stand_in.actors[VAULT] = Troubled(VAULT, remember=[])
    await replicas.vault_here(VAULT)
    late.set_result(None)
    await settle()
    for rollout_id in range(3):
        publish(ledger, rollout_id)
        await replicas.keep("exp")
    assert newest(back)[0].order == newest(other)[0].order
    assert VAULT in replicas._vaults


@pytest.mark.parametrize("trouble", [unavailable(), 5.0], ids=["error", "slow"])
async def test_of_two_vaults_both_are_told_also_while_one_has_trouble(replicas, vaults, ledger, trouble):
    one, other = await vaults([trouble], [])
    for rollout_id in range(3):
        publish(ledger, rollout_id)
        await replicas.keep("exp")
        await settle()
    assert newest(one)[0].order == newest(other)[0].order


async def test_a_vault_that_never_answers_is_not_told_without_end(replicas, vaults):
    await vaults([1e4] * 1000, [])
    for _ in range(200):
        await replicas.keep("exp")
    assert len(replicas._asked) <= replicas_module._UNANSWERED


# ---------------------------------------------------------------------- where sources stand


async def test_a_vault_is_told_of_each_source_once(replicas, vaults, ledger):
    (one,) = await vaults([])
    told = []
    remember = one.remember

    async def watched(snapshot: Any, changes: Any, since: Any) -> bool:
        told.append(([*changes["sources"].new], changes["sources"].over))
        return await remember(snapshot, changes, since)

    one.remember = watched
    attach(ledger, "c")
    for rollout_id in range(3):
        publish(ledger, rollout_id, source=f"after {rollout_id}")
        await replicas.keep("exp")
    ledger.resume("c", 3)
    await replicas.keep("exp")
    assert told == [([0], []), ([1], [1]), ([2], [2]), ([], [0, 1])]
    assert {n: payload.source for n, payload in sources_of(one).items()} == {2: "after 2"}


async def test_a_vault_that_was_restarted_or_comes_late_is_told_of_all_sources(replicas, vaults, ledger, ray_stand_in):
    await vaults([], [])
    for rollout_id in range(2):
        publish(ledger, rollout_id, source=f"after {rollout_id}")
        await replicas.keep("exp")
    again = ray_stand_in.actors[OTHER] = Troubled(OTHER, remember=[])
    await replicas.vault_here(OTHER)
    await replicas.keep("exp")
    assert {n: payload.source for n, payload in sources_of(again).items()} == {0: "after 0", 1: "after 1"}


async def test_a_vault_that_was_restarted_unseen_says_so_and_is_told_of_all(replicas, vaults, ledger, ray_stand_in):
    await vaults([])
    for rollout_id in range(2):
        publish(ledger, rollout_id, source=f"after {rollout_id}")
        await replicas.keep("exp")
    again = ray_stand_in.actors[VAULT] = Troubled(VAULT, remember=[])
    await replicas.keep("exp")
    assert [*sources_of(again)] == [0, 1]
    assert serials(again) == [3, 4]


async def test_a_job_that_begins_anew_under_its_name_is_told_whole(replicas, vaults, ledger):
    (one,) = await vaults([])
    attach(ledger, "c")
    for rollout_id in range(2):
        publish(ledger, rollout_id, source="before")
        await replicas.keep("exp")
    ledger.end("p", "finished")
    ledger.end("c", "finished")
    attach(ledger, "p2")
    publish(ledger, 0, "t-new", producer="p2", source="anew")
    await replicas.keep("exp")
    assert [found.source for found in sources_of(one).values()] == ["anew"]


# ---------------------------------------------------------------------- a broker that begins


async def begun_anew(*given_up: str) -> tuple[Replicas, Ledger, dict[str, list[int]]]:
    now = asyncio.get_running_loop().time
    ledger = Ledger(now, now)
    replicas = Replicas(NAMESPACE, ledger, given_up={*given_up})
    return replicas, ledger, await replicas.restore()


async def test_a_broker_begins_with_what_its_vaults_remember(replicas, vaults, ledger, ray_stand_in):
    one, other = await vaults([], [])
    ray_stand_in.actors[BROKER_NAME] = object()  # no vault
    ray_stand_in.actors[f"{VAULT}_of_others"] = Vault(f"{VAULT}_of_others", NAMESPACE)
    one._records["t0"] = publish(ledger, 0)
    await replicas.keep("exp")
    other._records["t1"] = publish(ledger, 1, vault=f"{OTHER}/a")
    publish(ledger, 2)
    await replicas.keep("exp")
    _, again, missing = await begun_anew()
    assert missing == {"exp": [2]}
    assert [located.rollout_id for located in again.catalog()] == [0, 1]
    again.heartbeat("p", "still here")


async def test_the_next_broker_fences_the_one_before_it_at_once(replicas, vaults, monkeypatch, caplog):
    (one,) = await vaults([])
    await replicas.keep("exp")
    await begun_anew()
    assert newest(one)[0].order == (2, 1)
    exits: list[int] = []
    monkeypatch.setattr(replicas_module.os, "_exit", exits.append)
    await replicas.keep("exp")
    assert exits == [1]
    assert "another broker took the place of this one" in caplog.text
    assert newest(one)[0].order == (2, 1)


def silent(vault: Vault, **troubles: list[Trouble]) -> Troubled:
    """The same vault, with these troubles."""
    made = Troubled(vault._name, **troubles)
    made._snapshots, made._records, made._broker = vault._snapshots, vault._records, vault._broker
    made._held, made._incarnation = vault._held, vault._incarnation
    return made


@pytest.mark.parametrize("method", ["hello", "inventory"])
async def test_a_broker_waits_for_a_silent_vault_as_long_as_it_takes(replicas, vaults, loop, ray_stand_in, method):
    (one,) = await vaults([])
    publish(ledger := replicas._ledger, 0)
    ledger.ack(attach(ledger, "c"), ledger.claim("c", 0).rollout_id)
    await replicas.keep("exp")
    ray_stand_in.actors[VAULT] = silent(one, **{method: [unavailable(), 3000.0]})  # as Ray says after a while
    made = Replicas(NAMESPACE, again := Ledger(loop.time, loop.time))
    restoring = loop.create_task(made.restore())
    await asyncio.sleep(2000)
    assert made.waits_for() == [{"vault": VAULT, "node_id": "1", "silent_s": pytest.approx(2000, abs=1)}]
    await restoring
    assert made.waits_for() == []
    assert loop.time() == pytest.approx(4000.5)
    assert again.status("exp")["exp"]["acked"] == 1
    assert newest(ray_stand_in.actors[VAULT])[0].order == (2, 1)


async def test_a_vault_that_dies_or_whose_node_dies_is_not_waited_for_any_longer(replicas, vaults, loop, ray_stand_in):
    made = await vaults([], [], [])
    await replicas.keep("exp")
    ray_stand_in.actors[OTHER] = silent(made[1], hello=[1e6])
    ray_stand_in.actors[THIRD] = silent(made[2], inventory=[ray.exceptions.ActorDiedError()])
    again = Replicas(NAMESPACE, Ledger(loop.time, loop.time))
    restoring = loop.create_task(again.restore())
    await asyncio.sleep(100)
    assert not restoring.done()
    ray_stand_in.dead_nodes.add(OTHER.rpartition("_")[2])
    await restoring
    assert [*again._vaults] == [VAULT]
    assert loop.time() < 1110


async def test_a_brokers_number_is_above_whatever_a_vault_obeyed(replicas, vaults, ray_stand_in):
    await vaults([], [])
    await replicas.keep("exp")
    ray_stand_in.actors[OTHER]._broker = (7, "long gone")
    made, _, _ = await begun_anew()
    assert {vault._broker for vault in ray_stand_in.actors.values()} == {(8, made._process)}


async def test_what_a_beginning_that_failed_has_left_does_not_end_the_broker(
    broker, ray_stand_in, loop, monkeypatch, caplog
):
    """Its reading of a vault comes to an end after the next one has begun."""
    exits: list[int] = []
    monkeypatch.setattr(replicas_module.os, "_exit", exits.append)
    failing = ray_stand_in.actors[VAULT] = Troubled(VAULT, inventory=[RuntimeError("no")])
    slow = ray_stand_in.actors[OTHER] = Troubled(OTHER, inventory=[5.0])
    await broker.hello()
    assert loop.time() < 1005
    await asyncio.sleep(20)
    assert "the broker cannot begin, and tries again" in caplog.text
    assert len(slow.told("inventory")) == 2, "the first reading came to no end: nothing is tested"
    assert failing._broker == slow._broker == (broker._replicas._broker, broker._replicas._process)
    assert exits == []


async def test_a_vault_is_asked_again_also_while_ray_cannot_tell_which_nodes_live(
    replicas, vaults, ray_stand_in, monkeypatch
):
    (one,) = await vaults([])
    await replicas.keep("exp")
    ray_stand_in.actors[VAULT] = silent(one, inventory=[unavailable(), unavailable()])
    nodes, asked = ray_stand_in.nodes, list[str]()

    def once() -> Any:
        asked.append("nodes")
        if len(asked) == 2:
            raise unavailable()
        return nodes()

    monkeypatch.setattr(ray_stand_in, "nodes", once)
    _, again, _ = await begun_anew()
    assert len(asked) == 3
    again.heartbeat("p", "still here")


async def test_an_inventory_comes_in_pages_and_begins_again_where_the_vault_was_restarted_between_two(
    replicas, vaults, ray_stand_in, monkeypatch
):
    monkeypatch.setattr(vault_module, "_PAGE", 3)
    (one,) = await vaults([])
    ledger, pages = replicas._ledger, []
    for rollout_id in range(10):
        one._records[f"t{rollout_id}"] = publish(ledger, rollout_id, source=f"after {rollout_id}")
    await replicas.keep("exp")
    inventory = one.inventory

    async def watched(*args: Any) -> Any:
        page = await inventory(*args)
        pages.append((args[-1], page and len(page.items), page and page.left))
        if len(pages) == 2:
            one._incarnation = "another"
            one._listed = ("", [])
            one._records["t10"] = publish(ledger, 10)
        return page

    one.inventory = watched
    _, again, _ = await begun_anew()
    assert [located.rollout_id for located in again.catalog()] == [*range(11)]
    assert ends_at(again, 9) == ends_at(ledger, 9)
    total = pages[-1][0] + pages[-1][1]
    assert [page[0] for page in pages] == [0, 3, 6, *range(0, total, 3)]
    assert all(items is None or items <= 3 for _, items, _ in pages)
    assert one._listed == ("", [])


# ---------------------------------------------------------------------- a vault that is given up


@pytest.fixture
def without_other(replicas, vaults, run, loop, ray_stand_in, ledger):
    """(the next broker's replicas, its ledger, the vault that it begins without): that one holds rollouts 0 and 1."""
    one, other = run(vaults([], []))
    attach(ledger, "c")
    for rollout_id in range(3):
        home = one if rollout_id == 2 else other
        where = f"{home._name}/{home._incarnation}"
        home._records[f"t{rollout_id}"] = publish(ledger, rollout_id, vault=where)
        home._held[f"t{rollout_id}"] = []
    run(replicas.keep("exp"))
    stopped = ray_stand_in.actors[OTHER] = silent(other, hello=[1e4])
    made = Replicas(NAMESPACE, again := Ledger(loop.time, loop.time))

    async def begin() -> Any:
        restoring = loop.create_task(made.restore())
        await asyncio.sleep(100)
        with pytest.raises(BadInput, match=f"does not wait for nobody: it waits for {OTHER}"):
            made.give_up("nobody")
        made.give_up(OTHER)
        return await restoring

    assert run(begin()) == {"exp": [0, 1]}
    assert loop.time() == pytest.approx(1100)
    return made, again, stopped


async def test_a_vault_that_was_given_up_is_taken_back_when_it_answers(without_other, ledger):
    made, again, other = without_other
    again.demand("c", 0)
    assert again.next_demand("p") == 0
    publish(again, 0, "anew", vault=f"{VAULT}/x")
    again.garbage.take_drops()
    assert await made.answers_again(OTHER)
    await settle()
    assert [v.payload.token for v in again.versions("exp", 0)] == ["anew"], "it was generated again meanwhile"
    assert again.claim("c", 1).payload.token == "t1"
    assert again.status("exp")["exp"]["lost"] == []
    assert [*other._records] == ["t1"], "nobody needs the other one"
    assert made.given_up == set()
    assert other._broker == (made._broker, made._process)
    await made.keep("exp")
    assert newest(other)[0].order[0] == made._broker, "it keeps copies again"


async def test_a_job_that_only_the_given_up_vault_knew_is_had_again(replicas, vaults, loop, ray_stand_in, ledger):
    (one,) = await vaults([])
    attach(ledger, "c")
    publish(ledger, 0)
    ledger.claim("c", 0)
    ledger.ack("c", 0)
    await replicas.keep("exp")
    ray_stand_in.actors[VAULT] = silent(one, hello=[50.0])
    made, again, _ = await begun_anew(VAULT)
    assert (again.jobs, loop.time()) == ({}, 1000.0)
    assert await made.answers_again(VAULT)
    assert again.status("exp")["exp"]["acked"] == 1
    await made.keep("exp")
    assert newest(ray_stand_in.actors[VAULT])[0].order[0] > 1_000_000


async def test_what_was_begun_without_a_vault_is_newer_than_what_that_knows(replicas, vaults, ray_stand_in, ledger):
    """Or the broker after the next would go back to what was given up."""
    (one,) = await vaults([])
    for _ in range(30):
        await replicas.keep("exp")
    ray_stand_in.actors[VAULT] = silent(one, hello=[1e4])
    other = ray_stand_in.actors[OTHER] = Troubled(OTHER)
    made, again, _ = await begun_anew(VAULT)
    attach(again, "p2")
    publish(again, 5, producer="p2")
    await made.keep("exp")
    assert newest(other)[0].job.published == 1
    ray_stand_in.actors[VAULT] = silent(one)
    third, after, _ = await begun_anew()
    assert after.status("exp")["exp"]["published"] == 1
    assert third._broker > made._broker > 1


async def test_vaults_that_are_given_up_in_turn_obey_brokers_of_growing_numbers(replicas, vaults, monkeypatch):
    """Or what a vault was told by a broker without the other one would count as old as what the other was told."""
    await vaults([], [])
    await replicas.keep("exp")
    now = 1.7e9
    monkeypatch.setattr(time, "time", lambda: now)
    numbers = []
    for given_up in (OTHER, VAULT, OTHER, OTHER, OTHER, VAULT):
        now += 1.0
        numbers.append((await begun_anew(given_up))[0]._broker)
    assert numbers == sorted({*numbers})


async def test_a_vault_that_was_given_up_is_not_waited_for_by_the_next_broker_either(
    without_other, loop, ray_stand_in
):
    await settle()
    ray_stand_in.actors[OTHER] = silent(without_other[2], hello=[1e4])
    began = loop.time()
    third, _, _ = await begun_anew()
    assert loop.time() < began + 10
    assert third.given_up == {OTHER}
    assert await third.answers_again(OTHER)
    await settle()
    fourth, _, _ = await begun_anew()
    assert (fourth.given_up, [*fourth._vaults]) == (set(), [VAULT, OTHER])


async def test_a_vault_that_was_given_up_and_died_is_forgotten(without_other, ray_stand_in):
    made, _, _ = without_other
    del ray_stand_in.actors[OTHER]
    assert not await made.answers_again(OTHER)
    assert made.given_up == set()


async def test_a_broker_does_not_wait_for_vaults_of_dead_nodes(replicas, vaults, loop, ray_stand_in):
    await vaults([], [])
    await replicas.keep("exp")
    ray_stand_in.actors[OTHER] = Troubled(OTHER, inventory=[1e6] * 3)
    ray_stand_in.dead_nodes.add(OTHER.rpartition("_")[2])
    _, again, _ = await begun_anew()
    again.heartbeat("p", "still here")
    assert loop.time() == 1000.0


async def test_a_forgotten_job_is_not_remembered_by_any_vault(replicas, vaults, ledger):
    made = await vaults([], [], [])
    await replicas.keep("exp")
    ledger.end("p", "failed")
    ledger.forget("exp")
    await replicas.forget("exp")
    await replicas.keep("exp")  # of a writer that was late
    assert [vault._snapshots for vault in made] == [{}, {}, {}]
    _, again, _ = await begun_anew()
    assert again.jobs == {}


async def test_a_vault_that_was_silent_when_a_job_was_forgotten_is_told_again(replicas, vaults, ledger):
    _, other = await vaults([], [])
    await replicas.keep("exp")
    ledger.end("p", "failed")
    ledger.forget("exp")
    carry_out = other.forget

    async def silent_once(job_id: str) -> None:
        other.forget = carry_out
        raise unavailable()

    other.forget = silent_once
    await replicas.forget("exp")
    assert [*other._snapshots] == ["exp"], "it has heard it: nothing is tested"
    await replicas.forget_again()
    assert other._snapshots == {}
    _, again, _ = await begun_anew()
    assert again.jobs == {}


async def test_a_vault_that_was_given_up_when_a_job_was_forgotten_forgets_it_when_it_answers(
    without_other, ray_stand_in
):
    made, again, other = without_other
    for name in ("p", "c"):
        again.end(name, "failed")
    again.forget("exp")
    await made.forget("exp")
    assert [*other._snapshots] == ["exp"], "it has heard it: nothing is tested"
    assert await made.answers_again(OTHER)
    await made.forget_again()
    assert (again.jobs, other._snapshots) == ({}, {})
    _, next_one, _ = await begun_anew()
    assert next_one.jobs == {}
