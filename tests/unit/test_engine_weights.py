"""What engines say of their weights: whose they are, which they are, and what is refused because of it."""

import io
import json
import urllib.error
from types import SimpleNamespace
from typing import Any

import pytest

from slime.cross_job.adapter import engine_weights
from slime.cross_job.adapter.engine_weights import NEW, Said, stamp
from slime.cross_job.errors import WaitTimeout, WrongWeights

URL = "http://node:15000"


class Server:
    """Stands for an SGLang server, behind urllib: it keeps a version, and serves some of the paths."""

    def __init__(self, version: str | None = "default", paths: tuple[str, ...] = ("/model_info",)):
        self.version, self.paths = version, paths

    def __call__(self, request: Any) -> bytes:
        path = request.full_url.removeprefix(URL)
        if path == "/update_weight_version":
            self.version = json.loads(request.data)["new_version"]
        elif path not in self.paths:
            raise urllib.error.HTTPError(request.full_url, 404, "Not Found", None, io.BytesIO())  # type: ignore[arg-type]
        return json.dumps({"weight_version": self.version} if self.version is not None else {}).encode()


class Engine:
    """Stands for slime's engine actor: what it asks of its server comes to `asked`."""

    def __init__(self, external: bool = False):
        self.args = SimpleNamespace(rollout_external=external)
        self.asked: list[tuple[str, Any]] = []
        self.answer: Any = {"success": True}

    def get_url(self) -> str:
        return URL

    def _make_request(self, endpoint: str, payload: Any = None) -> Any:
        self.asked.append((endpoint, payload))
        return self.answer


@pytest.fixture
def server(monkeypatch):
    made = Server()
    monkeypatch.setattr(engine_weights, "_open", lambda request: made(request))
    return made


def test_no_two_stamps_are_equal_and_each_tells_its_job():
    made = {stamp("exp", 3) for _ in range(100)}
    assert len(made) == 100
    assert all(engine_weights.is_of("exp", text) and text.startswith("exp/3/") for text in made)
    assert not engine_weights.is_of("exp", stamp("exp2", 3))
    assert not any(engine_weights.is_of("3", text) for text in ("3", "default", "a/b"))


@pytest.mark.parametrize("path", ["/get_weight_version", "/model_info", "/get_model_info"])
def test_every_sglang_that_reports_a_version_is_understood(server, path):
    server.paths, server.version = (path,), "7"
    assert engine_weights.said(Engine()) == Said(URL, "7")


def test_an_sglang_without_versions_says_none(server):
    server.paths = ()
    assert engine_weights.said(Engine()).version is None
    server.paths, server.version = ("/model_info",), None
    assert engine_weights.carry(Engine(), "exp/1/a").version is None


def test_updates_carry_the_stamp_of_the_last_one_and_nothing_else_does(server):
    engine = Engine()
    for text in ("exp/1/a", "exp/2/b"):
        engine_weights.carry(engine, text)
        engine._make_request("update_weights_from_distributed", {"names": [], "weight_version": "1"})
        engine._make_request("flush", {"x": 1})
    assert engine.asked == [
        ("update_weights_from_distributed", {"names": [], "weight_version": "exp/1/a"}),
        ("flush", {"x": 1}),
        ("update_weights_from_distributed", {"names": [], "weight_version": "exp/2/b"}),
        ("flush", {"x": 1}),
    ]


def test_an_update_that_failed_in_an_answer_that_looks_well_raises(server):
    engine = Engine()
    engine_weights.carry(engine, "exp/1/a")
    engine.answer = {"success": False, "message": "no such file"}
    with pytest.raises(RuntimeError, match=r"node:15000/update_weights_from_disk failed: no such file"):
        engine._make_request("update_weights_from_disk", {"model_path": "x"})


def test_an_engine_that_somebody_else_started_on_our_port_is_refused(server):
    own = stamp("exp", NEW)
    server.version = own
    engine_weights.check_new("exp", own, [engine_weights.claim(Engine(), own)])
    for strange in (stamp("exp2", 4), stamp("exp", NEW), "12"):
        server.version = strange
        with pytest.raises(WrongWeights, match=f"serves weights {strange}, .* with {own}"):
            engine_weights.check_new("exp", own, [engine_weights.claim(Engine(), own)])
        assert server.version == strange, "it is not ours, and is left as it is"


@pytest.mark.parametrize("before", ["default", "exp2/9/dead0000"])
def test_external_engines_are_marked_as_this_jobs(server, before):
    own, server.version = stamp("exp", NEW), before
    answers = [engine_weights.claim(Engine(external=True), own)]
    engine_weights.check_new("exp", own, answers)
    assert server.version == own


def test_before_an_update_an_engine_must_have_weights_of_this_job_or_none():
    ours = [Said(URL, stamp("exp", NEW)), Said(URL, stamp("exp", 4)), Said(URL, None), Said(URL, "default", True)]
    engine_weights.check_ours("exp", ours)
    for strange in (stamp("exp2", 4), "3", "default"):
        with pytest.raises(WrongWeights, match=f"serves weights {strange}, which this job .exp. never gave it"):
            engine_weights.check_ours("exp", [*ours, Said(URL, strange)])


def test_after_an_update_every_engine_must_say_so():
    engine_weights.check_loaded("exp/4/a", [Said(URL, "exp/4/a"), Said(URL, None)], "now")
    for other in ("exp/4/b", "exp/3/a", "default"):
        with pytest.raises(WrongWeights, match=f"should serve weights exp/4/a, but {URL} serves {other}"):
            engine_weights.check_loaded("exp/4/a", [Said(URL, "exp/4/a"), Said(URL, other)], "now")


class Manager:
    """Stands for slime's RolloutManager, as far as a rollout passes through it."""

    def __init__(self, **args: Any):
        self.args = SimpleNamespace(job_id="exp", **args)
        self.servers = {"default": None}
        self.generate_rollout = lambda: None

    def _convert_samples_to_train_data(self, samples: Any) -> dict[str, Any]:
        return {"of": samples}


@pytest.fixture
def told(monkeypatch):
    """told(manager, samples' versions...): what is said of a rollout whose engines now say exp/4/a."""
    monkeypatch.setattr(engine_weights, "asked", lambda engines, what: engines)
    monkeypatch.setattr(engine_weights, "get", lambda version, *_: Said(URL, version))
    monkeypatch.setattr(engine_weights.data_source, "buffer_of", lambda manager: [])

    def tell(manager: Manager, *versions: list[str], engines: Any = ("exp/4/a", "exp/4/a")) -> dict[str, Any]:
        engine_weights.watch(manager, engines)
        manager.generate_rollout()
        samples = [[SimpleNamespace(weight_versions=one) for one in versions], SimpleNamespace()]
        assert manager._convert_samples_to_train_data(samples) == {"of": samples}
        return engine_weights.of_rollout(manager)

    return tell


def test_a_rollout_carries_what_engines_and_samples_said(told):
    assert told(Manager(), ["exp/4/a"], []) == {"weights_said": ["exp/4/a"]}
    assert told(Manager(), ["exp2/4/b"]) == {"weights_said": ["exp/4/a", "exp2/4/b"]}
    assert told(Manager(), engines=("exp/4/a", "exp/new/b")) == {"weights_said": ["exp/4/a", "exp/new/b"]}
    assert told(Manager(), engines=(None,)) == {}
    assert engine_weights.of_rollout(Manager()) == {}, "a job without a role"


def test_older_weights_are_no_mismatch_only_in_samples_that_waited(told, monkeypatch):
    """Of a partial rollout, or given back by a function of the user's own. Who else says so is an engine of before."""
    waiting: Any = []
    monkeypatch.setattr(engine_weights.data_source, "buffer_of", lambda manager: waiting)
    old, older, strange = "exp/3/a", "exp/2/a", "exp2/3/a"
    assert told(Manager(partial_rollout=True), [old]) == {"weights_said": [old, "exp/4/a"]}
    manager = Manager()
    waiting = [[SimpleNamespace(weight_versions=[old]), SimpleNamespace(weight_versions=[strange])]]
    said = told(manager, [old, "exp/4/a"], [strange])
    assert said == {"weights_said": ["exp/4/a", strange], "weights_before": [old]}
    assert told(manager, [old, older]) == {"weights_said": [older, "exp/4/a"], "weights_before": [old]}
    waiting = []
    assert told(manager, [old]) == {"weights_said": [old, "exp/4/a"]}
    waiting = None  # a custom source that keeps them itself
    assert told(manager, [old], [strange]) == {"weights_said": ["exp/4/a", strange], "weights_before": [old]}


def test_a_model_that_is_not_trained_keeps_the_stamp_it_was_started_with(told):
    manager = Manager()
    manager.servers["reward"] = None
    assert told(manager, ["exp/new/a", "exp/4/a"]) == {"weights_said": ["exp/4/a"]}


def test_an_engine_that_died_says_nothing_while_others_do(monkeypatch):
    def get(engine: str, *_: Any) -> Said:
        if engine == "dead":
            raise WaitTimeout("an engine did not answer")
        return Said(URL, engine)

    monkeypatch.setattr(engine_weights, "asked", lambda engines, what: engines)
    monkeypatch.setattr(engine_weights, "get", get)
    manager = Manager()
    engine_weights.watch(manager, ["dead", "exp/4/a"])
    assert engine_weights.of_rollout(manager) == {"weights_said": ["exp/4/a"]}
    engine_weights.watch(manager, ["dead"])
    with pytest.raises(WaitTimeout):
        engine_weights.of_rollout(manager)
    manager._convert_samples_to_train_data([SimpleNamespace(weight_versions=["exp/4/a"])])
    assert engine_weights.of_rollout(manager) == {"weights_said": ["exp/4/a"]}, "the samples still say it"


def test_a_server_that_is_silent_for_once_is_asked_again(monkeypatch):
    silent = TimeoutError("timed out")
    answers = iter([silent, silent, b'{"weight_version": "exp/1/a"}', silent, silent, silent])

    def opened(request: Any) -> bytes:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(engine_weights, "_open", opened)
    assert engine_weights.version_at(URL) == "exp/1/a"
    with pytest.raises(TimeoutError, match="timed out"):
        engine_weights.version_at(URL)
