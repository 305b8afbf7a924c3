"""Words and figures for a terminal: pure functions from what a Viewer says to rich's renderables.

Whatever a job or a model said is shown as plain text: `clean` makes control characters visible, so that no terminal
obeys them, and nothing is read as rich's markup.
"""

import json
import math
import time
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..ledger.state import STATES
from ..types import shortened

_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")  # controls, format (bidi, zero width), surrogates, private use
_LEVELS = {"ok": "green", "warning": "yellow", "error": "bold red"}
_STATE_STYLES = {"lost": "red", "dropped": "yellow", "claimed": "cyan", "published": "blue", "generating": "magenta"}
_STANDS = {"running": "green", "complete": "green", "live": "green", "failed": "bold red", "dead": "bold red"}
_NONE = "-"
_WHOLE = 20_000  # characters of what is not cut
_BLOCKED = "not looked at: it needs"
_ADVICE = (("why it matters", "why"), ("what to do", "do"))


def clean(text: Any, lines: bool = False, most: int = 2000) -> str:
    """Text that a terminal only shows; `lines`: line ends and tabs stay."""
    kept = "\n\t" if lines else ""
    cut = shortened(text, most)
    return "".join(c if c in kept or unicodedata.category(c) not in _HIDDEN else _visible(c) for c in cut)


def dumps(value: Any, indent: int | None = None) -> str:
    """JSON, ASCII only, so that no terminal obeys it; what is no number is null."""
    return json.dumps(_finite(value), indent=indent, default=str, allow_nan=False)


def bytes_text(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def span_text(seconds: float | None) -> str:
    """A duration as people say it."""
    if seconds is None:
        return _NONE
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} d"


def clock_text(at: float) -> str:
    return time.strftime("%m-%d %H:%M:%S", time.localtime(at)) if at else _NONE


def jobs_table(jobs: Mapping[str, Mapping[str, Any]], wide: bool = False) -> RenderableType:
    """One line a job; `jobs` by (namespace and) job id. `wide`: every column."""
    rows = []
    for name, status in sorted(jobs.items()):
        recent = status["recent"]
        row: dict[str, str | Text] = {"job": clean(name), "state": _stands(status["state"])}
        row |= {name: str(status[name]) for name in ("published", *(("claimed",) if wide else ()), "acked")}
        row |= {"queue": str(status["queue_depth"]), "per min": _number(recent["per_minute"])}
        row |= {"reward": _number(recent["reward"])}
        rows.append({**row, **({"how it stands": _standing(status["standing"][0])} if wide else {})})
    return _table(rows, folds=("job",)) if jobs else Text("no jobs yet")


def status_view(status: Mapping[str, Any], events: Sequence[Mapping[str, Any]] = ()) -> RenderableType:
    """All figures of a job."""
    recent, waited = status["recent"], status["waited"]
    figures = {
        "rollouts": _counts(status),
        "queue": f"{status['queue_depth']}, oldest {span_text(status['oldest_queued_s'])}; {status['leased']} leased, "
        f"{status['demanded']} demanded; {bytes_text(status['held_bytes'])} held",
        "pace": _pace(recent),
        "weights": f"version {_number(status['weight_version'])}{_behind(status['staleness'])}",
        "waits": _waits(recent, waited),
        "since": f"{clock_text(status['began'])}; last change {span_text(status['idle_s'])} ago; "
        f"restarts {', '.join(f'{clean(k)} {v}' for k, v in status['restarts'].items()) or 'none'}",
        "store": _store(status),
    }
    clients = {"rollout job": status["producer"], **{f"group {k}": c for k, c in status["consumers"].items()}}
    who = _grid({name: _client(client) for name, client in clients.items()})
    body: list[RenderableType] = [*map(_standing, status["standing"]), Text(), who, Text(), _grid(figures)]
    if events:
        body += [Text(), events_table(events)]
    title = Text.assemble(clean(status["job_id"]), "  ", _stands(status["state"]), style="bold")
    return Panel(Group(*body), title=title, title_align="left")


def events_table(events: Sequence[Mapping[str, Any]]) -> RenderableType:
    return _table(
        [
            {
                "when": clock_text(event["at"]),
                "what": event["kind"],
                "": clean(f"rollout {event['rollout_id']}: " * (event["rollout_id"] >= 0) + event["text"], most=300),
            }
            for event in events
        ],
        folds=("",),
    )


def findings_table(findings: Sequence[Mapping[str, Any]]) -> RenderableType:
    """`doctor`: what was found, the worst first; what is well is a line, and so is all that could not be looked at."""
    order = ("error", "warning", "note", "ok")
    body: list[RenderableType] = []
    waiting: dict[str, list[str]] = {}
    for found in sorted(findings, key=lambda found: order.index(found["severity"])):
        if found["what"].startswith(_BLOCKED):
            waiting.setdefault(found["what"], []).append(found["check"])
            continue
        style = _LEVELS.get(found["severity"], "")
        place = f" [{clean(found['where'])}]" if found["where"] else ""
        head = f"{found['severity']:<8} {clean(found['check'])}{place}: {clean(found['what'])}"
        body.append(Text(head, style="" if found["severity"] == "ok" else style))
        if found["severity"] != "ok":
            body += [Text(f"         {name}: {clean(found[key])}") for name, key in _ADVICE if found[key]]
    body += [Text(f"note     {', '.join(map(clean, checks))}: {clean(what)}") for what, checks in waiting.items()]
    return Group(*body)


def rollouts_table(rows: Sequence[Mapping[str, Any]], wide: bool = False) -> RenderableType:
    """`ls`: one line a rollout. `wide`: every column."""
    shown = [_rollout(row) | (_rollout_times(row) if wide else {}) for row in rows]
    return _table(shown, right=True) if shown else Text("no rollouts")


def _rollout(row: Mapping[str, Any]) -> dict[str, str | Text]:
    return {
        "rollout": str(row["rollout_id"]),
        "state": state_text(row["state"]),
        "published": clock_text(row["published"]),
        "samples": _number(row["num_samples"] if row["num_samples"] >= 0 else None),
        "weights": _number(row["weight_version"]),
        "behind": _number(row["staleness"]),
        "reward": _number(row["reward"]),
    }


def _rollout_times(row: Mapping[str, Any]) -> dict[str, str | Text]:
    return {
        "size": bytes_text(row["nbytes"]) if row["nbytes"] else _NONE,
        "generated in": _between(row, "begun", "made" if row["made"] else "published"),
        "queued for": _between(row, "published", "claimed"),
        "to its ack": _between(row, "claimed", "acked"),
        "claims": _number(row["claims"] or None),
        "version": _number(row["version"] or None),
    }


def rollout_view(
    detail: Mapping[str, Any], found: Mapping[str, Any] | None, texts: Mapping[int, Any], wide: bool = False
) -> RenderableType:
    """`show`: all of one rollout; `found` is Viewer.samples, `texts` what a tokenizer made of samples, by index;
    `wide`: meta and values are not cut."""
    facts: dict[str, str | Text] = {}
    known = detail["progress"]
    if known is not None:
        row = {**known, "rollout_id": detail["rollout_id"]}
        facts = {**_rollout(row), **_rollout_times(row)}
        del facts["rollout"]
        facts["waited"] = (
            f"generation {span_text(known['producer_waited_s'])}, training {span_text(known['consumer_waited_s'])}"
        )
    for name, group in detail["groups"].items():
        version = "" if group["version"] is None else f" version {group['version']}"
        by = f", by the {clean(group['held_by'])}" if group["held_by"] else ""
        facts[f"group {clean(name)}"] = f"{group['state']}{version}{by}"
    for v in detail["versions"]:
        facts[f"version {v['version']}"] = "\n".join(
            [
                f"published {clock_text(v['published_at'])}, {v['num_samples']} samples, {v['nbytes']:,} bytes, "
                f"parts {v['parts']}, weights {_number(v['weight_version'])}",
                f"vault {clean(v['vault'] or _NONE)}",
                *([f"durable store: {clean(v['stored'])}"] if v["stored"] else []),
                f"meta {clean(dumps(v['meta']), most=_WHOLE if wide else 200)}",
            ]
        )
    body: list[RenderableType] = [_grid(facts)]
    if detail["events"]:
        body += [Text(), events_table(detail["events"])]
    if found is not None and "columns" in found:
        columns = ", ".join(f"{clean(name)} ({kind})" for name, kind in found["columns"].items())
        body.append(Text(f"columns: {columns}"))
        body += [sample_view(sample, texts.get(sample["index"]), wide) for sample in found["samples"]]
    elif found is not None:
        body.append(Text(clean(dumps(found["value"]), most=2000)))
    title = Text(f"rollout {detail['rollout_id']} of {clean(detail['job_id'])}", style="bold")
    return Panel(Group(*body), title=title, title_align="left")


def sample_view(sample: Mapping[str, Any], text: Any = None, wide: bool = False) -> RenderableType:
    """One sample: texts whole, numbers cut, unless `wide`."""
    grid = Table.grid(padding=(0, 2))
    if text is not None:
        for name, words in text.items():
            grid.add_row(Text(name, style="dim"), Text(clean(words, lines=True)))
    for name, value in sample["values"].items():
        shown = (
            clean(value, lines=True) if isinstance(value, str) else clean(dumps(value), most=_WHOLE if wide else 160)
        )
        grid.add_row(Text(clean(name), style="dim"), Text(shown))
    return Panel(grid, title=Text(f"sample {sample['index']}"), title_align="left", border_style="dim")


def state_text(state: str) -> Text:
    return Text(state if state in STATES else clean(state), style=_STATE_STYLES.get(state, ""))


def _standing(said: Mapping[str, str]) -> Text:
    return Text(clean(said["text"]), style=_LEVELS.get(said["level"], ""))


def _counts(status: Mapping[str, Any]) -> str:
    words = [f"{status[name]} {name}" for name in ("published", "claimed", "acked", "freed")]
    words += [f"{status[n]} {n}" for n in ("regenerated", "dropped", "requeued", "rewound") if status[n]]
    words += [f"{len(status['lost'])} lost"] if status["lost"] else []
    return ", ".join(words)


def _pace(recent: Mapping[str, Any]) -> str:
    if recent["per_minute"] is None:
        return _so_far(recent)
    reward = f"; mean reward {_number(recent['reward'])}" if recent["reward"] is not None else ""
    pace = f"{_number(recent['per_minute'])} rollouts/min, {_number(recent['samples_per_s'])} samples/s"
    return f"{pace}, over the last {recent['rollouts']}{reward}"


def _behind(staleness: int | None) -> str:
    return "" if staleness is None else f"; the oldest queued rollout is {staleness} behind"


def _so_far(recent: Mapping[str, Any]) -> str:
    claimed = recent["rollouts"]
    return f"{claimed} rollout{'' if claimed == 1 else 's'} claimed so far"


def _waits(recent: Mapping[str, Any], waited: Mapping[str, float]) -> str:
    shares = _so_far(recent)
    if recent["bottleneck"] is not None:
        shares = f"training {recent['consumer_waited_share']:.0%}, generation {recent['producer_waited_share']:.0%} "
        shares += f"of the last {recent['rollouts']} rollouts (bottleneck {recent['bottleneck']:+.2f})"
    all_of_it = ", ".join(f"{what} {span_text(s)}" for what, s in waited.items() if s >= 0.1)
    return f"{shares}; in all: {all_of_it or 'none'}"


def _store(status: Mapping[str, Any]) -> str:
    if status["store"] is None:
        return "none: what is published lies in the object store"
    return f"{clean(status['store'])}, {status['store_mode']}, {status['unstored']} not stored yet"


def _client(client: Mapping[str, Any] | None) -> Text:
    if client is None:
        return Text("absent", style="yellow")
    state = "dead" if client["presumed_dead"] else client["state"]
    does = state in ("live", "silent")
    doing = f"{clean(client['activity'], most=200)}, for {span_text(client['activity_s'])}" if does else ""
    said = [doing or clean(client["reason"], most=200), f"last sign {span_text(client['silent_s'])} ago"]
    where = (
        f"{clean(client['host'])}:{client['pid']}, Ray job {clean(client['submission_id'] or client['ray_job_id'])}"
    )
    return Text.assemble(_stands(state), f": {'; '.join(filter(None, said))}", f"\n{where}, epoch {client['epoch']}")


def _stands(state: str) -> Text:
    """The state of a job, or of a client."""
    return Text(clean(state), style=_STANDS.get(state, "yellow"))


def _between(row: Mapping[str, Any], begin: str, end: str) -> str:
    return span_text(max(0.0, row[end] - row[begin])) if row[begin] and row[end] else _NONE


def _number(value: float | None) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return _NONE
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _table(rows: Sequence[Mapping[str, str | Text]], folds: Sequence[str] = (), right: bool = False) -> Table:
    """The keys of the rows are the columns; those that `folds` names are folded where there is no room. `right`: all
    but the state are numbers."""
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    for name in rows[0] if rows else ():
        justify: Literal["right", "left"] = "right" if right and name != "state" else "left"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=name not in folds)
    for row in rows:
        table.add_row(*row.values())
    return table


def _grid(facts: Mapping[str, str | Text]) -> Table:
    """A line for each of these, or several."""
    grid = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        grid.add_row(Text(clean(name), style="dim", no_wrap=True), Text(value) if isinstance(value, str) else value)
    return grid


def _visible(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65_536 else f"\\U{code:08x}"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
