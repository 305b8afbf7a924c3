"""What comes in is checked where it comes in: by the client, in words, and again by the ledger."""

import enum
import json
import math
import pickle
import re
import subprocess
import sys
import threading
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

from slime.cross_job.batch import Batch
from slime.cross_job.client.consumer import Consumer
from slime.cross_job.client.producer import Producer, returned
from slime.cross_job.client.session import read_source
from slime.cross_job.errors import BadInput, Refused
from slime.cross_job.ledger import Ledger
from slime.cross_job.ledger.state import DROP
from slime.cross_job.settings import Settings
from slime.cross_job.types import (
    MOST_META_BYTES,
    MOST_REASON,
    Ids,
    Payload,
    check_facts,
    check_name,
    check_names,
    check_payload,
    check_plain,
    check_version,
    shortened,
)
from tests.support.ledger import attach, figures, publish, train, weights
from tests.support.patience import patient

PAYLOAD = Payload("t", "v1/a", 10)


class Colour(enum.IntEnum):
    RED = 1


class Foreign:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def shown(value: object) -> str:
    """The name of a case: the same in every process."""
    return re.sub(r" at 0x\w+", "", repr(value))[:80]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"a": 1, "b": [None, True, "é"], "c": {"d": 1.5}}, {"a": 1, "b": [None, True, "é"], "c": {"d": 1.5}}),
        ({"a": (1, (2, "x"))}, {"a": [1, [2, "x"]]}),
        (
            {"a": np.int64(3), "b": np.float32(0.5), "c": np.bool_(True), "d": np.array(4)},
            {"a": 3, "b": 0.5, "c": True, "d": 4},
        ),
        ({"a": np.float64(0.5), "b": np.str_("x"), "c": Colour.RED}, {"a": 0.5, "b": "x", "c": 1}),
        (MappingProxyType({"a": 1}), {"a": 1}),
        (None, {}),
    ],
)
def test_facts_become_plain(given, expected):
    found = check_facts(given, "meta")
    assert found == expected
    assert b"numpy" not in pickle.dumps(found)
    assert json.loads(json.dumps(found)) == found


def test_what_is_not_finite_stays():
    found = check_facts({"reward": math.nan, "least": -math.inf}, "meta")
    assert math.isnan(found["reward"])
    assert found["least"] == -math.inf


def circular() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"a": [1, {"b": torch.ones(2)}]}, r"meta\['a'\]\[1\]\['b'\] is a torch.Tensor"),
        ({"a": torch.tensor(1.0)}, "torch.Tensor"),
        ({"a": np.ones(3)}, r"meta\['a'\] is a numpy.ndarray"),
        ({"a": lambda: 1}, "function"),
        ({"a": Foreign()}, "Foreign"),
        ({"a": Foreign}, "is a builtins.type"),
        ({"a": {1, 2}}, "builtins.set"),
        ({"a": b"x"}, "builtins.bytes"),
        ({"a": np.longdouble(1)}, "numpy"),
        ({"a": np.datetime64("2020-01-01")}, "numpy.datetime64"),
        ({1: 2}, "the key 1, a int"),
        ({"a": {Foreign(): 2}}, r"meta\['a'\] has the key <Foreign>"),
        ({"a": circular()}, "nested more than 50 deep"),
        ({"a": 10**5000}, "cannot be written as JSON"),
        ([1], "meta must be a dict"),
        ("x", "meta must be a dict"),
        (Foreign(), "meta must be a dict, not <Foreign>"),
        ({"a": "x" * MOST_META_BYTES}, "bytes as JSON, at most 262144"),
    ],
)
def test_facts_that_are_refused(value, said):
    with pytest.raises(BadInput, match=said):
        check_facts(value, "meta")


def test_a_long_list_is_quick():
    assert check_plain([*range(1_000_000)], "source") == [*range(1_000_000)]


@pytest.mark.parametrize("bad", ["3", 1.0, True, -1, [3], np.float64(3), np.bool_(True), 2**63 - 1, np.array([1, 2])])
def test_versions_that_are_refused(bad):
    with pytest.raises(BadInput, match="weight_version"):
        check_version(bad)


def test_versions():
    assert check_version(None) is None
    assert type(check_version(np.int64(3))) is int


@pytest.mark.parametrize("bad", ["tokens", b"tokens", 3, None, ["a", 3], ["a", ""], ["x" * 201]])
def test_columns_that_are_refused(bad):
    with pytest.raises(BadInput, match="columns"):
        check_names(bad, "columns")


def test_names():
    assert check_names(("a", "b"), "columns") == check_names(["a", "b"], "columns") == ("a", "b")
    for bad in ("", 3, None, "x" * 201):
        with pytest.raises(BadInput, match="a key"):
            check_name(bad, "a key")


def test_a_text_is_cut_with_a_note():
    assert shortened("abc", 3) == "abc"
    assert shortened("abcdef", 3) == "abc... (3 more characters)"
    assert shortened("the vault of node 17", 14) == "the vault of... (8 more characters)"
    assert shortened("the vault of node 17", 12) == "the vault of... (8 more characters)"


@pytest.mark.parametrize(
    "wrong",
    [
        *({"nbytes": bad} for bad in ("10", 1.5, -1, None)),
        *({"parts": bad} for bad in (0, "1", True)),
        *({"num_samples": bad} for bad in (-2, "1")),
        *({"weight_version": bad} for bad in ("3", -1)),
        *({"meta": bad} for bad in ([], {"a": object()})),
        *({"columns": bad} for bad in ("tokens", (1,))),
        *({"source": bad} for bad in (object(), "x" * 100_000)),
    ],
    ids=shown,
)
def test_a_record_that_is_wrong_is_refused_by_the_ledger_before_anything_changes(pair, wrong):
    publish(pair, 0)
    before = pair.status()
    for call in (
        lambda: pair.publish("p", 1, replace(PAYLOAD, **wrong)),
        lambda: pair.put_value("c", "weights", replace(PAYLOAD, **wrong)),
    ):
        with pytest.raises(BadInput, match=next(iter(wrong))):
            call()
    assert pair.status() == before
    assert pair.garbage.take_drops() == []


@pytest.mark.parametrize("version", ["3", -1, 1.5, True])
def test_a_value_with_a_version_that_is_none_is_refused_by_the_ledger(pair, version):
    with pytest.raises(BadInput, match="version"):
        pair.put_value("c", "weights", PAYLOAD, version)
    with pytest.raises(BadInput, match="a key"):
        pair.put_value("c", 3, PAYLOAD, 1)


def test_the_ledger_takes_records_in_plain_types(pair):
    located = publish(pair, 0, weight_version=np.int64(3), meta={"a": (1,)})
    assert type(located.payload.weight_version) is int
    assert located.payload.meta == {"a": [1]}


@pytest.mark.parametrize(
    "stated",
    [
        *({"max_ahead": bad} for bad in (True, 1.5, "3", -1)),
        *({"on_stale": "never"}, {"retain_s": "1"}, {"store": 3}, {"dead_after_s": "30"}, {"dead_after_s": math.nan}),
        *({"columns": "tokens"}, {"terms": [1]}, {"terms": {"a": object()}}),
    ],
    ids=shown,
)
def test_the_ledger_lets_nobody_in_who_states_what_cannot_be(ledger, stated):
    with pytest.raises(BadInput):
        attach(ledger, "p", **stated)
    assert ledger.status() == {}


def test_reasons_and_activities_are_bounded(pair):
    publish(pair, 0)
    pair.heartbeat("p", "x" * 10_000)
    pair.end("p", "failed", "y" * 1_000_000)
    shown = pair.status("exp")["exp"]["producer"]
    assert len(shown["activity"]) < 300
    assert len(shown["reason"]) < MOST_REASON + 50
    assert "996,000 more characters" in shown["reason"]
    assert len(pickle.dumps(pair.look("exp"))) < 30_000


def test_ids_know_no_greatest_number():
    found = Ids([2**63 - 2, 2**63 - 1, 2**63, 2**70])
    assert all(number in found for number in (2**63 - 2, 2**63 - 1, 2**63, 2**70))
    assert len(found) == 4
    found.discard(2**63 - 1)
    assert [*found] == [2**63 - 2, 2**63, 2**70]


# ---------------------------------------------------------------------- a record that was let in all the same


def damage(ledger: Ledger, rollout_id: int, **wrong: Any) -> None:
    """As an older version left it, which checked nothing."""
    versions = ledger.jobs["exp"].rollouts[rollout_id]
    versions[-1] = replace(versions[-1], payload=replace(versions[-1].payload, **wrong))


@pytest.mark.parametrize("wrong", [{"weight_version": "3"}, {"weight_version": [1]}, {"meta": None}], ids=repr)
def test_a_damaged_record_hides_nothing_and_is_named(ledger, wrong):
    for job in ("exp", "other"):
        for name in ("p", "c"):
            attach(ledger, f"{name}-{job}", job=job, max_staleness=1, on_stale="drop")
    weights(ledger, 0, "c-exp")
    for rollout_id in (0, 1):
        publish(ledger, rollout_id, producer="p-exp", weight_version=0)
    publish(ledger, 0, token="other", producer="p-other")
    damage(ledger, 0, **wrong)
    found = ledger.status()
    assert found["other"]["published"] == 1
    assert found["exp"]["damaged"] == [0]
    assert found["exp"]["queue_depth"] == 2
    assert [one["level"] for one in found["exp"]["standing"] if "damaged record (0)" in one["text"]] == ["warning"]
    assert ledger.look("exp")["status"]["damaged"] == [0]
    assert ledger.detail("exp", 0)["versions"]
    assert ledger.listed() == {"exp": [0, 1], "other": [0]}
    assert len(ledger.catalog()) == 3
    assert [ledger.claim("c-exp").rollout_id for _ in range(2)] == [0, 1]
    ledger.ack("c-exp", 0)
    assert ledger.status()["exp"]["damaged"] == []


def test_a_record_that_cannot_be_handed_out_is_put_aside_not_lost(pair):
    for rollout_id in range(3):
        publish(pair, rollout_id)
    damage(pair, 0, nbytes="10")
    assert [pair.claim("c").rollout_id for _ in range(2)] == [1, 2]
    assert pair.claim("c") is None
    found = pair.status("exp")["exp"]
    assert found["damaged"] == [0]
    assert any("damaged" in one["text"] for one in found["standing"])
    pair.end("p", "finished")
    with pytest.raises(Refused, match=r"rollouts \[0\].*damaged.*drop them"):  # and no end of the stream
        pair.claim("c")
    damage(pair, 0, nbytes=10)
    assert pair.claim("c").rollout_id == 0


def test_figures_that_cannot_be_taken_are_said_so_and_hide_no_other_job(pair):
    attach(pair, "p-other", job="other")
    publish(pair, 0)
    pair.jobs["exp"].began = None
    pair.jobs["exp"].nbytes = None
    found = pair.status()
    assert set(found) == {"exp", "other"}
    assert set(found["exp"]) == set(found["other"])
    assert found["exp"]["standing"][0]["level"] == "error"


def test_weights_of_a_damaged_version_count_as_unknown(ledger):
    attach(ledger, "p", max_staleness=0, on_stale=DROP)
    attach(ledger, "c")
    weights(ledger, 1)
    values = ledger.jobs["exp"].values
    values["weights"] = replace(values["weights"], version="1")
    publish(ledger, 0, weight_version=0)
    assert figures(ledger, "weight_version", "staleness") == [None, None]
    train(ledger, 0)
    assert figures(ledger, "acked") == [1]


# ---------------------------------------------------------------------- what a producer's method returns

COLUMNS = {"t": [[1, 2], [3]]}


def test_returned_is_plain():
    header = returned(COLUMNS, meta={"a": (np.int64(1),)}, weight_version=np.int32(2), source={"at": (1, 2)})[0]
    assert (header["meta"], header["weight_version"], header["source"]) == ({"a": [1]}, 2, {"at": [1, 2]})
    assert b"numpy" not in pickle.dumps(header)


@pytest.mark.parametrize("size", [10, 100_000])
def test_a_source_may_be_a_batch_which_comes_back(size):
    at = Batch.pack({"at": [np.arange(size)]}, {"seen": {3: (1, 2)}})
    header, _, apart = returned(COLUMNS, source=at)
    assert (apart is None, header["source_apart"]) == (size == 10, size > 10)
    payload = Payload("t", "v/1", 1, source=header["source"], source_apart=header["source_apart"])
    found = at if apart else read_source(None, check_payload(payload))
    assert found.ipc == at.ipc


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"meta": {"a": np.ones(3)}}, r"meta\['a'\]"),
        ({"meta": {"a": torch.ones(1)}}, r"meta\['a'\]"),
        ({"source": {"a": object()}}, r"source\['a'\]"),
        ({"source": {1: 2}}, "source has the key 1"),
        ({"weight_version": "3"}, "weight_version"),
    ],
)
def test_returned_refuses_what_is_not_plain(given, said):
    with pytest.raises(BadInput, match=said):
        returned(COLUMNS, **given)


@pytest.mark.parametrize(
    "make",
    [
        *(lambda: Consumer("exp", columns="tokens"), lambda: Consumer("exp", columns=["a", 3])),
        *(
            lambda: Consumer("exp", group=3),
            lambda: Consumer("exp", group=""),
            lambda: Consumer("exp", max_ahead=True),
        ),
        *(lambda: Producer("exp", columns="tokens"), lambda: Producer("exp", lasting="tokens")),
        *(lambda: Producer("exp", terms=[1]), lambda: Producer("exp", terms={"a": object()})),
        *(lambda: Producer("exp", max_ahed=1), lambda: Producer("exp", timeout_s="3")),
        lambda: Producer("exp", settings={"timeout_s": 3}),
    ],
)
def test_a_client_is_not_made_of_what_cannot_be(make):
    """Before anything is asked: there is no Ray here."""
    with pytest.raises(BadInput):
        make()


@pytest.mark.parametrize(
    "call",
    [
        *(lambda p, bad=bad: p.publish(0, COLUMNS, weight_version=bad) for bad in ("3", True, 1.0, -1, np.ones(2))),
        *(
            lambda p, bad=bad: p.publish(0, COLUMNS, meta=bad)
            for bad in ({"a": np.ones(2)}, {"a": lambda: 1}, [1], "x")
        ),
        *(lambda p, bad=bad: p.publish(bad, COLUMNS) for bad in ("0", 2**63 - 1, None)),
        *(lambda p, bad=bad: p.publish_from(0, object(), "m", parts=bad) for bad in (0, -1, "2", True, None)),
        *(lambda p, bad=bad: p.publish_from(0, bad, "__init__") for bad in (5, object(), Foreign)),
        lambda p: p.next_demand(until="3"),
        lambda p: p.next_demand(start=-1),
    ],
)
def test_a_producer_refuses_before_anything_is_asked(call):
    producer = Producer.__new__(Producer)  # knows no broker
    producer._ended, producer._fault = threading.Event(), None
    producer.settings = Settings()
    with pytest.raises(BadInput):
        call(producer)


def test_checking_imports_neither_numpy_nor_torch():
    """Broker and vaults check as well, and load nothing for it."""
    code = (
        "import sys, slime.cross_job.types as t; t.check_payload(t.Payload('t', 'v', 1, meta={'a': (1, 2)})); "
        "assert not {'numpy', 'torch', 'ray'} & {*sys.modules}, sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)}, timeout=patient(60)
    )


def test_a_record_that_was_checked_is_sound():
    assert check_payload(PAYLOAD).sound
    assert not replace(PAYLOAD, weight_version="3").sound
