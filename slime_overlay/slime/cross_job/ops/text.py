"""Words and figures for a terminal: pure functions from what a Viewer says to rich's renderables.

Whatever a job or a model said is shown as plain text: `clean` makes control characters visible, so that no terminal
obeys them, and nothing is read as rich's markup.
"""

import json
import math
import time
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..records import STATES

_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")  # controls, format (bidi, zero width), surrogates, private use
_LEVELS = {"ok": "green", "warning": "yellow", "error": "bold red"}
_STATE_STYLES = {"lost": "red", "dropped": "yellow", "claimed": "cyan", "published": "blue", "generating": "magenta"}
_NONE = "-"
_BLOCKED = "not looked at: it needs"
_ADVICE = (("why it matters", "why"), ("what to do", "do"))


def clean(text: Any, lines: bool = False, most: int = 2000) -> str:
    """Text that a terminal only shows; `lines`: line ends and tabs stay."""
    text = str(text)
    cut = text[:most]
    kept = "\n\t" if lines else ""
    shown = "".join(c if c in kept or unicodedata.category(c) not in _HIDDEN else _visible(c) for c in cut)
    return f"{shown}… {len(text) - most:,} more characters" if len(text) > most else shown


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


def jobs_table(jobs: Mapping[str, Mapping[str, Any]]) -> RenderableType:
    """One line a job; `jobs` by (namespace and) job id."""
    table = _table("job", "state", "published", "claimed", "acked", "queue", "per min", "reward", "how it stands")
    for name, status in sorted(jobs.items()):
        recent = status["recent"]
        state = "complete" if status["complete"] else status["control"]
        figures = [status[name] for name in ("published", "claimed", "acked", "queue_depth")]
        table.add_row(
            clean(name),
            state,
            *map(_number, figures),
            _number(recent["per_minute"]),
            _number(recent["reward"]),
            _standing(status["standing"][0]),
        )
    return table if jobs else Text("no jobs yet")


def status_view(status: Mapping[str, Any], events: Sequence[Mapping[str, Any]] = ()) -> RenderableType:
    """All figures of a job."""
    who = _table("", "state", "doing", "for", "last sign", "where", "Ray job", "epoch")
    who.add_row("rollout job", *_client(status["producer"]))
    for group, client in status["consumers"].items():
        who.add_row(f"group {clean(group)}", *_client(client))
    recent, waited = status["recent"], status["waited"]
    grid = Table.grid(padding=(0, 2))
    for name, text in (
        ("rollouts", _counts(status)),
        (
            "queue",
            f"{status['queue_depth']}, oldest {span_text(status['oldest_queued_s'])}; {status['leased']} leased, "
            f"{status['demanded']} demanded; {bytes_text(status['held_bytes'])} held",
        ),
        ("pace", _pace(recent)),
        (
            "weights",
            f"version {_number(status['weight_version'])}; the queue is {_number(status['staleness'])} behind",
        ),
        ("waits", _waits(recent, waited)),
        (
            "since",
            f"{clock_text(status['began'])}; last change {span_text(status['idle_s'])} ago; "
            f"restarts {', '.join(f'{clean(k)} {v}' for k, v in status['restarts'].items()) or 'none'}",
        ),
        ("store", _store(status)),
    ):
        grid.add_row(Text(name, style="dim"), Text(text))
    title = Text(f"{clean(status['job_id'])}  {'complete' if status['complete'] else status['control']}", style="bold")
    body: list[RenderableType] = [*map(_standing, status["standing"]), Text(), who, Text(), grid]
    if events:
        body += [Text(), events_table(events)]
    return Panel(Group(*body), title=title, title_align="left")


def events_table(events: Sequence[Mapping[str, Any]]) -> RenderableType:
    table = _table("when", "what", "rollout", "")
    for event in events:
        rollout = "" if event["rollout_id"] < 0 else str(event["rollout_id"])
        table.add_row(clock_text(event["at"]), event["kind"], rollout, clean(event["text"], most=300))
    return table


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


def rollouts_table(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """`ls`: one line a rollout."""
    table = _table(
        *("rollout", "state", "published", "samples", "size", "weights", "behind", "reward"),
        *("generated in", "queued for", "to its ack", "claims", "version"),
        numbers=13,
    )
    for row in rows:
        table.add_row(
            str(row["rollout_id"]),
            state_text(row["state"]),
            clock_text(row["published"]),
            _number(row["num_samples"] if row["num_samples"] >= 0 else None),
            bytes_text(row["nbytes"]) if row["nbytes"] else _NONE,
            _number(row["weight_version"]),
            _number(row["staleness"]),
            _number(row["reward"]),
            _between(row, "begun", "made" if row["made"] else "published"),
            _between(row, "published", "claimed"),
            _between(row, "claimed", "acked"),
            _number(row["claims"] or None),
            _number(row["version"] or None),
        )
    return table


def rollout_view(
    detail: Mapping[str, Any], found: Mapping[str, Any] | None, texts: Mapping[int, Any]
) -> RenderableType:
    """`show`: all of one rollout; `found` is Viewer.samples, `texts` what a tokenizer made of samples, by index."""
    body: list[RenderableType] = []
    known = detail["progress"]
    if known is not None:
        body.append(rollouts_table([{**known, "rollout_id": detail["rollout_id"]}]))
        waited = f"before it, generation waited {span_text(known['producer_waited_s'])}"
        body.append(Text(f"{waited}, training {span_text(known['consumer_waited_s'])}", style="dim"))
    groups = _table("group", "state", "version", "held by")
    for name, group in detail["groups"].items():
        groups.add_row(clean(name), group["state"], _number(group["version"]), clean(group["held_by"]))
    versions = _table("version", "published", "samples", "parts", "bytes", "weights", "vault", "store", "meta")
    for v in detail["versions"]:
        meta = clean(dumps(v["meta"]), most=200)
        versions.add_row(
            str(v["version"]),
            clock_text(v["published_at"]),
            str(v["num_samples"]),
            str(v["parts"]),
            f"{v['nbytes']:,}",
            _number(v["weight_version"]),
            clean(v["vault"][-24:] or _NONE),
            clean(v["stored"] or _NONE),
            meta,
        )
    body += [groups, versions]
    if detail["events"]:
        body.append(events_table(detail["events"]))
    if found is not None and "columns" in found:
        columns = ", ".join(f"{clean(name)} ({kind})" for name, kind in found["columns"].items())
        body.append(Text(f"columns: {columns}"))
        body += [sample_view(sample, texts.get(sample["index"])) for sample in found["samples"]]
    elif found is not None:
        body.append(Text(clean(dumps(found["value"]), most=2000)))
    title = Text(f"rollout {detail['rollout_id']} of {clean(detail['job_id'])}", style="bold")
    return Panel(Group(*body), title=title, title_align="left")


def sample_view(sample: Mapping[str, Any], text: Any = None) -> RenderableType:
    """One sample: texts whole, numbers cut."""
    grid = Table.grid(padding=(0, 2))
    if text is not None:
        for name, words in text.items():
            grid.add_row(Text(name, style="dim"), Text(clean(words, lines=True)))
    for name, value in sample["values"].items():
        shown = clean(value, lines=True) if isinstance(value, str) else clean(dumps(value), most=160)
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
    if not recent["rollouts"]:
        return "nothing was claimed yet"
    reward = f"; mean reward {_number(recent['reward'])}" if recent["reward"] is not None else ""
    pace = f"{_number(recent['per_minute'])} rollouts/min, {_number(recent['samples_per_s'])} samples/s"
    return f"{pace}, over the last {recent['rollouts']}{reward}"


def _waits(recent: Mapping[str, Any], waited: Mapping[str, float]) -> str:
    shares = "nobody yet"
    if recent["bottleneck"] is not None:
        shares = f"training {recent['consumer_waited_share']:.0%}, generation {recent['producer_waited_share']:.0%} "
        shares += f"of the last {recent['rollouts']} rollouts (bottleneck {recent['bottleneck']:+.2f})"
    all_of_it = ", ".join(f"{what} {span_text(s)}" for what, s in waited.items() if s >= 0.1)
    return f"{shares}; in all: {all_of_it or 'none'}"


def _store(status: Mapping[str, Any]) -> str:
    if status["store"] is None:
        return "none: what is published lies in the object store"
    return f"{clean(status['store'])}, {status['store_mode']}, {status['unstored']} not stored yet"


def _client(client: Mapping[str, Any] | None) -> list[Any]:
    if client is None:
        return ["absent", *([""] * 6)]
    state = "dead" if client["presumed_dead"] else client["state"]
    style = {"live": "green", "failed": "bold red", "dead": "bold red"}.get(state, "yellow")
    doing = client["activity"] if state in ("live", "silent") else client["reason"]
    return [
        Text(state, style=style),
        clean(doing, most=120),
        span_text(client["activity_s"]),
        f"{span_text(client['silent_s'])} ago",
        f"{clean(client['host'])}:{client['pid']}",
        clean(client["submission_id"] or client["ray_job_id"]),
        str(client["epoch"]),
    ]


def _between(row: Mapping[str, Any], begin: str, end: str) -> str:
    return span_text(max(0.0, row[end] - row[begin])) if row[begin] and row[end] else _NONE


def _number(value: float | None) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return _NONE
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _table(*names: str, numbers: int = 0) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    for at, name in enumerate(names):
        table.add_column(name, justify="right" if numbers and at not in (1,) else "left", overflow="fold")
    return table


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
