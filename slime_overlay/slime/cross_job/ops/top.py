"""`top`: a job's figures, redrawn in place. It stays while the broker restarts, and says how old its figures are."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.text import Text

from ..errors import ClusterUnreachable, Unreachable, WaitTimeout
from . import text
from .app import cluster, console, out

_EVENTS = 5
_CHARS = " ▁▂▃▄▅▆▇█"
_ASCII = " .:-=+*#@"
_NAMES = 22  # columns


def run(viewer: Any, job_id: str, every_s: float, once: bool, wide: bool = False) -> None:
    """Show it until Ctrl-C; `once`: one picture; `wide`: every column. Raises what the first look raises."""
    found = viewer.look(job_id)
    rows = {row["rollout_id"]: row for row in found["progress"]}
    events = found["events"]
    if once:
        out(picture(found["status"], rows, events, "", wide))
        return
    seq, number, heard, trouble = found["seq"], _number(found, 0), time.monotonic(), ""
    named, to = Text(f"Ray cluster at {cluster()}"), console()
    with Live(console=to, screen=to.is_terminal, auto_refresh=False) as live:
        while True:
            age_s = time.monotonic() - heard
            stale = f"figures are {age_s:.0f} s old: {text.clean(trouble, most=150)}" if trouble else ""
            live.update(Group(named, picture(found["status"], rows, events, stale, wide)), refresh=True)
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
    status: Mapping[str, Any],
    rows: Mapping[int, Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
    stale: str,
    wide: bool = False,
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
            body.append(Sparkline(name, values))
    body += [Text(), text.rollouts_table(newest[:10], wide)]
    return Group(*body)


@dataclass(frozen=True)
class Sparkline:
    """A line of blocks as wide as there is room, of characters that the terminal can show."""

    name: str
    values: Sequence[float]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        said = f"  {self.values[-1]:.4g} (max {max(self.values):.4g})"
        room = max(1, min(60, options.max_width - _NAMES - len(said)))
        blocks = sparkline(self.values, room, _ASCII if options.ascii_only else _CHARS)
        yield Text(f"{self.name:<{_NAMES}}{blocks}{said}", no_wrap=True)


def sparkline(values: Sequence[float], width: int = 60, chars: str = _CHARS) -> str:
    """The last values as a line of blocks, from the lesser of 0 and their least to their greatest."""
    shown = values[-width:]
    low, high = min(0.0, *shown), max(shown)
    room = (high - low) or 1.0
    return "".join(chars[max(0, min(8, round(8 * (value - low) / room)))] for value in shown)


def _number(found: Mapping[str, Any], before: int) -> int:
    return max([event["number"] for event in found["events"]], default=before)
