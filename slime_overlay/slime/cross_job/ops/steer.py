"""The steering commands. Each says what will happen, and asks on a terminal (`--yes`: does not). What the broker would
refuse is refused before anything is said."""

import logging
import time
from typing import Annotated, Any

import typer

from ..errors import BadInput, BrokerLost, NoBroker, Refused, WaitTimeout
from ..ledger.operator import SET_ASIDE
from ..ledger.state import LIVE
from .app import (
    CONNECT_S,
    DEFAULT,
    Address,
    JobId,
    Json,
    Namespace,
    RolloutId,
    Yes,
    app,
    cluster_at,
    connected,
    deadline,
    out_json,
    out_text,
    say,
    sure,
)
from .text import bytes_text, clean

_HEARD_S = 2.0  # beyond the time between two signs of life, within which clients hear that they were ended

Group = Annotated[str, typer.Option("--group", "-g", help="the consumer group")]


@app.command()
def pause(address: Address = None, namespace: Namespace = DEFAULT, job_id: JobId = None, yes: Yes = False) -> None:
    """Generate nothing new for now; what is published can be trained on."""
    _control(address, namespace, job_id, yes, "paused", "nothing new is generated until `resume`")


@app.command()
def resume(address: Address = None, namespace: Namespace = DEFAULT, job_id: JobId = None, yes: Yes = False) -> None:
    """Go on, after `pause` or `drain`."""
    _control(address, namespace, job_id, yes, "running", "rollouts are generated again")


@app.command()
def drain(address: Address = None, namespace: Namespace = DEFAULT, job_id: JobId = None, yes: Yes = False) -> None:
    """Finish what is out, save, and let both jobs end; nothing is freed."""
    words = "what is generated now is finished and trained on, then both jobs end with exit code 0; nothing is freed"
    _control(address, namespace, job_id, yes, "draining", words)


@app.command()
def requeue(
    rollout: RolloutId,
    address: Address = None,
    namespace: Namespace = DEFAULT,
    job_id: JobId = None,
    group: Group = "train",
    yes: Yes = False,
) -> None:
    """Take a leased rollout from who holds it, or one that is set aside from there: it can be claimed again."""
    viewer = connected(address, namespace)
    job = viewer.the_job(job_id)
    holder = viewer.foresee("requeue", job, rollout, group)
    if holder == SET_ASIDE:
        words = "is no longer set aside: it is trained on, or generated again"
    else:
        words = f"is taken from the {clean(holder)}: its ack will be refused"
    sure(f"rollout {rollout} of job {job} {words}", yes)
    held_by = viewer.steer("requeue", job, rollout, group)
    say(f"rollout {rollout} is wanted again" if held_by == SET_ASIDE else f"taken from the {clean(held_by)}")


@app.command()
def drop(
    rollout: RolloutId,
    address: Address = None,
    namespace: Namespace = DEFAULT,
    job_id: JobId = None,
    same_prompts: Annotated[
        bool, typer.Option("--same-prompts", help="generate it anew from the same prompts")
    ] = False,
    yes: Yes = False,
) -> None:
    """Throw a published rollout away, before anybody trains on it; it is generated anew, from new prompts."""
    viewer = connected(address, namespace)
    job = viewer.the_job(job_id)
    how = "the same prompts" if same_prompts else "new prompts"
    nbytes = viewer.foresee("discard", job, rollout, same_prompts)
    words = f"rollout {rollout} of job {job} ({bytes_text(nbytes)}) is freed, and generated anew from {how}"
    if (viewer.status(job)["producer"] or {}).get("state") == "finished":
        words += ", once its rollout job is started again: it has finished"
    sure(words, yes)
    say(f"{bytes_text(viewer.steer('discard', job, rollout, same_prompts))} freed")


@app.command("close-group")
def close_group(
    group: Annotated[str, typer.Argument(metavar="GROUP")],
    address: Address = None,
    namespace: Namespace = DEFAULT,
    job_id: JobId = None,
    yes: Yes = False,
) -> None:
    """Give up on a consumer group that will not come back: it holds nothing back any more."""
    viewer = connected(address, namespace)
    job = viewer.the_job(job_id)
    behind = len(viewer.foresee("close_group", job, group))
    sure(f"group {clean(group)} of job {job} is closed: it has not acked {behind} rollouts, and keeps none back", yes)
    say(f"group {clean(group)} is closed; it had not acked {len(viewer.steer('close_group', job, group))} rollouts")


@app.command("give-up")
def give_up(
    vault: Annotated[str, typer.Argument(metavar="VAULT", help="its name, or the id of its node, as `status` says")],
    address: Address = None,
    namespace: Namespace = DEFAULT,
    yes: Yes = False,
) -> None:
    """Let a broker that was restarted go on without a vault that is silent."""
    from . import viewer

    there = cluster_at(address)
    with deadline(CONNECT_S, f"the Ray cluster at {there} does not answer within {CONNECT_S:.0f} s"):
        viewer.ensure_ray(there, logging_level=logging.ERROR)
    found = viewer.starting(namespace)
    waited = [] if found is None else found["waits_for"]
    named = [one for one in waited if vault in (one["vault"], one["node_id"])]
    if not named:
        names = ", ".join(one["vault"] for one in waited) or "none"
        raise BadInput(f"the broker of namespace {namespace!r} does not wait for {clean(vault)}; it waits for {names}")
    name = named[0]["vault"]
    sure(
        f"the broker goes on without {name}, which is silent for {named[0]['silent_s']:.0f} s. Rollouts that only it "
        "holds, and no durable store, are lost, and generated again. What no other vault was told is forgotten: where "
        "it is the only one, jobs without a durable store begin anew, also those rollouts that were acked. Should it "
        "answer later, what is still needed of it is taken back, and the rest is freed",
        yes,
    )
    viewer.give_up(namespace, name)
    say(f"{name} is given up")


@app.command()
def gc(
    address: Address = None,
    namespace: Namespace = DEFAULT,
    forget: Annotated[list[str] | None, typer.Option("--forget", help="a job: all that it holds goes")] = None,
    yes: Yes = False,
) -> None:
    """Free, now, what nobody has known of for 10 minutes in durable stores; with --forget JOB all that a job holds."""
    viewer = connected(address, namespace)
    for job in forget or []:
        viewer.foresee("forget", job)
        status = viewer.status(job)
        held = f"{status['retained']} rollouts, {bytes_text(status['held_bytes'])}"
        sure(f"job {job} is forgotten: {held}, where it stood, and what it stored", yes)
        viewer.steer("forget", job)
        say(f"job {job} is forgotten")
    if not forget:
        sure("what the broker has seen in durable stores for 10 minutes, and nobody knows of, is deleted", yes)
        say(f"{viewer.collect()} leftovers deleted")


@app.command()
def shutdown(
    address: Address = None,
    namespace: Namespace = DEFAULT,
    force: Annotated[bool, typer.Option("--force", help="also where clients are attached: they end")] = False,
    yes: Yes = False,
) -> None:
    """End broker and vaults of a namespace, and free all that they hold; what lies in durable stores stays."""
    from . import viewer as views

    viewer, living, jobs = None, {}, {}
    try:
        viewer = connected(address, namespace)
        living, jobs = viewer.living(), viewer.jobs()
    except (NoBroker, BrokerLost, WaitTimeout) as error:
        if not isinstance(error, NoBroker) and not force:
            raise
        if not views.holdings(namespace)["vaults"]:
            raise
        say(f"the broker does not say which clients are attached, and what is held: {clean(error)}")
    held = views.holdings(namespace)
    if living and not force:
        raise Refused(
            f"{len(living)} clients are attached in namespace {namespace!r}, the first is the "
            f"{clean(next(iter(living.values())))}: end their jobs (drain), or add --force"
        )
    words = [f"namespace {namespace} ends: {held['payloads']} payloads are freed, {bytes_text(held['nbytes'])}"]
    if unread := [job for job, status in jobs.items() if status["queue_depth"]]:
        words.append(f"rollouts that are not acked are among them, of {', '.join(map(clean, unread))}")
    if held["behind"]:
        words.append(f"{held['behind']} are not in their durable store yet, and are lost")
    if held["silent"]:
        words.append(f"{held['silent']} vaults are silent, and do not say what they hold")
    if forgotten := sum(status["store"] is None for status in jobs.values()):
        words.append(f"how {forgotten} jobs without a durable store stand is forgotten")
    words += [f"{len(living)} clients end with an error"] if living else []
    sure("; ".join([*words, "what lies in durable stores stays"]), yes)
    for client_id in living:
        assert viewer is not None
        viewer.end_client(client_id, "its namespace was shut down by its operator")
    if living:
        time.sleep(_HEARD_S + _between_signs_s(jobs))
    ended = views.end_namespace(namespace)
    say(f"{len(ended)} actors ended, {bytes_text(held['nbytes'])} freed")


@app.command()
def quarantine(
    address: Address = None,
    namespace: Namespace = DEFAULT,
    job_id: JobId = None,
    delete: Annotated[list[str] | None, typer.Option("--delete", help="names to be deleted; all: every one")] = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Rollouts that are set aside, and what was found damaged in the durable store, and why; --delete NAME removes
    what is damaged for good."""
    viewer = connected(address, namespace)
    job = viewer.the_job(job_id)
    status = viewer.status(job)
    letters = {f"rollout {number}": _letter(letter) for number, letter in status["dead_letters"].items()}
    if not delete and status["store"] is None:
        found = {}
    else:
        archive = viewer.archive(job)
        found = archive.quarantined()
    if not delete:
        if as_json:
            out_json({**letters, **found})
            return
        for name, why in {**letters, **found}.items():
            out_text(f"{clean(name)}: {clean(why)}")
        say(f"{len(letters)} rollouts of job {job} set aside, {len(found)} payloads in quarantine")
        return
    names = [*found] if delete == ["all"] else delete
    if unknown := [name for name in names if name not in found]:
        raise BadInput(f"{clean(unknown[0])} is not in quarantine: there are {', '.join(map(clean, found)) or 'none'}")
    sure(f"{len(names)} damaged payloads of job {job} are deleted, with the reasons", yes)
    archive.forget_quarantined(names)
    say(f"{len(names)} deleted")


def _letter(letter: dict[str, Any]) -> str:
    how = "set aside, and replaced by one of new prompts" if letter["replaced"] else "set aside"
    version = f"version {letter['version']}, " if letter["version"] else ""
    return f"{how} ({version}weights {letter['weight_version']}): {letter['reason']}"


def _between_signs_s(jobs: dict[str, Any]) -> float:
    """Longest time that may pass between two signs of life of a client: a third of its lease (see Settings). Who hears
    nothing until then finds no broker, and makes another one."""
    clients = [c for status in jobs.values() for c in (status["producer"], *status["consumers"].values()) if c]
    return max((c["dead_after_s"] / 3 for c in clients if c["state"] == LIVE), default=1.0)


def _control(address: str | None, namespace: str, job_id: str | None, yes: bool, wanted: str, words: str) -> None:
    viewer = connected(address, namespace)
    job = viewer.the_job(job_id)
    viewer.foresee("control", job, wanted)
    sure(f"job {job}: {words}", yes)
    before = viewer.steer("control", job, wanted)
    say(f"job {job} is {wanted}; it was {before}")
