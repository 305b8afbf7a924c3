"""The reading commands: jobs, status, top, ls, show, tail, wait, doctor, trace, report, web."""

import contextlib
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import BadInput, ClusterUnreachable, CrossJobError, HeldBack, Unreachable, WaitTimeout
from ..ledger.state import STATES
from . import text
from .app import (
    DEFAULT,
    Address,
    JobId,
    Json,
    Namespace,
    RolloutId,
    Wide,
    app,
    cluster_at,
    connected,
    named,
    out,
    out_json,
    out_text,
    say,
)

_PATIENCE_S = 300.0  # of what follows, while the broker does not answer


@app.command()
def jobs(
    address: Address = None,
    namespace: Namespace = DEFAULT,
    everywhere: Annotated[
        bool, typer.Option("--all-namespaces", "-A", help="those of all namespaces of the cluster")
    ] = False,
    wide: Wide = False,
    as_json: Json = False,
) -> None:
    """All jobs of a namespace, one line each."""
    found: dict[str, Any] = {}
    if everywhere:
        from .viewer import Viewer

        for name in Viewer.namespaces(cluster_at(address)):
            try:
                found |= {f"{name}/{job}": status for job, status in connected(address, name).jobs().items()}
            except (Unreachable, WaitTimeout) as error:  # the others are of interest all the same
                say(f"namespace {name} is not shown: {text.clean(error)}")
    else:
        found = connected(address, namespace).jobs()
    if as_json:
        out_json(found)
    else:
        out(text.jobs_table(found, wide), wide)


@app.command()
def status(
    address: Address = None, namespace: Namespace = DEFAULT, job_id: JobId = None, as_json: Json = False
) -> None:
    """How a job stands: who is there, who waits for whom, counts, pace, the last events."""
    viewer = connected(address, namespace)
    found = viewer.look(viewer.the_job(job_id), limit=0)
    if as_json:
        out_json({**found["status"], "last_events": found["events"][-20:]})
    else:
        out(text.status_view(found["status"], found["events"][-6:]))


@app.command()
def top(
    address: Address = None,
    namespace: Namespace = DEFAULT,
    job_id: JobId = None,
    every_s: Annotated[float, typer.Option("--every", help="seconds between two looks", min=0.1)] = 0.5,
    once: Annotated[bool, typer.Option("--once", help="one picture, then end")] = False,
    wide: Wide = False,
) -> None:
    """How a job stands, live, until Ctrl-C."""
    from .top import run

    viewer = connected(address, namespace)
    run(viewer, viewer.the_job(job_id), every_s, once, wide)


@app.command()
def ls(
    address: Address = None,
    namespace: Namespace = DEFAULT,
    job_id: JobId = None,
    state: Annotated[list[str] | None, typer.Option("--state", "-s", help=f"only these: {', '.join(STATES)}")] = None,
    limit: Annotated[int, typer.Option("--limit", "-l", help="rollouts a page", min=1)] = 40,
    before: Annotated[int | None, typer.Option("--before", help="only those with a lower id: the next page")] = None,
    wide: Wide = False,
    as_json: Json = False,
) -> None:
    """Rollouts, the newest first, a page at a time."""
    if wrong := [name for name in state or [] if name not in STATES]:
        raise BadInput(f"--state {wrong[0]} is not a state: there are {', '.join(STATES)}")
    viewer = connected(address, namespace)
    rows = viewer.look(viewer.the_job(job_id))["progress"]
    rows = [row for row in rows if not state or row["state"] in state]
    rows = [row for row in rows if before is None or row["rollout_id"] < before]
    rows.sort(key=lambda row: row["rollout_id"], reverse=True)
    page = rows[:limit]
    if as_json:
        out_json({"rollouts": page, "more": len(rows) - len(page)})
        return
    out(text.rollouts_table(page, wide), wide)
    if len(rows) > len(page):
        say(f"{len(rows) - len(page)} more: --before {page[-1]['rollout_id']}")


@app.command()
def show(
    rollout: RolloutId,
    address: Address = None,
    namespace: Namespace = DEFAULT,
    job_id: JobId = None,
    samples: Annotated[int, typer.Option("--samples", help="how many samples to show", min=0, max=1000)] = 1,
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", help="folder or name, to read tokens with")] = None,
    wide: Annotated[bool, typer.Option("--wide", "-w", help="meta and values whole")] = False,
    as_json: Json = False,
) -> None:
    """All of one rollout: times, versions, leases, columns, some samples."""
    viewer = connected(address, namespace)
    job = viewer.the_job(job_id)
    detail = viewer.detail(job, rollout)
    found, texts = None, {}
    if detail["versions"]:
        from .export import MOST_TOKENS, read_tokens

        limits = {"numbers": MOST_TOKENS} if tokenizer else {}
        try:
            found = viewer.samples(job, rollout, count=samples, **limits)
        except Unreachable as error:
            say(f"its samples cannot be read: {text.clean(error)}")
        if tokenizer and found is not None:
            texts = read_tokens(tokenizer, found)
    if as_json:
        out_json({**detail, "samples": found, "texts": texts})
    else:
        out(text.rollout_view(detail, found, texts, wide))


@app.command()
def tail(
    address: Address = None,
    namespace: Namespace = DEFAULT,
    job_id: JobId = None,
    last: Annotated[int, typer.Option("--last", help="begin with this many past events", min=0)] = 10,
    every_s: Annotated[float, typer.Option("--every", help="seconds between two looks", min=0.1)] = 0.5,
    as_json: Json = False,
) -> None:
    """Follow what happens to rollouts and jobs, until the job is complete."""
    from .report import changed_at

    viewer = connected(address, namespace)
    job = viewer.the_job(job_id)
    found = viewer.look(job, limit=last)
    events = found["events"][-last:] if last else []
    heard = time.monotonic()
    while True:
        lines = [{"at": changed_at(row), "rollout": row} for row in found["progress"]]
        lines += [{"at": event["at"], "event": event} for event in events]
        for line in sorted(lines, key=lambda line: line["at"]):
            if as_json:
                out_json(line, lines=True)
            else:
                out_text(_line(line))
        if found["status"]["complete"]:
            return
        number = max([e["number"] for e in found["events"]], default=sum(found["status"]["events"].values()))
        while True:
            time.sleep(every_s)
            try:
                new = viewer.look(job, since=found["seq"], events_since=number)
                heard = time.monotonic()
                break
            except (Unreachable, WaitTimeout) as error:
                if time.monotonic() - heard > _PATIENCE_S or isinstance(error, ClusterUnreachable):
                    raise
                say(f"{text.clean(error, most=200)}: trying again")
        if new["seq"] < found["seq"]:  # the job began anew
            new = viewer.look(job, limit=last)
        found, events = new, new["events"]


@app.command()
def wait(
    address: Address = None,
    namespace: Namespace = DEFAULT,
    job_id: JobId = None,
    published: Annotated[int | None, typer.Option(help="until this many rollouts are published", min=1)] = None,
    claimed: Annotated[int | None, typer.Option(help="until this many are claimed", min=1)] = None,
    acked: Annotated[int | None, typer.Option(help="until this many are acked", min=1)] = None,
    complete: Annotated[bool, typer.Option("--complete", help="until both jobs are through")] = False,
    timeout_s: Annotated[float, typer.Option("--timeout", help="seconds, then exit code 5", min=0)] = 3600.0,
    as_json: Json = False,
) -> None:
    """Wait until a job has come so far; ends with exit code 5 at the deadline (9: it is paused), saying why."""
    goals = {"published": published, "claimed": claimed, "acked": acked}
    wanted = {name: number for name, number in goals.items() if number is not None}
    if not wanted and not complete:
        raise BadInput("say what to wait for: --published N, --claimed N, --acked N or --complete")
    viewer = connected(address, namespace)
    job = viewer.the_job(job_id)
    end = time.monotonic() + timeout_s
    found: dict[str, Any] = {}
    while True:
        try:
            found = viewer.status(job)
            if all(found[name] >= number for name, number in wanted.items()) and (found["complete"] or not complete):
                break
        except (Unreachable, WaitTimeout) as error:
            if time.monotonic() > end or isinstance(error, ClusterUnreachable):
                raise
        if found and time.monotonic() > end:
            kind = HeldBack if found["control"] != "running" else WaitTimeout
            raise kind(
                f"job {job} did not come so far within {timeout_s:g} s: {_counted(found, goals)}; "
                f"{found['standing'][0]['text']}"
            )
        if found and found["complete"]:
            raise WaitTimeout(f"job {job} is complete, with only {_counted(found, wanted)} rollouts")
        time.sleep(min(0.5, max(0.05, end - time.monotonic())))
    if as_json:
        out_json(found)
    else:
        out_text(text.clean(found["standing"][0]["text"]))


@app.command()
def doctor(
    address: Address = None,
    namespace: Namespace = DEFAULT,
    job_id: JobId = None,
    store: Annotated[str | None, typer.Option("--store", help="URI of a durable store to try, too")] = None,
    store_env: Annotated[
        str | None,
        typer.Option("--store-env", help="environment variable that holds the URI, where it has a password"),
    ] = None,
    store_file: Annotated[str | None, typer.Option("--store-file", help="file that holds the URI")] = None,
    slime: Annotated[Path | None, typer.Option("--slime", help="a checkout of slime to look at")] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", help="seconds in all", min=1)] = 60.0,
    as_json: Json = False,
) -> None:
    """Find what goes wrong in the field: cluster, token, broker, memory, clocks, jobs, leases, stores, versions."""
    from dataclasses import asdict

    from ..settings import store_uri
    from .doctor import diagnose

    folder, uri = None if slime is None else str(slime), store_uri(store, store_env, store_file, "--store")
    there = address
    with contextlib.suppress(CrossJobError):  # which it tells as a finding
        there = cluster_at(address)
    findings = diagnose(named(there), namespace, job_id, store=uri, slime=folder, timeout_s=timeout_s)
    if as_json:
        out_json([asdict(finding) for finding in findings])
    else:
        out(text.findings_table([asdict(finding) for finding in findings]))
    if any(finding.severity == "error" for finding in findings):
        raise typer.Exit(1)


@app.command()
def trace(
    address: Address = None,
    namespace: Namespace = DEFAULT,
    job_id: JobId = None,
    last: Annotated[int, typer.Option("--last", help="this many of the newest rollouts", min=1)] = 50,
    otlp: Annotated[str | None, typer.Option("--otlp", help="send them there instead, as http://HOST:4318")] = None,
) -> None:
    """One span tree a rollout, as a file for Perfetto or chrome://tracing on stdout, or by OTLP.

    What the two jobs did in detail (transfer, train, save) is known where --cross-job-traces on was given to them.
    """
    from .traces import chrome, send, spans_of

    viewer = connected(address, namespace)
    job = viewer.the_job(job_id)
    spans = spans_of(viewer.look(job, spans=True), last)
    if otlp is None:
        out_text(text.dumps(chrome(job, spans)))
    else:
        say(f"{send(otlp, job, spans)} spans sent to {otlp}")


@app.command()
def report(
    address: Address = None,
    namespace: Namespace = DEFAULT,
    job_id: JobId = None,
    to: Annotated[Path, typer.Option("--out", help="the file to be written")] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """Write a page of a run: throughput, waits, staleness, reward, faults."""
    from .report import write_report

    viewer = connected(address, namespace)
    figures = write_report(viewer, viewer.the_job(job_id), to)
    if as_json:
        out_json(figures)
    say(f"written: {to}")


@app.command()
def web(
    address: Address = None,
    namespace: Namespace = DEFAULT,
    job_id: JobId = None,
    host: Annotated[str, typer.Option(help="to listen on; others than loopback: it asks for a token")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="to listen on; 0: any", min=0, max=65535)] = 8270,
    allow_control: Annotated[
        bool, typer.Option("--allow-control", help="let the page pause, resume, drain ...")
    ] = False,
    allowed_host: Annotated[
        list[str] | None, typer.Option("--allowed-host", help="another host name of the view, as behind a proxy")
    ] = None,
    view_token_file: Annotated[
        Path | None, typer.Option(help="file with the token for looking (or SLIME_CROSS_JOB_VIEW_TOKEN)")
    ] = None,
    control_token_file: Annotated[
        Path | None, typer.Option(help="file with the token for steering (or SLIME_CROSS_JOB_CONTROL_TOKEN)")
    ] = None,
) -> None:
    """Serve the live view, until Ctrl-C.

    Where it asks for a token and none is given, one is made, and printed once, as the address that lets a browser in.
    """
    import secrets

    from .access import CONTROL_TOKEN, VIEW_TOKEN, given_token, needs_token
    from .viewer import Viewer
    from .web import WebView

    view_token, control_token = (
        given_token(VIEW_TOKEN, view_token_file),
        given_token(CONTROL_TOKEN, control_token_file),
    )
    made: dict[str, str] = {}
    if view_token is None and needs_token(host):
        view_token = made["to look"] = secrets.token_urlsafe(24)
    if allow_control and control_token is None and view_token is not None:
        control_token = made["to steer"] = secrets.token_urlsafe(24)
    connected(address, namespace)  # so that what is wrong is said here
    view = WebView(
        lambda: Viewer(namespace, timeout_s=10),
        host=host,
        port=port,
        allow_control=allow_control,
        view_token=view_token,
        control_token=control_token,
        job_id=job_id,
        allowed_hosts=allowed_host or (),
    )
    with view:
        say(f"live view at {view.url}{'' if allow_control else ' (read-only)'}")
        for what, token in made.items():
            say(f"{what}: {view.url}?token={token}")
        if view_token is not None and not made:
            say(f"it asks for a token: open {view.url}?token=TOKEN once")
        while not view.wait(0.25):
            pass


def _counted(status: dict[str, Any], names: Iterable[str]) -> str:
    return ", ".join(f"{status[name]} {name}" for name in names)


def _line(line: dict[str, Any]) -> str:
    if "event" in line:
        event = line["event"]
        rollout = "" if event["rollout_id"] < 0 else f" rollout {event['rollout_id']}"
        return f"{text.clock_text(event['at'])}  {event['kind']:<12}{rollout} {text.clean(event['text'], most=300)}"
    row = line["rollout"]
    facts = [f"weights {row['weight_version']}"] if row["weight_version"] is not None else []
    facts += [f"{row['staleness']} behind"] if row["staleness"] else []
    facts += [f"reward {row['reward']:.4g}"] if row["reward"] is not None else []
    facts += [text.bytes_text(row["nbytes"])] if row["nbytes"] else []
    return f"{text.clock_text(line['at'])}  {row['state']:<12} rollout {row['rollout_id']} {', '.join(facts)}"
