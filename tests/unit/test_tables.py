"""A table tells what changed in it, and a copy that is told so stays equal, order included."""

import pickle

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from slime.cross_job.ledger import tables
from slime.cross_job.ledger.tables import Mark, Table

KEYS = st.integers(0, 9)
STEPS = st.one_of(
    st.tuples(st.just("set"), KEYS, st.integers()),
    st.tuples(st.just("pop"), KEYS),
    st.tuples(st.just("clear")),
    st.tuples(st.just("tell"), st.integers(0, 2)),
)


@pytest.fixture(scope="module", autouse=True)
def short_log():
    """Of few changes, so that copies fall behind what is remembered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_LOGGED", 2)
        yield


@settings(deadline=None)
@given(st.lists(STEPS, max_size=100))
def test_copies_that_are_told_now_and_then_stay_equal(steps):
    table: Table[int] = Table()
    copies: list[dict[int, int]] = [{}, {}, {}]
    marks: list[Mark | None] = [None] * 3
    for step, *args in [*steps, *(("tell", n) for n in range(3))]:
        if step == "set":
            table[args[0]] = args[1]
        elif step == "pop":
            table.pop(args[0], None)
        elif step == "clear":
            table.clear()
        else:
            change = pickle.loads(pickle.dumps(table.since(marks[args[0]])))
            change.apply(copies[args[0]])
            marks[args[0]] = table.mark()
            assert [*copies[args[0]].items()] == [*table.items()]


def test_only_what_changed_is_told():
    table = Table({n: n for n in range(1000)})  # so many that the log holds what follows
    mark = table.mark()
    table[5] = 50
    del table[7]
    table[2000] = 0
    del table[2000]
    change = table.since(mark)
    assert (change.whole, change.over, change.new) == (False, [5, 7, 2000], {5: 50})
    assert table.since(table.mark()).over == []


def test_the_log_does_not_grow_for_ever_and_who_keeps_up_is_never_told_all():
    table: Table[int] = Table()
    longest = 0
    for n in range(100_000):
        mark = table.mark()
        table[n % 10] = n
        assert not table.since(mark).whole
        longest = max(longest, len(table._log))
    assert longest <= 2 * (10 + 2)


def test_marks_of_another_table_count_for_nothing():
    old = Table({1: 1})
    table = Table({2: 2})
    assert table.since(old.mark()) == table.since(None)
    assert table.since(None).new == {2: 2}
