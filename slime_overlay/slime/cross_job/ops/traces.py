"""One span tree a rollout: as a file for Perfetto (ui.perfetto.dev, chrome://tracing), or by OTLP.

    rollout N ─┬─ demand      demanded, until it was begun
               ├─ generate    until all of it was there
               ├─ publish     until the broker knew it, and hence everybody
               ├─ queue       until it was claimed
               ├─ claim, transfer, train, weights, save, ack     as the train job tells them (--cross-job-traces on)
               └─ hold        from the claim to the ack, where it tells nothing

Times are wall clocks of the broker, of the vault (end of `generate`) and of the train job (what it tells): where those
differ, so do the spans (`doctor` looks at the clocks). A rollout's ids are always the same: it may be sent twice.
"""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import BadInput, Unreachable

ROLLOUT_JOB, BETWEEN, TRAIN_JOB = "rollout job", "between", "train job"
_SEND_S = 10.0
_SENT_AT_ONCE = 500
_PHASES = (  # name, begin, end, where
    ("demand", "demanded", "begun", BETWEEN),
    ("generate", "begun", "made", ROLLOUT_JOB),
    ("publish", "made", "published", ROLLOUT_JOB),
    ("queue", "published", "claimed", BETWEEN),
)


@dataclass(frozen=True)
class Span:
    """`children` lie within it; times are wall clocks in seconds."""

    name: str
    where: str
    rollout_id: int
    begin: float
    end: float
    facts: dict[str, Any] = field(default_factory=dict)
    children: tuple["Span", ...] = ()


def spans_of(look: Mapping[str, Any], last: int) -> list[Span]:
    """The trees of the newest `last` rollouts, oldest first; `look` is Viewer.look(..., spans=True)."""
    told: dict[int, dict[tuple[Any, ...], str]] = defaultdict(dict)  # a retry may have told one twice
    for name, rollout_id, begin, end, role in look.get("spans", ()):
        told[rollout_id][(name, begin, end)] = role
    rows = sorted(look["progress"], key=lambda row: row["rollout_id"])[-last:]
    trees = [_tree(row, told.get(row["rollout_id"], {})) for row in rows]
    return [tree for tree in trees if tree is not None]


def chrome(job_id: str, trees: Sequence[Span]) -> dict[str, Any]:
    """Chrome's trace event format, times in whole microseconds: one row a rollout, and more where its spans overlap
    (clocks may differ), because Perfetto drops what lies neither within another span of its row nor beside it."""
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "args": {"name": f"slime cross-job: {job_id}"}}
    ]
    tid = 0
    for tree in trees:
        for spans in _rows(tree):
            tid += 1
            row = {"pid": 1, "tid": tid}
            events.append({"ph": "M", "name": "thread_name", **row, "args": {"name": f"rollout {tree.rollout_id}"}})
            for begin, end, span in spans:
                times = {"ts": begin, "dur": end - begin}
                facts = {"rollout_id": tree.rollout_id, **span.facts, "where": span.where}
                events.append({"ph": "X", "name": span.name, "cat": span.where, **row, **times, "args": facts})
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"job_id": job_id}}


def _rows(tree: Span) -> list[list[tuple[int, int, Span]]]:
    """(begin, end, span) in microseconds, in rows in which each lies within or beside every other. Both ends are
    rounded, not the length: else neighbours overlap by one microsecond."""
    spans = [(round(1e6 * span.begin), round(1e6 * span.end), span) for span in (tree, *tree.children)]
    rows: list[list[tuple[int, int, Span]]] = []
    ends: list[list[int]] = []  # of what is open in each row
    for begin, end, span in sorted(spans, key=lambda one: (one[0], -one[1])):
        ends = [[still for still in row if still > begin] for row in ends]
        at = next((n for n, still in enumerate(ends) if not still or end <= still[-1]), len(rows))
        if at == len(rows):
            rows.append([])
            ends.append([])
        rows[at].append((begin, end, span))
        ends[at].append(end)
    return rows


def send(endpoint: str, job_id: str, trees: Sequence[Span]) -> int:
    """Send them by OTLP over HTTP to http://HOST:PORT (or a whole path); returns how many spans that were.

    Raises:
        BadInput: no address, or the package is missing. Unreachable: it was not taken.
    """
    if not endpoint.startswith(("http://", "https://")):
        raise BadInput(f"--otlp {endpoint}: give http://HOST:4318, where an OpenTelemetry collector listens")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import SpanExportResult
    except ImportError as error:
        raise BadInput(
            f"--otlp needs opentelemetry's exporter: pip install opentelemetry-exporter-otlp-proto-http ({error})"
        ) from None
    url = endpoint if "/v1/" in endpoint else f"{endpoint.rstrip('/')}/v1/traces"
    exporter = OTLPSpanExporter(endpoint=url, timeout=_SEND_S)
    made = [span for tree in trees for span in _opentelemetry(job_id, tree)]
    try:
        for at in range(0, len(made), _SENT_AT_ONCE):
            if exporter.export(made[at : at + _SENT_AT_ONCE]) is not SpanExportResult.SUCCESS:
                raise Unreachable(
                    f"{url} did not take the spans: is an OpenTelemetry collector there (OTLP over HTTP)?"
                )
    finally:
        exporter.shutdown()
    return len(made)


def _tree(row: Mapping[str, Any], told: Mapping[tuple[Any, ...], str]) -> Span | None:
    rollout_id = row["rollout_id"]
    children = []
    for phase, from_, to, where in _PHASES:
        until = row[to] or (row["published"] if phase == "generate" else 0.0)
        if row[from_] and until:
            children.append(Span(phase, where, rollout_id, row[from_], max(row[from_], until)))
    for (name, begin, end), role in sorted(told.items(), key=lambda item: item[0][1]):
        where = ROLLOUT_JOB if role == "producer" else TRAIN_JOB
        children.append(Span(name, where, rollout_id, begin, max(begin, end)))
    if not any(child.where == TRAIN_JOB for child in children) and row["claimed"] and row["acked"]:
        children.append(Span("hold", TRAIN_JOB, rollout_id, row["claimed"], max(row["claimed"], row["acked"])))
    if not children:
        return None
    names = ("state", "weight_version", "staleness", "nbytes", "num_samples", "reward", "version", "claims", "losses")
    facts = {name: row[name] for name in names if row[name] is not None}
    facts["rollout_id"] = rollout_id
    begin, end = min(child.begin for child in children), max(child.end for child in children)
    return Span(f"rollout {rollout_id}", BETWEEN, rollout_id, begin, end, facts, tuple(children))


def _opentelemetry(job_id: str, tree: Span) -> list[Any]:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import SpanContext, TraceFlags

    trace_id = _number(16, job_id, tree.rollout_id, round(1e6 * tree.begin))
    resource = Resource.create({"service.name": "slime-cross-job", "slime.cross_job.job_id": job_id})

    def made(span: Span, at: int, parent: Any) -> Any:
        context = SpanContext(trace_id, _number(8, trace_id, at), False, TraceFlags(TraceFlags.SAMPLED))
        return ReadableSpan(
            name=span.name,
            context=context,
            parent=parent,
            resource=resource,
            attributes={"where": span.where, "rollout_id": span.rollout_id, **span.facts},
            start_time=round(1e9 * span.begin),
            end_time=round(1e9 * span.end),
        )

    root = made(tree, 0, None)
    return [root, *(made(child, at, root.context) for at, child in enumerate(tree.children, 1))]


def _number(size: int, *parts: Any) -> int:
    """An id that is the same whenever it is asked for."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=size).digest(), "big")
