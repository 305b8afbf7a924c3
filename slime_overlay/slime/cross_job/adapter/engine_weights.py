"""What engines say of the weights that they serve: whose they are, and which.

SGLang keeps a text with its weights (`weight_version`), changes it when an update has succeeded, and reports it on
request and with every generation. slime counts 1, 2, 3 in it, in each train job anew, which tells neither two jobs nor
two lives of one job apart. Here it is a stamp that no other update has:

    JOB/new/NONCE        since the engine started, until the first update; NONCE is the rollout job's
    JOB/VERSION/NONCE    since an update: VERSION is that of the weights, NONCE that of this one update

Whoever answers with another stamp is another job's engine, was restarted, or did not load what it was sent.

Functions whose first argument is `engine` run in the process of slime's engine actor, those with `manager` in that of
slime's Buffer, RolloutController or RolloutManager (`__ray_call__`). Engines of an SGLang that reports no version say
None, and are not checked.
"""

import json
import logging
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from ..client.connection import Connection, get
from ..deadline import Deadline
from ..errors import BadInput, RolloutNotFound, WaitTimeout, WrongWeights
from ..types import WEIGHTS_SAID
from . import data_source

logger = logging.getLogger(__name__)

NEW = "new"
UNSTATED = "default"  # what SGLang says that was started without a version
_PATHS = ("/model_info", "/get_weight_version", "/get_model_info")
_ANSWER_S = 30.0
_ATTEMPTS = 3  # at a question that changes nothing: a rollout hangs on it
_ENGINES_S = 120.0  # of one call to slime's engine actors
_WAY_OUT = "stop whatever else updates or restarts these engines, or took their port, then start {} again"


def stamp(job_id: str, version: int | str) -> str:
    """A new stamp for these weights, or for engines that have none of ours (NEW)."""
    return f"{job_id}/{version}/{uuid.uuid4().hex[:8]}"


def is_of(job_id: str, said: str) -> bool:
    """Whether a stamp is of this job."""
    return said.split("/", 1)[0] == job_id and said.count("/") == 2


# ---------------------------------------------------------------------- in the process of an engine actor


@dataclass(frozen=True)
class Said:
    """What an engine answered."""

    url: str
    version: str | None  # None: this SGLang reports none
    external: bool = False  # it was not started by its rollout job


def said(engine: Any) -> Said:
    """What the server of this engine actor says of its weights.

    Raises:
        OSError: it does not answer.
    """
    url = _url(engine)
    return Said(url, version_at(url), bool(getattr(engine.args, "rollout_external", False)))


def claim(engine: Any, own: str) -> Said:
    """Mark the server of this engine actor with a stamp, before it has any weights of this job; what it said before.

    An engine that its rollout job started says `own` from its start on, and is left as it is.
    """
    before = said(engine)
    if before.version not in (None, own) and (before.external or before.version == UNSTATED):
        _post(f"{before.url}/update_weight_version", {"new_version": own, "abort_all_requests": False})
    return before


def carry(engine: Any, text: str) -> Said:
    """Let the updates of this engine's weights carry the stamp `text` from now on; what it says before them.

    An update that the server calls failed in an answer that HTTP calls a success raises.
    """
    before = said(engine)
    if before.version is None:
        return before
    if not hasattr(engine, "cross_job_stamp"):
        request = engine._make_request

        def stamped(endpoint: str, payload: dict[str, Any] | None = None) -> Any:
            if endpoint.startswith("update_weights_from_"):
                payload = {**(payload or {}), "weight_version": engine.cross_job_stamp}
            answer = request(endpoint, payload)
            if isinstance(answer, dict) and answer.get("success") is False:
                raise RuntimeError(f"{before.url}/{endpoint} failed: {answer.get('message') or answer}")
            return answer

        engine._make_request = stamped
    engine.cross_job_stamp = text
    return before


def version_at(url: str) -> str | None:
    """What the server at `url` says of its weights; None: it has no such answer. Raises OSError: it is silent."""
    for path in _PATHS:
        try:
            answer = json.loads(_patiently(urllib.request.Request(url + path)))
        except urllib.error.HTTPError as error:
            if error.code not in (404, 405):
                raise
            continue
        if isinstance(answer, dict) and isinstance(answer.get("weight_version"), str):
            return str(answer["weight_version"])
    return None


def _url(engine: Any) -> str:
    if hasattr(engine, "get_url"):
        return str(engine.get_url())
    return f"http://{engine.server_args.host}:{engine.server_args.port}"  # up to v0.1


def _post(url: str, body: dict[str, Any]) -> None:
    data = json.dumps(body).encode()
    _open(urllib.request.Request(url, data, {"Content-Type": "application/json"}, method="POST"))


def _patiently(request: urllib.request.Request) -> bytes:
    for _ in range(_ATTEMPTS - 1):
        try:
            return _open(request)
        except urllib.error.HTTPError:
            raise
        except OSError as error:
            logger.warning("%s did not answer: %s", request.full_url, error)
    return _open(request)


def _open(request: urllib.request.Request) -> bytes:
    """Straight to the server: a proxy of the environment is for the world outside."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=_ANSWER_S) as answer:
        return bytes(answer.read())


# ---------------------------------------------------------------------- in the process of slime's manager


def watch(manager: Any, engines: Sequence[Any] | None) -> None:
    """Note what the engines say of each sample, for `of_rollout`, and what was said of those that wait in the source's
    buffer when a generation begins: older weights have begun them.

    Args:
        engines: of this manager, at pins where it does not know them.
    """
    manager.cross_job_engines = engines
    manager.cross_job_said, manager.cross_job_waiting = set(), set()
    convert, generate = manager._convert_samples_to_train_data, manager.generate_rollout

    def begun(*args: Any, **kwargs: Any) -> Any:
        waiting = data_source.buffer_of(manager)
        manager.cross_job_waiting = None if waiting is None else _said_of(waiting)
        return generate(*args, **kwargs)

    def noted(samples: Any, *args: Any, **kwargs: Any) -> Any:
        manager.cross_job_said = _said_of(samples)
        return convert(samples, *args, **kwargs)

    manager._convert_samples_to_train_data = noted
    manager.generate_rollout = begun


def of_rollout(manager: Any) -> dict[str, Any]:
    """What the engines say of the rollout that was generated last, and of themselves now, as `meta` of the rollout.

    What was said of samples that waited in the source's buffer before, as of those of partial rollouts, stands apart,
    as `weights_before`, where it is of this job. Where a custom source keeps its samples itself, any older weights of
    this job may have begun them.
    """
    if not hasattr(manager, "cross_job_said"):
        return {}
    now = {answer.version for answer in _of_the_living(manager) if answer.version is not None}
    if not now and not manager.cross_job_said:
        return {}
    job_id, of_samples = manager.args.job_id, {*manager.cross_job_said} - now
    waited = of_samples if manager.cross_job_waiting is None else of_samples & manager.cross_job_waiting
    before = {text for text in waited if is_of(job_id, text)}
    if len(getattr(manager, "servers", ())) > 1:  # of a model that is not trained, and so never updated
        of_samples = {text for text in of_samples if not text.startswith(f"{job_id}/{NEW}/")}
    facts: dict[str, Any] = {WEIGHTS_SAID: sorted(now | (of_samples - before))}
    return {**facts, "weights_before": sorted(before)} if before else facts


def _of_the_living(manager: Any) -> list[Said]:
    """What the engines say; one that died while others generated on says nothing. Raises the error of the last one if
    none is left to say anything."""
    engines = manager.cross_job_engines
    if engines is None:
        engines = manager.get_updatable_engines_and_lock()[0]
    answers, died = ask_the_living(manager.args.job_id, engines)
    if died is not None and not answers and not manager.cross_job_said:
        raise died
    return answers


def _flat(samples: Any) -> Iterable[Any]:
    for sample in samples:
        if isinstance(sample, list):
            yield from _flat(sample)
        else:
            yield sample


def _said_of(samples: Any) -> set[str]:
    return {str(text) for sample in _flat(samples) for text in getattr(sample, "weight_versions", None) or ()}


# ---------------------------------------------------------------------- in either job


def ask(engines: Sequence[Any], what: Any, *args: Any) -> list[Any]:
    """What a function of the first part of this module returns for each engine (None: slime calls it dead).

    Raises:
        ray.exceptions.RayActorError: an engine died. RayTaskError: its server does not answer. WaitTimeout.
    """
    deadline = Deadline(_ENGINES_S)
    return [get(ref, deadline, "an engine") for ref in asked(engines, what, *args)]


def asked(engines: Sequence[Any], what: Any, *args: Any) -> list[Any]:
    """Refs of what they answer; all of them are at it at the same time."""
    return [engine.__ray_call__.remote(what, *args) for engine in engines if engine is not None]


def ask_the_living(job_id: str, engines: Sequence[Any]) -> tuple[list[Said], Exception | None]:
    """(what those say that answer, the error of the last one that does not): slime may go on without an engine."""
    answers: list[Said] = []
    died: Exception | None = None
    for ref in asked(engines, said):
        try:
            answers.append(get(ref, Deadline(_ENGINES_S), "an engine"))
        except (ray.exceptions.RayActorError, ray.exceptions.RayTaskError, WaitTimeout) as error:
            logger.warning("job %s: an engine does not say which weights it serves: %s", job_id, error)
            died = error
    return answers, died


def lives(connection: Connection, job_id: str) -> bool:
    """Whether a rollout or train job of another experiment is there, as the broker knows."""
    try:
        status = connection.call("status", job_id)[job_id]
    except (RolloutNotFound, BadInput):
        return False
    clients = [client for client in (status["producer"], *status["consumers"].values()) if client is not None]
    return any(client["state"] in ("live", "silent") and not client["presumed_dead"] for client in clients)


def check_new(job_id: str, own: str, answers: Sequence[Said]) -> None:
    """Raises WrongWeights: an engine that this rollout job started is another's, see `claim`."""
    for answer in answers:
        if answer.external or answer.version in (None, own):
            continue
        if answer.version == UNSTATED:
            logger.warning(
                "job %s: the engine at %s did not take the stamp that it was started with", job_id, answer.url
            )
            continue
        raise WrongWeights(
            f"the engine at {answer.url} serves weights {answer.version}, but this job started its own engine there "
            f"with {own}: another process answers on that port. Stop it, or start this rollout job again"
        )


def check_ours(job_id: str, answers: Sequence[Said]) -> None:
    """Before an update. Raises WrongWeights: another job has given an engine its weights."""
    for answer in answers:
        fresh = answer.external and answer.version == UNSTATED  # its owner has started it again
        if answer.version is not None and not fresh and not is_of(job_id, answer.version):
            way_out = _WAY_OUT.format("the rollout job")
            raise WrongWeights(
                f"the engine at {answer.url} serves weights {answer.version}, which this job ({job_id}) never gave "
                f"it: {way_out}"
            )


def check_loaded(expected: str, answers: Sequence[Said], when: str) -> None:
    """Raises WrongWeights: an engine has other weights than those of the last update."""
    wrong = [f"{answer.url} serves {answer.version}" for answer in answers if answer.version not in (None, expected)]
    if wrong:
        raise WrongWeights(
            f"{when} the engines should serve weights {expected}, but {', '.join(wrong)}: the update did not take "
            f"effect, or something else changed them. See the engines' logs; {_WAY_OUT.format('both jobs')}"
        )


def silent(answers: Sequence[Said]) -> list[str]:
    """Where the engines are that do not say what they serve."""
    return [answer.url for answer in answers if answer.version is None]
