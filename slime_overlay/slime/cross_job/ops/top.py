"""`top`: a job's figures, redrawn in place. It stays while the broker restarts, and says how old its figures are."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from ..errors import ClusterUnreachable, Unreachable, WaitTimeout
from . import text
from .app import console

_EVENTS = 5
_CHARS = " ▁▂▃▄▅▆▇█"


def run(viewer: Any, job_id: str, every_s: float, once: bool) -> None:
    """Show it until Ctrl-C; `once`: one picture. Raises what the first look raises."""
    found = viewer.look(job_id)
    rows = {row["rollout_id"]: row for row in found["progress"]}
    events = found["events"]
    if once:
        console().print(picture(found["status"], rows, events, ""))
        return
    seq, number, heard, trouble = found["seq"], _number(found, 0), time.monotonic(), ""
    with Live(console=console(), screen=console().is_terminal, auto_refresh=False) as live:
        while True:
            age_s = time.monotonic() - heard
            stale = f"figures are {age_s:.0f} s old: {text.clean(trouble, most=150)}" if trouble else ""
            live.update(picture(found["status"], rows, events, stale), refresh=True)
            time.sleep(every_s)
            try:
                new = viewer.look(job_id, since=seq, events_since=number)
                if new["seq"] < seq:  # the job began anew
                    new, rows, events = viewer.look(job_id), {}, []
            except ClusterUnreachable:
                raise
            except (Unreachable, WaitTimeout) as error:
                trouble = str(error)
                continue
            heard, trouble = time.monotonic(), ""
            found, seq, number = new, new["seq"], _number(new, number)
            rows.update({row["rollout_id"]: row for row in new["progress"]})
            events = [*events, *new["events"]][-50:]


def picture(
    status: Mapping[str, Any], rows: Mapping[int, Mapping[str, Any]], events: Sequence[Mapping[str, Any]], stale: str
) -> RenderableType:
    """What is shown: the status, lines of reward and waits, the newest rollouts."""
    newest = [rows[r] for r in sorted(rows, reverse=True)]
    claimed = [row for row in reversed(newest) if row["claimed"]]
    rewards = [row["reward"] for row in claimed if row["reward"] is not None]
    body: list[RenderableType] = [Text(stale, style="bold red")] if stale else []
    body.append(text.status_view(status, events[-_EVENTS:]))
    for name, values in (
        ("reward", rewards),
        ("staleness", [row["staleness"] or 0 for row in claimed]),
        ("training waited, s", [row["consumer_waited_s"] for row in claimed]),
        ("generation waited, s", [row["producer_waited_s"] for row in claimed]),
    ):
        if values:
            body.append(Text(f"{name:<22}{sparkline(values)}  {values[-1]:.4g} (max {max(values):.4g})"))
    body += [Text(), text.rollouts_table(newest[:10])]
    return Group(*body)


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """The last values as a line of blocks, from the lesser of 0 and their least to their greatest."""
    shown = values[-width:]
    low, high = min(0.0, *shown), max(shown)
    room = (high - low) or 1.0
    return "".join(_CHARS[max(0, min(8, round(8 * (value - low) / room)))] for value in shown)


def _number(found: Mapping[str, Any], before: int) -> int:
    return max([event["number"] for event in found["events"]], default=before)
