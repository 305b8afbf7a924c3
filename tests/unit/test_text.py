"""What a terminal is shown: as text, whatever it is."""

import io
import json
import math

import numpy as np
import pytest
from rich.console import Console

from slime.cross_job.batch import Batch
from slime.cross_job.ledger import Ledger
from slime.cross_job.ops import text
from slime.cross_job.ops.top import picture, sparkline
from slime.cross_job.vault.preview import MOST_CHARACTERS, preview, shown
from tests.support.ledger import Clock, attach, publish

HOSTILE = [
    "\x1b[2J\x1b[31mred\x1b]0;title\x07",
    "\x9b31m\x9d0;title\x9c",
    "<script>alert(1)</script>",
    "[bold red]markup[/bold red]",
    "‮evil‬​",
    "a\rb\x08\x7f",
    "\ud800 alone",
    "line\u2028separator",
]


def rendered(thing: object) -> str:
    out = io.StringIO()
    Console(file=out, markup=False, emoji=False, highlight=False, width=200, force_terminal=True).print(thing)
    return out.getvalue()


def obeys(shown_text: str) -> list[str]:
    """Characters that a terminal would obey, but for rich's own colours and line ends."""
    import re

    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown_text)
    return [c for c in plain if (ord(c) < 32 and c != "\n") or 127 <= ord(c) < 160 or c in "‮‬​\u2028"]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_nothing_that_a_terminal_obeys_gets_through(hostile):
    assert not obeys(text.clean(hostile))
    assert not obeys(text.clean(hostile, lines=True))
    text.clean(hostile).encode()
    assert "\x1b" not in text.dumps({"x": hostile})
    assert json.loads(text.dumps({"x": shown(hostile)})) == {"x": shown(hostile)}


def test_what_is_harmless_stays():
    assert text.clean("größer ≥ 数学 🙂 \\x41") == "größer ≥ 数学 🙂 \\x41"
    assert text.clean("a\n\tb", lines=True) == "a\n\tb"
    assert text.clean("a\nb") == "a\\x0ab"
    assert text.clean("x" * 10, most=4) == "xxxx... (6 more characters)"


@pytest.mark.parametrize("hostile", HOSTILE)
def test_every_view_shows_hostile_words_as_words(hostile):
    clock = Clock()
    ledger = Ledger(clock, wall=clock)
    attach(ledger, "p")
    attach(ledger, "c", group=f"g{hostile}")
    publish(ledger, 0, meta={"reward": float("nan"), "note": hostile}, vault=f"v1{hostile}/a")
    ledger.heartbeat("p", f"doing {hostile}")
    ledger.end("c", "failed", f"because {hostile}")
    from dataclasses import asdict

    look = ledger.look("exp")
    rows = [{"rollout_id": r, **asdict(known)} for r, known in look["progress"]]
    events = [asdict(event) for _, event in look["events"]]
    sample = {"index": 0, "part": 0, "values": {f"c{hostile}": hostile, "n": [hostile]}}
    found = {"num_samples": 1, "columns": {hostile: "str"}, "samples": [sample]}
    detail = ledger.detail("exp", 0)
    for view in (
        text.jobs_table({f"ns/{hostile}": look["status"]}),
        text.status_view(look["status"], events),
        text.rollouts_table(rows),
        text.rollout_view(detail, found, {0: {"response_text": hostile}}),
        text.rollout_view(detail, {"value": [hostile]}, {}),
        picture(look["status"], {0: rows[0]}, events, hostile and text.clean(hostile)),
        text.findings_table(
            [{"check": "c", "severity": "error", "what": hostile, "why": hostile, "do": hostile, "where": hostile}]
        ),
    ):
        assert not obeys(rendered(view))
    assert "markup" not in hostile or "[bold red]" in rendered(text.rollout_view(detail, found, {}))


def test_samples_are_cut():
    column = ["x" * 10_000_000, "short"]
    numbers = [np.arange(5000), np.arange(3)]
    found = preview([Batch.pack({"text": column, "tokens": numbers, "reward": [0.5, float("nan")]})], 0, 2)
    assert found["num_samples"] == 2
    first, second = found["samples"]
    assert len(first["values"]["text"]) < MOST_CHARACTERS + 50
    assert first["values"]["text"].endswith("9,980,000 more characters")
    assert first["values"]["tokens"][-1] == "… 4,744 more"
    assert len(first["values"]["tokens"]) == 257
    assert second["values"]["text"] == "short"
    assert second["values"]["tokens"] == [0, 1, 2]
    assert '"reward": null' in text.dumps(second["values"])


def test_samples_are_counted_over_the_parts():
    parts = [Batch.pack({"n": [0, 1]}), Batch.pack({"n": [2, 3, 4]})]
    found = preview(parts, 1, 3)
    assert [(s["index"], s["part"], s["values"]["n"]) for s in found["samples"]] == [(1, 0, 1), (2, 1, 2), (3, 1, 3)]
    assert preview(parts, 9, 3)["samples"] == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"\xff\xfe ok", "\\xff\\xfe ok"),
        ("\ud800", "\\ud800"),
        ([1, [2, (3,)]], [1, [2, [3]]]),
        ({"a": {1: b"x"}}, {"a": {"1": "x"}}),
        (np.float32(1.5), 1.5),
        (np.zeros((2, 2)), [[0.0, 0.0], [0.0, 0.0]]),
        (None, None),
        (object, "<class 'object'>"),
    ],
)
def test_values_become_json(value, expected):
    assert shown(value) == expected
    json.dumps(shown(value))


def test_depth_and_width_are_bounded():
    deep: list[object] = []
    for _ in range(50):
        deep = [deep]
    assert "too deep" in json.dumps(shown(deep))
    assert shown({str(n): n for n in range(500)})["…"] == "400 more"


def test_what_is_no_batch_is_shown_too():
    assert preview([{"a": 1}], 0, 3) == {"value": [{"a": 1}]}


def test_json_has_no_numbers_that_are_none():
    assert text.dumps([math.nan, math.inf, 1.0]) == "[null, null, 1.0]"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0123, "12 ms"), (5.25, "5.2 s"), (600, "10 min"), (10_000, "2.8 h"), (400_000, "4.6 d"), (None, "-")],
)
def test_durations(seconds, words):
    assert text.span_text(seconds) == words


def test_sizes():
    assert [text.bytes_text(n) for n in (0, 999, 1500, 2.5e9, 7e13)] == ["0 B", "999 B", "1.5 kB", "2.5 GB", "70.0 TB"]


def test_sparklines():
    assert sparkline([0, 1, 2, 3]) == " ▃▅█"
    assert sparkline([0, 0]) == "  "
    assert sparkline([-1, 1]) == " █"
    assert len(sparkline(range(500))) == 60
