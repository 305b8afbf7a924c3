"""A vault that holds nothing that anybody needs ends, so that its node may be scaled down; what it keeps of jobs is
in others first. Without a cluster (ray_stand_in.py)."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from slime.cross_job.broker import actor as broker_module
from slime.cross_job.broker.actor import Broker
from slime.cross_job.types import BROKER_NAME, VAULT_NAME
from slime.cross_job.vault import actor as vault_module
from slime.cross_job.vault.actor import Vault
from slime.cross_job.vault.protocol import Target
from tests.support.ray_stand_in import (
    NAMESPACE,
    OTHER,
    VAULT,
    Troubled,
    batch,
    client,
    from_refs,
    payload,
    unavailable,
)

HERE = f"{VAULT_NAME}_node1"
"""The vault of the broker's node."""


@pytest.fixture
def broker(broker, ray_stand_in, monkeypatch) -> Broker:
    """It ends vaults at once that have nothing to do, and can make one on its node."""

    def vault_actor(name: str, namespace: str, node_id: str) -> Any:
        ray_stand_in.actors.setdefault(name, Vault(name, namespace))
        return ray_stand_in.get_actor(name, namespace)

    monkeypatch.setattr(broker_module, "_IDLE_S", 0.0)
    monkeypatch.setattr(vault_module, "vault_actor", vault_actor)
    return broker


@pytest.fixture
def vaults(ray_stand_in, run, broker) -> dict[str, Vault]:
    """Of node 1, where no client is, and node 2, where both are."""
    made: dict[str, Vault] = {name: Vault(name, NAMESPACE) for name in (VAULT, OTHER)}
    ray_stand_in.actors |= made
    for name, vault in made.items():
        run(broker.vault_here(name, vault._incarnation))
    for role in ("producer", "consumer"):
        run(broker.attach(replace(client(role), node_id="2"), {}))
    return made


def a_while(run) -> None:
    run(asyncio.sleep(3 * broker_module._IDLE_EVERY_S))


def test_an_idle_vault_ends_and_the_brokers_memory_is_elsewhere(broker, vaults, ray_stand_in, run):
    run(broker.call("demand", "c", 3))
    assert "exp" in vaults[VAULT]._snapshots, "the witness: it kept the broker's memory"
    a_while(run)
    assert VAULT not in ray_stand_in.actors
    for name in (OTHER, HERE):
        assert ray_stand_in.actors[name]._snapshots["exp"][0].job.demands == {3}
    run(broker.call("demand", "c", 4))
    assert ray_stand_in.actors[HERE]._snapshots["exp"][0].job.demands == {3, 4}
    ray_stand_in.actors[BROKER_NAME] = again = Broker(NAMESPACE)
    assert run(again.call("status", "exp"))["exp"]["last_demanded"] == 4


def test_a_vault_that_holds_something_stays(broker, vaults, ray_stand_in, run):
    vaults[VAULT]._held["t"], vaults[VAULT]._nbytes["t"] = [], 0
    run(broker.call("publish", "p", 0, payload("t", f"{VAULT}/{vaults[VAULT]._incarnation}")))
    a_while(run)
    assert VAULT in ray_stand_in.actors
    run(broker.call("claim", "c", 0))
    run(broker.call("ack", "c", 0))
    a_while(run)
    assert VAULT not in ray_stand_in.actors


def test_vaults_of_nodes_with_clients_stay_until_those_end_and_that_of_the_broker_for_good(
    broker, vaults, ray_stand_in, run
):
    a_while(run)
    assert {OTHER, HERE} <= {*ray_stand_in.actors}
    for name in ("p", "c"):
        run(broker.call("end", name, "stopped", ""))
    a_while(run)
    assert OTHER not in ray_stand_in.actors
    assert ray_stand_in.actors[HERE]._snapshots["exp"][0].job.producer.state == "stopped"


def test_a_vault_that_a_client_needs_since_stays(broker, vaults, ray_stand_in, run):
    assert not run(broker._replicas.retire(VAULT, 0.0, lambda: True))
    assert VAULT in ray_stand_in.actors


def test_several_vaults_that_are_idle_at_once_all_end(broker, vaults, ray_stand_in, run):
    for name in ("p", "c"):
        run(broker.call("end", name, "stopped", ""))
    assert {VAULT, OTHER} <= {*ray_stand_in.actors}
    a_while(run)
    assert {VAULT, OTHER} & {*ray_stand_in.actors} == set()
    assert ray_stand_in.actors[HERE]._snapshots["exp"][0].job.producer.state == "stopped"


def test_nothing_ends_where_the_others_do_not_keep_what_it_has(broker, vaults, ray_stand_in, run):
    deaf = Troubled(HERE, remember=[unavailable() for _ in range(1000)])
    ray_stand_in.actors[HERE] = deaf
    a_while(run)
    assert VAULT in ray_stand_in.actors


def test_what_is_busy_does_not_retire_and_a_vault_that_is_not_ended_after_all_goes_on(broker, vaults, run):
    vault = vaults[VAULT]
    assert not run(vault.retire(60.0, True)), "it was used a moment ago"
    assert run(vault.retire(0.0, True))
    target = Target("t", "p", rollout_id=0)
    recorded = run(vault.hand_over(target, from_refs(batch()), 60.0))
    assert recorded.version == 1
    assert not run(vault.retire(0.0, True)), "it holds a rollout"
