"""Span trees of rollouts: what is in them, Perfetto's file, OTLP against a server that reads protobuf."""

import collections
import contextlib
import gzip
import itertools
import json
import random
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from slime.cross_job.errors import BadInput, Unreachable
from slime.cross_job.ops import traces

ROW = {
    **{"rollout_id": 7, "state": "freed", "demanded": 100.0, "begun": 101.0, "made": 104.0, "published": 104.5},
    **{"claimed": 105.0, "acked": 109.0, "weight_version": 6, "staleness": 1, "nbytes": 10, "num_samples": 4},
    **{"reward": 0.5, "version": 1, "claims": 1, "losses": 0},
}
TOLD = [
    ("transfer", 7, 105.1, 105.2, "consumer"),
    ("train", 7, 105.2, 108.0, "consumer"),
    ("train", 7, 105.2, 108.0, "consumer"),  # told twice, because an answer was lost
    ("save", 7, 108.0, 108.9, "consumer"),
    ("train", 8, 1.0, 2.0, "consumer"),
]


def names(tree: traces.Span) -> list[str]:
    return [span.name for span in tree.children]


def test_the_tree_of_a_rollout():
    (tree,) = traces.spans_of({"progress": [ROW], "spans": TOLD}, 50)
    assert (tree.name, tree.begin, tree.end) == ("rollout 7", 100.0, 109.0 - 0.1)
    assert names(tree) == ["demand", "generate", "publish", "queue", "transfer", "train", "save"]
    assert tree.facts["reward"] == 0.5
    generate = tree.children[1]
    assert (generate.begin, generate.end, generate.where) == (101.0, 104.0, "rollout job")


def test_where_the_train_job_tells_nothing_the_lease_is_shown():
    (tree,) = traces.spans_of({"progress": [ROW]}, 50)
    assert names(tree) == ["demand", "generate", "publish", "queue", "hold"]


def test_what_is_under_way_is_as_long_as_it_is_known():
    early = {**ROW, "made": 0.0, "published": 0.0, "claimed": 0.0, "acked": 0.0}
    assert names(traces.spans_of({"progress": [early]}, 1)[0]) == ["demand"]
    assert traces.spans_of({"progress": [{**early, "begun": 0.0}]}, 1) == []
    ahead = {**ROW, "begun": 99.0, "demanded": 103.0}  # begun before it was demanded
    assert all(span.end >= span.begin for span in traces.spans_of({"progress": [ahead]}, 1)[0].children)


def test_only_the_newest():
    rows = [{**ROW, "rollout_id": n} for n in (3, 1, 2)]
    assert [tree.rollout_id for tree in traces.spans_of({"progress": rows}, 2)] == [2, 3]


def test_perfettos_file():
    trees = traces.spans_of({"progress": [ROW], "spans": TOLD}, 50)
    made = json.loads(json.dumps(traces.chrome("exp", trees)))
    spans = {event["name"]: event for event in made["traceEvents"] if event["ph"] == "X"}
    assert spans["train"]["ts"] == 105_200_000
    assert spans["train"]["dur"] == 2_800_000
    root = spans["rollout 7"]
    for span in spans.values():  # a row of Perfetto's shows what lies within as within
        assert span["tid"] == root["tid"]
        assert root["ts"] <= span["ts"]
        assert span["ts"] + span["dur"] <= root["ts"] + root["dur"]


@pytest.mark.parametrize("seed", range(20))
def test_spans_of_a_row_lie_within_or_beside_each_other(seed):
    """Perfetto drops others."""
    chance = random.Random(seed)
    names = ("demanded", "begun", "made", "published", "claimed", "acked")
    times = sorted(1.7e9 + 10 * chance.random() for _ in names)
    row = {**ROW, **dict(zip(names, times, strict=True))}
    told = [("claim", 7, times[1] + 0.1, times[4], "consumer"), ("train", 7, times[4], times[5], "consumer")]
    row["made"] += seed % 3  # the vault's clock
    made = traces.chrome("exp", traces.spans_of({"progress": [row, {**row, "rollout_id": 8}], "spans": told}, 50))
    rows = collections.defaultdict(list)
    for event in made["traceEvents"]:
        if event["ph"] == "X":
            rows[event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert sum(map(len, rows.values())) == 2 + 6 + 5
    for spans in rows.values():
        for one, other in itertools.combinations(sorted(spans, key=lambda span: (span[0], -span[1])), 2):
            assert other[0] >= one[1] or other[1] <= one[1], (one, other)


@contextlib.contextmanager
def collector(status: int = 200):
    """A server in the place of an OpenTelemetry collector: it reads what is sent as OTLP says, and answers so."""
    received: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            received.append((self.path, ExportTraceServiceRequest.FromString(body)))
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", received
        finally:
            server.shutdown()


def test_otlp():
    trees = traces.spans_of({"progress": [ROW, {**ROW, "rollout_id": 8}], "spans": TOLD}, 50)
    with collector() as (address, received):
        sent, again = (traces.send(address, "exp", trees) for _ in range(2))
    path, request = received[0]
    assert path == "/v1/traces"
    spans = [s for resource in request.resource_spans for scope in resource.scope_spans for s in scope.spans]
    assert sent == len(spans) == 2 + sum(len(tree.children) for tree in trees)
    by_trace: dict[bytes, list[Any]] = {}
    for span in spans:
        by_trace.setdefault(span.trace_id, []).append(span)
    assert len(by_trace) == 2
    for tree in by_trace.values():
        (root,) = [span for span in tree if not span.parent_span_id]
        assert all(span.parent_span_id == root.span_id for span in tree if span is not root)
    assert again == sent
    assert {s.span_id for r in received[1][1].resource_spans for c in r.scope_spans for s in c.spans} == {
        span.span_id for span in spans
    }


def test_nobody_listens():
    trees = traces.spans_of({"progress": [ROW]}, 1)
    with pytest.raises(BadInput, match="http://HOST:4318"):
        traces.send("localhost:4318", "exp", trees)


@pytest.mark.parametrize("status", [404, 400])
def test_a_collector_that_refuses(status):
    trees = traces.spans_of({"progress": [ROW]}, 1)
    with collector(status) as (address, _), pytest.raises(Unreachable, match="did not take the spans"):
        traces.send(address, "exp", trees)
