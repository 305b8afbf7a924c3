"""The broker's memory without a cluster: kept before anybody is answered, by whoever is quick (ray_stand_in.py)."""

import asyncio
import time
from typing import Any

import pytest
import ray

from slime.cross_job import keeper as keeper_module
from slime.cross_job import vault as vault_module
from slime.cross_job.errors import BadInput, Fenced, NotKept, StoreUnreachable
from slime.cross_job.keeper import Keeper
from slime.cross_job.ledger import Ledger
from slime.cross_job.snapshot import snapshot
from slime.cross_job.types import BROKER_NAME
from slime.cross_job.vault import Vault

from .ledger_hands import attach, ends_at, publish
from .ray_stand_in import NAMESPACE, OTHER, VAULT, Troubled, settle, unavailable

THIRD = "slime_cross_job_vault_3"
ALL = (VAULT, OTHER, THIRD)
Trouble = Exception | float | None


class Exited(Exception):
    """Stands in for the end of the broker's process."""


@pytest.fixture
def ledger(loop) -> Ledger:
    made = Ledger(loop.time, loop.time)
    attach(made, "p")
    return made


@pytest.fixture
def keeper(ray_stand_in, ledger) -> Keeper:
    return Keeper(NAMESPACE, ledger)


@pytest.fixture
def vaults(ray_stand_in, keeper, run):
    """Make vaults, each with its troubles in `remember`, and let the keeper know them."""

    def make(*troubles: list[Trouble]) -> list[Troubled]:
        made = [Troubled(name, remember=found) for name, found in zip(ALL, troubles)]
        ray_stand_in.actors |= {vault._name: vault for vault in made}
        for vault in made:
            run(keeper.vault_here(vault._name))
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


def test_a_change_is_kept_when_it_is_answered(keeper, vaults, run, ledger):
    one, other = vaults([], [])
    ledger.demand(attach(ledger, "c"), 3)
    run(keeper.keep("exp"))
    for vault in (one, other):
        snapshot, _ = newest(vault)
        assert snapshot.job.demands == {3}
        assert [client.info.client_id for client in snapshot.clients] == ["p", "c"]


def test_a_snapshot_is_what_was_not_what_has_become_of_it(keeper, vaults, run, ledger, loop):
    (one,) = vaults([5.0])
    attach(ledger, "c")

    async def test() -> None:
        keeping = loop.create_task(keeper.keep("exp"))
        await settle()
        ledger.demand("c", 3)  # while it is under way
        await keeping

    run(test())
    assert newest(one)[0].job.demands == set()


def test_two_copies_are_enough(keeper, vaults, run):
    made = vaults([], [], [])
    run(keeper.keep("exp"))
    assert [serials(vault) for vault in made] == [[1], [1], []]


def test_without_any_copy_nobody_is_answered(keeper, vaults, run, loop):
    vaults([5.0], [7.0])
    run(keeper.keep("exp"))
    assert loop.time() == pytest.approx(1005.5)


def test_two_jobs_at_once_have_two_copies_each(keeper, vaults, run, ledger, loop):
    one, other, third = vaults([0.3], [0.3], [])
    attach(ledger, "p2", job="second")

    async def test() -> None:
        first = loop.create_task(keeper.keep("exp"))
        await asyncio.sleep(0.1)
        await asyncio.gather(first, keeper.keep("second"))

    run(test())
    for vault in (one, other):
        assert {*vault._snapshots} == {"exp", "second"}
    assert not third._snapshots


def test_a_slow_vault_does_not_hold_up_answers_when_another_has_kept_it(keeper, vaults, run, loop):
    slow, quick = vaults([10.0], [])
    run(keeper.keep("exp"))
    assert loop.time() == pytest.approx(1000.5)  # it had its chance
    for _ in range(5):
        run(keeper.keep("exp"))
    assert loop.time() == pytest.approx(1000.5)
    assert serials(quick) == [1, 2, 3, 4, 5, 6]
    run(settle())
    assert newest(slow)[0].order == newest(quick)[0].order, "it is told, though nobody waits for it"
    run(asyncio.sleep(10))
    assert newest(slow)[0].order == newest(quick)[0].order
    run(keeper.keep("exp"))  # it answers again
    assert serials(slow)[-1] == 7


def test_a_third_vault_takes_the_place_of_a_slow_one(keeper, vaults, run):
    made = vaults([10.0], [], [])
    for _ in range(2):
        run(keeper.keep("exp"))
    assert [serials(vault) for vault in made] == [[], [1, 2], [2]]


def test_writers_share_a_snapshot_and_each_waits_for_one_with_its_own_change(keeper, vaults, run, loop, ledger):
    (one,) = vaults([1.0, 1.0])
    attach(ledger, "c")

    async def write(rollout_id: int) -> float:
        ledger.demand("c", rollout_id)
        await keeper.keep("exp")
        assert rollout_id in newest(one)[0].job.demands
        return loop.time()

    async def crowd() -> list[float]:
        tasks = [loop.create_task(write(0))]
        await settle()
        tasks += [loop.create_task(write(rollout_id)) for rollout_id in range(1, 20)]
        return [await task for task in tasks]

    done = run(crowd())
    assert done == [pytest.approx(1001)] + [pytest.approx(1002)] * 19
    assert serials(one) == [1, 2]


def test_who_shared_a_word_that_could_not_be_kept_tries_again(keeper, vaults, run, loop, monkeypatch):
    """Two wait for the one that is at it; the first of them fails in both names."""
    vaults([])
    outcomes = [None, StoreUnreachable("away"), None]

    async def write(entry: Any) -> None:
        await asyncio.sleep(1)
        if (error := outcomes.pop(0)) is not None:
            raise error

    monkeypatch.setattr(keeper.books, "write", write)

    async def crowd() -> list[Any]:
        tasks = [loop.create_task(keeper.keep("exp")) for _ in range(3)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, second, third = run(crowd())
    assert (first, third) == (None, None)
    assert isinstance(second, StoreUnreachable)
    assert outcomes == [], "the third was told that it was kept, and it was not"


def test_jobs_do_not_wait_for_each_other(keeper, vaults, run, loop, ledger):
    vaults([10.0])
    attach(ledger, "p-other", job="other")

    async def test() -> None:
        keeping = loop.create_task(keeper.keep("exp"))
        await settle()
        await keeper.keep("other")
        assert not keeping.done()
        assert loop.time() == 1000.0
        await keeping

    run(test())


# ---------------------------------------------------------------------- vaults that do not answer


def test_where_no_vault_answers_in_time_nobody_is_answered(keeper, vaults, run, caplog, loop, ledger):
    one, _ = vaults([unavailable()], [25.0])
    with pytest.raises(NotKept, match=f"no vault keeps how job exp stands.*Ray calls it alive: {VAULT} on node 1"):
        run(keeper.keep("exp"))
    assert loop.time() == pytest.approx(1020)
    assert f"vault {VAULT} is silent, and does not keep the state of a job" in caplog.text
    assert f"vault {OTHER} is silent, and does not keep the state of a job" in caplog.text
    run(keeper.keep("exp"))
    assert newest(one)[0].serial == 2


def test_where_a_journal_has_it_no_vault_needs_to_answer(keeper, vaults, run, monkeypatch):
    vaults([unavailable()])
    written: list[Any] = []

    async def write(entry: Any) -> None:
        written.append(entry)

    monkeypatch.setattr(keeper.books, "entry", lambda job_id: job_id)
    monkeypatch.setattr(keeper.books, "write", write)
    run(keeper.keep("exp"))
    assert written == ["exp"]


def test_one_copy_is_enough_and_none_where_every_vault_died_is_not(keeper, vaults, run, ray_stand_in):
    vaults([], [unavailable()])
    run(keeper.keep("exp"))
    ray_stand_in.actors.clear()
    with pytest.raises(NotKept, match="every vault died, none is there yet"):
        run(keeper.keep("exp"))


def test_a_dead_vault_is_not_asked_again(keeper, vaults, run, ray_stand_in, loop):
    one, other = vaults([ray.exceptions.ActorDiedError()], [])
    for _ in range(3):
        run(keeper.keep("exp"))
    assert (serials(one), serials(other)) == ([], [1, 2, 3])
    del ray_stand_in.actors[OTHER]
    with pytest.raises(NotKept):
        run(keeper.keep("exp"))
    assert keeper._vaults == {}
    assert loop.time() == 1000.0


def test_a_vault_that_goes_while_it_is_told_is_no_error(keeper, vaults, run, loop):
    _, other = vaults([], [])

    async def test() -> None:
        keeping = loop.create_task(keeper.keep("exp"))
        while not keeper._asked:
            await asyncio.sleep(0)
        keeper.vault_gone(VAULT)  # as the watch over vaults says, between the call and the wait for its answer
        await keeping

    run(test())
    assert serials(other) == [1]


def test_a_vault_that_did_not_answer_once_keeps_copies_again_when_it_does(keeper, vaults, run):
    one, other = vaults([unavailable()], [])
    for _ in range(5):
        run(keeper.keep("exp"))
        run(asyncio.sleep(60))
    assert serials(other) == [1, 2, 3, 4, 5]
    assert serials(one)[-1:] == [5], "one copy only, for ever"


def test_a_late_word_of_a_vault_that_was_restarted_since_does_not_leave_it_out(
    keeper, vaults, run, loop, ledger, ray_stand_in
):
    """Or the other one would be the only one that knows what follows, and its death the end of it."""
    _, other = vaults([], [])
    run(keeper.keep("exp"))
    died = ray_stand_in.actors[VAULT] = Troubled(VAULT, remember=[])
    late = loop.create_future()

    async def never_in_time(*_: Any) -> bool:
        await late
        raise ray.exceptions.ActorDiedError()

    died.remember = never_in_time
    run(keeper.keep("exp"))
    back = ray_stand_in.actors[VAULT] = Troubled(VAULT, remember=[])
    run(keeper.vault_here(VAULT))
    late.set_result(None)
    run(settle())
    for rollout_id in range(3):
        publish(ledger, rollout_id)
        run(keeper.keep("exp"))
    assert newest(back)[0].order == newest(other)[0].order
    assert VAULT in keeper._vaults


@pytest.mark.parametrize("trouble", [unavailable(), 5.0], ids=["error", "slow"])
def test_of_two_vaults_both_are_told_also_while_one_has_trouble(keeper, vaults, run, ledger, trouble):
    one, other = vaults([trouble], [])
    for rollout_id in range(3):
        publish(ledger, rollout_id)
        run(keeper.keep("exp"))
        run(settle())
    assert newest(one)[0].order == newest(other)[0].order


def test_a_vault_that_never_answers_is_not_told_without_end(keeper, vaults, run):
    vaults([1e4] * 1000, [])
    for _ in range(200):
        run(keeper.keep("exp"))
    assert len(keeper._asked) <= keeper_module._UNANSWERED


def test_a_broker_that_was_replaced_ends(keeper, vaults, run, monkeypatch, caplog):
    (one,) = vaults([])
    one._broker = (2, "another")

    def exit_now(code: int) -> None:
        raise Exited(code)

    monkeypatch.setattr(keeper_module.os, "_exit", exit_now)
    with pytest.raises(Exited, match="1"):
        run(keeper.keep("exp"))
    assert "another broker took the place of this one" in caplog.text


# ---------------------------------------------------------------------- where sources stand


def test_a_vault_is_told_of_each_source_once(keeper, vaults, run, ledger):
    (one,) = vaults([])
    told = []
    remember = one.remember

    async def watched(snapshot: Any, changes: Any, since: Any) -> bool:
        told.append(([*changes["sources"].new], changes["sources"].over))
        return await remember(snapshot, changes, since)

    one.remember = watched
    attach(ledger, "c")
    for rollout_id in range(3):
        publish(ledger, rollout_id, source=f"after {rollout_id}")
        run(keeper.keep("exp"))
    ledger.resume("c", 3)
    run(keeper.keep("exp"))
    assert told == [([0], []), ([1], [1]), ([2], [2]), ([], [0, 1])]
    assert {n: payload.source for n, payload in sources_of(one).items()} == {2: "after 2"}


def test_a_vault_that_was_restarted_or_comes_late_is_told_of_all_sources(keeper, vaults, run, ledger, ray_stand_in):
    vaults([], [])
    for rollout_id in range(2):
        publish(ledger, rollout_id, source=f"after {rollout_id}")
        run(keeper.keep("exp"))
    again = ray_stand_in.actors[OTHER] = Troubled(OTHER, remember=[])
    run(keeper.vault_here(OTHER))
    run(keeper.keep("exp"))
    assert {n: payload.source for n, payload in sources_of(again).items()} == {0: "after 0", 1: "after 1"}


def test_a_vault_that_was_restarted_unseen_says_so_and_is_told_of_all(keeper, vaults, run, ledger, ray_stand_in):
    vaults([])
    for rollout_id in range(2):
        publish(ledger, rollout_id, source=f"after {rollout_id}")
        run(keeper.keep("exp"))
    again = ray_stand_in.actors[VAULT] = Troubled(VAULT, remember=[])
    run(keeper.keep("exp"))
    assert [*sources_of(again)] == [0, 1]
    assert serials(again) == [3, 4]


def test_a_job_that_begins_anew_under_its_name_is_told_whole(keeper, vaults, run, ledger):
    (one,) = vaults([])
    attach(ledger, "c")
    for rollout_id in range(2):
        publish(ledger, rollout_id, source="before")
        run(keeper.keep("exp"))
    ledger.end("p", "finished")
    ledger.end("c", "finished")
    attach(ledger, "p2")
    publish(ledger, 0, "t-new", producer="p2", source="anew")
    run(keeper.keep("exp"))
    assert [found.source for found in sources_of(one).values()] == ["anew"]


# ---------------------------------------------------------------------- a broker that begins


def begun_anew(run: Any, loop: Any) -> tuple[Keeper, Ledger, dict[str, list[int]]]:
    ledger = Ledger(loop.time, loop.time)
    keeper = Keeper(NAMESPACE, ledger)
    return keeper, ledger, run(keeper.restore())


def test_a_broker_begins_with_what_its_vaults_remember(keeper, vaults, run, loop, ledger, ray_stand_in):
    one, other = vaults([], [])
    ray_stand_in.actors[BROKER_NAME] = object()  # no vault
    ray_stand_in.actors[f"{VAULT}_of_others"] = Vault(f"{VAULT}_of_others", NAMESPACE)
    one._records["t0"] = publish(ledger, 0)
    run(keeper.keep("exp"))
    other._records["t1"] = publish(ledger, 1, vault=f"{OTHER}/a")
    publish(ledger, 2)
    run(keeper.keep("exp"))
    _, again, missing = begun_anew(run, loop)
    assert missing == {"exp": [2]}
    assert [located.rollout_id for located in again.catalog()] == [0, 1]
    again.heartbeat("p", "still here")


def test_the_next_broker_fences_the_one_before_it_at_once(keeper, vaults, run, loop, monkeypatch):
    (one,) = vaults([])
    run(keeper.keep("exp"))
    begun_anew(run, loop)
    assert newest(one)[0].order == (2, 1)
    exits: list[int] = []
    monkeypatch.setattr(keeper_module.os, "_exit", exits.append)
    run(keeper.keep("exp"))
    assert exits == [1]
    assert newest(one)[0].order == (2, 1)


def silent(vault: Vault, **troubles: list[Trouble]) -> Troubled:
    """The same vault, with these troubles."""
    made = Troubled(vault._name, **troubles)
    made._snapshots, made._records, made._broker = vault._snapshots, vault._records, vault._broker
    made._held, made._incarnation = vault._held, vault._incarnation
    return made


def test_a_vault_that_cannot_be_reached_is_asked_again(keeper, vaults, run, loop, ray_stand_in):
    (one,) = vaults([])
    run(keeper.keep("exp"))
    ray_stand_in.actors[VAULT] = silent(one, inventory=[unavailable(), 25.0])
    _, again, _ = begun_anew(run, loop)
    again.heartbeat("p", "still here")
    assert loop.time() == pytest.approx(1025.5)


@pytest.mark.parametrize("method", ["hello", "inventory"])
def test_a_broker_waits_for_a_silent_vault_as_long_as_it_takes(keeper, vaults, run, loop, ray_stand_in, method):
    (one,) = vaults([])
    publish(ledger := keeper._ledger, 0)
    ledger.ack(attach(ledger, "c"), ledger.claim("c", 0).rollout_id)
    run(keeper.keep("exp"))
    ray_stand_in.actors[VAULT] = silent(one, **{method: [unavailable(), 3000.0]})  # as Ray says after a while
    made = Keeper(NAMESPACE, again := Ledger(loop.time, loop.time))

    async def test() -> None:
        restoring = loop.create_task(made.restore())
        await asyncio.sleep(2000)
        assert made.waits_for() == [{"vault": VAULT, "node_id": "1", "silent_s": pytest.approx(2000, abs=1)}]
        await restoring
        assert made.waits_for() == []

    run(test())
    assert loop.time() == pytest.approx(4000.5)
    assert again.status("exp")["exp"]["acked"] == 1
    assert newest(ray_stand_in.actors[VAULT])[0].order == (2, 1)


def test_a_vault_that_dies_or_whose_node_dies_is_not_waited_for_any_longer(keeper, vaults, run, loop, ray_stand_in):
    made = vaults([], [], [])
    run(keeper.keep("exp"))
    ray_stand_in.actors[OTHER] = silent(made[1], hello=[1e6])
    ray_stand_in.actors[THIRD] = silent(made[2], inventory=[ray.exceptions.ActorDiedError()])

    async def test() -> Keeper:
        again = Keeper(NAMESPACE, Ledger(loop.time, loop.time))
        restoring = loop.create_task(again.restore())
        await asyncio.sleep(100)
        assert not restoring.done()
        ray_stand_in.dead_nodes.add(OTHER.rpartition("_")[2])
        await restoring
        return again

    again = run(test())
    assert [*again._vaults] == [VAULT]
    assert loop.time() < 1110


def test_a_brokers_number_is_above_whatever_a_vault_obeyed(keeper, vaults, run, loop, ray_stand_in):
    vaults([], [])
    run(keeper.keep("exp"))
    ray_stand_in.actors[OTHER]._broker = (7, "long gone")
    made, _, _ = begun_anew(run, loop)
    assert {vault._broker for vault in ray_stand_in.actors.values()} == {(8, made._process)}


def test_what_a_beginning_that_failed_has_left_does_not_end_the_broker(
    broker, ray_stand_in, run, loop, monkeypatch, caplog
):
    """Its reading of a vault comes to an end after the next one has begun."""
    exits: list[int] = []
    monkeypatch.setattr(keeper_module.os, "_exit", exits.append)
    failing = ray_stand_in.actors[VAULT] = Troubled(VAULT, inventory=[RuntimeError("no")])
    slow = ray_stand_in.actors[OTHER] = Troubled(OTHER, inventory=[5.0])

    async def test() -> None:
        await broker.hello()
        assert loop.time() < 1005
        await asyncio.sleep(20)

    run(test())
    assert "the broker cannot begin, and tries again" in caplog.text
    assert len(slow.told("inventory")) == 2, "the first reading came to no end: nothing is tested"
    assert failing._broker == slow._broker == (broker._keeper._broker, broker._keeper._process)
    assert exits == []


def test_a_vault_is_asked_again_also_while_ray_cannot_tell_which_nodes_live(
    keeper, vaults, run, loop, ray_stand_in, monkeypatch
):
    (one,) = vaults([])
    run(keeper.keep("exp"))
    ray_stand_in.actors[VAULT] = silent(one, inventory=[unavailable(), unavailable()])
    nodes, asked = ray_stand_in.nodes, list[str]()

    def once() -> Any:
        asked.append("nodes")
        if len(asked) == 2:
            raise unavailable()
        return nodes()

    monkeypatch.setattr(ray_stand_in, "nodes", once)
    _, again, _ = begun_anew(run, loop)
    assert len(asked) == 3
    again.heartbeat("p", "still here")


def test_an_inventory_comes_in_pages_and_begins_again_where_the_vault_was_restarted_between_two(
    keeper, vaults, run, loop, ray_stand_in, monkeypatch
):
    monkeypatch.setattr(vault_module, "_PAGE", 3)
    (one,) = vaults([])
    ledger, pages = keeper._ledger, []
    for rollout_id in range(10):
        one._records[f"t{rollout_id}"] = publish(ledger, rollout_id, source=f"after {rollout_id}")
    run(keeper.keep("exp"))
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
    _, again, _ = begun_anew(run, loop)
    assert [located.rollout_id for located in again.catalog()] == [*range(11)]
    assert ends_at(again, 9) == ends_at(ledger, 9)
    total = pages[-1][0] + pages[-1][1]
    assert [page[0] for page in pages] == [0, 3, 6, *range(0, total, 3)]
    assert all(items is None or items <= 3 for _, items, _ in pages)
    assert one._listed == ("", [])


# ---------------------------------------------------------------------- a vault that is given up


@pytest.fixture
def without_other(keeper, vaults, run, loop, ray_stand_in, ledger):
    """(the next broker's keeper, its ledger, the vault that it begins without): that one holds rollouts 0 and 1."""
    one, other = vaults([], [])
    attach(ledger, "c")
    for rollout_id in range(3):
        home = one if rollout_id == 2 else other
        where = f"{home._name}/{home._incarnation}"
        home._records[f"t{rollout_id}"] = publish(ledger, rollout_id, vault=where)
        home._held[f"t{rollout_id}"] = []
    run(keeper.keep("exp"))
    stopped = ray_stand_in.actors[OTHER] = silent(other, hello=[1e4])
    made = Keeper(NAMESPACE, again := Ledger(loop.time, loop.time))

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


def test_a_vault_that_was_given_up_is_taken_back_when_it_answers(without_other, run, ledger):
    made, again, other = without_other
    again.demand("c", 0)
    assert again.next_demand("p") == 0
    publish(again, 0, "anew", vault=f"{VAULT}/x")
    again.take_drops()
    assert run(made.answers_again(OTHER))
    run(settle())
    assert [v.payload.token for v in again.versions("exp", 0)] == ["anew"], "it was generated again meanwhile"
    assert again.claim("c", 1).payload.token == "t1"
    assert again.status("exp")["exp"]["lost"] == []
    assert [*other._records] == ["t1"], "nobody needs the other one"
    assert made.given_up == set()
    assert other._broker == (made._broker, made._process)
    run(made.keep("exp"))
    assert newest(other)[0].order == newest(other)[0].order


def test_a_job_that_only_the_given_up_vault_knew_is_had_again(keeper, vaults, run, loop, ray_stand_in, ledger):
    (one,) = vaults([])
    attach(ledger, "c")
    publish(ledger, 0)
    ledger.claim("c", 0)
    ledger.ack("c", 0)
    run(keeper.keep("exp"))
    ray_stand_in.actors[VAULT] = silent(one, hello=[50.0])
    made = Keeper(NAMESPACE, again := Ledger(loop.time, loop.time), given_up={VAULT})
    run(made.restore())
    assert (again.jobs, loop.time()) == ({}, 1000.0)
    assert run(made.answers_again(VAULT))
    assert again.status("exp")["exp"]["acked"] == 1
    run(made.keep("exp"))
    assert newest(ray_stand_in.actors[VAULT])[0].order[0] > 1_000_000


def test_what_was_begun_without_a_vault_is_newer_than_what_that_knows(keeper, vaults, run, loop, ray_stand_in, ledger):
    """Or the broker after the next would go back to what was given up."""
    (one,) = vaults([])
    for _ in range(30):
        run(keeper.keep("exp"))
    ray_stand_in.actors[VAULT] = silent(one, hello=[1e4])
    other = ray_stand_in.actors[OTHER] = Troubled(OTHER)
    made = Keeper(NAMESPACE, again := Ledger(loop.time, loop.time), given_up={VAULT})
    run(made.restore())
    attach(again, "p2")
    publish(again, 5, producer="p2")
    run(made.keep("exp"))
    assert newest(other)[0].job.published == 1
    ray_stand_in.actors[VAULT] = silent(one)
    third, after, _ = begun_anew(run, loop)
    assert after.status("exp")["exp"]["published"] == 1
    assert third._broker > made._broker > 1


def test_vaults_that_are_given_up_in_turn_obey_brokers_of_growing_numbers(keeper, vaults, run, loop, monkeypatch):
    """Or what a vault was told by a broker without the other one would count as old as what the other was told."""
    vaults([], [])
    run(keeper.keep("exp"))
    now = 1.7e9
    monkeypatch.setattr(time, "time", lambda: now)
    numbers = []
    for given_up in (OTHER, VAULT, OTHER, OTHER, OTHER, VAULT):
        now += 1.0
        made = Keeper(NAMESPACE, Ledger(loop.time, loop.time), given_up={given_up})
        run(made.restore())
        numbers.append(made._broker)
    assert numbers == sorted({*numbers})


def test_a_vault_that_was_given_up_is_not_waited_for_by_the_next_broker_either(without_other, run, loop, ray_stand_in):
    run(settle())
    ray_stand_in.actors[OTHER] = silent(without_other[2], hello=[1e4])
    third = Keeper(NAMESPACE, Ledger(loop.time, loop.time))
    began = loop.time()
    run(third.restore())
    assert loop.time() < began + 10
    assert third.given_up == {OTHER}
    assert run(third.answers_again(OTHER))
    fourth = Keeper(NAMESPACE, Ledger(loop.time, loop.time))
    run(settle())
    run(fourth.restore())
    assert (fourth.given_up, [*fourth._vaults]) == (set(), [VAULT, OTHER])


def test_a_vault_that_was_given_up_and_died_is_forgotten(without_other, run, ray_stand_in):
    made, _, _ = without_other
    del ray_stand_in.actors[OTHER]
    assert not run(made.answers_again(OTHER))
    assert made.given_up == set()


def test_a_vault_that_this_broker_has_not_read_is_told_nothing(keeper, vaults, run, ray_stand_in):
    """It may know more: a memory that overwrites another one is worse than none."""
    (one,) = vaults([])
    run(keeper.keep("exp"))
    strange = Keeper(NAMESPACE, keeper._ledger)
    with pytest.raises(Fenced, match=f"broker 1 was replaced by broker 1, says vault {VAULT}"):
        run(one.remember(snapshot(keeper._ledger, "exp", 1, 99, strange._process), {}, None))
    assert newest(one)[0].serial == 1


def test_a_broker_does_not_wait_for_vaults_of_dead_nodes(keeper, vaults, run, loop, ray_stand_in):
    vaults([], [])
    run(keeper.keep("exp"))
    ray_stand_in.actors[OTHER] = Troubled(OTHER, inventory=[1e6] * 3)
    ray_stand_in.dead_nodes.add(OTHER.rpartition("_")[2])
    _, again, _ = begun_anew(run, loop)
    again.heartbeat("p", "still here")
    assert loop.time() == 1000.0


def test_a_namespace_without_vaults_begins_empty(ray_stand_in, run, loop):
    _, again, missing = begun_anew(run, loop)
    assert (again.jobs, again.clients, missing) == ({}, {}, {})


def test_a_forgotten_job_is_not_remembered_by_any_vault(keeper, vaults, run, ledger, loop):
    made = vaults([], [], [])
    run(keeper.keep("exp"))
    ledger.end("p", "failed")
    ledger.forget("exp")
    run(keeper.forget("exp"))
    run(keeper.keep("exp"))  # of a writer that was late
    assert [vault._snapshots for vault in made] == [{}, {}, {}]
    _, again, _ = begun_anew(run, loop)
    assert again.jobs == {}


def test_a_vault_that_was_silent_when_a_job_was_forgotten_is_told_again(keeper, vaults, run, ledger, loop):
    _, other = vaults([], [])
    run(keeper.keep("exp"))
    ledger.end("p", "failed")
    ledger.forget("exp")
    carry_out = other.forget

    async def silent_once(job_id: str) -> None:
        other.forget = carry_out
        raise unavailable()

    other.forget = silent_once
    run(keeper.forget("exp"))
    assert [*other._snapshots] == ["exp"], "it has heard it: nothing is tested"
    run(keeper.forget_again())
    assert other._snapshots == {}
    _, again, _ = begun_anew(run, loop)
    assert again.jobs == {}


def test_a_vault_that_was_given_up_when_a_job_was_forgotten_forgets_it_when_it_answers(
    without_other, run, loop, ray_stand_in
):
    made, again, other = without_other
    for name in ("p", "c"):
        again.end(name, "failed")
    again.forget("exp")
    run(made.forget("exp"))
    assert [*other._snapshots] == ["exp"], "it has heard it: nothing is tested"
    assert run(made.answers_again(OTHER))
    run(made.forget_again())
    assert (again.jobs, other._snapshots) == ({}, {})
    _, next_one, _ = begun_anew(run, loop)
    assert next_one.jobs == {}
