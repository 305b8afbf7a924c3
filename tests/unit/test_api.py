"""The names, flags, signatures and errors that others build on: a change here is a decision, not an accident."""

import argparse
import copy
import importlib
import inspect
import math
import pickle
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import slime.cross_job
from slime.cross_job import errors, settings
from slime.cross_job.errors import BadInput, CrossJobError, PeerFailed, WaitTimeout
from slime.cross_job.ledger.state import DROP, REGENERATE, WAIT, WRITE_BEHIND, WRITE_THROUGH, Job
from slime.cross_job.settings import OF_JOB, Settings, add_arguments
from slime.cross_job.types import DEFAULT_NAMESPACE, check_job_id, check_rollout_id
from slime.cross_job_settings import ABOUT, STORE_SOURCES, holds_password

GIVEN = {
    "namespace": "mine",
    "max_ahead": 0,  # not the same as none given
    "retain": 3,
    "retain_s": 60.0,
    "retain_bytes": 1 << 20,
    "retain_from": "publication",
    "forget_after_s": 60.0,
    "max_bytes": 1 << 40,
    "max_staleness": 2,
    "on_stale": "drop",
    "on_poison": "skip",
    "store": "file:///shared/run1",
    "store_mode": "write-behind",
    "compression": "lz4",
    "metrics": "off",
    "traces": "on",
    "heartbeat_s": 0.5,
    "dead_after_s": 4.5,
    "peer_grace_s": 60.0,
    "resources_s": 30.0,
    "timeout_s": 0.25,
    "rollout_timeout_s": 90.0,
    "update_timeout_s": 80.0,
}
"""Every setting, and a value that is not its default."""
FLAGS = {f"--cross-job-{name.replace('_', '-')}": name for name in (*GIVEN, "store_env", "store_file")}
OF_THE_JOB = {
    "max_ahead": (0, "0"),
    "retain": (None, "0; any number where one of the next two is given"),
    "retain_s": (None, "no bound"),
    "retain_bytes": (None, "no bound"),
    "retain_from": ("ack", "ack"),
    "forget_after_s": (604_800.0, "604800.0, a week"),
    "max_bytes": (None, "no bound"),
    "max_staleness": (None, "any number"),
    "on_stale": ("wait", "wait"),
    "on_poison": ("stop", "stop"),
    "store": (None, "none"),
    "store_mode": ("write-through", "write-through"),
    "compression": ("none", "none"),
    "metrics": ("on", "on"),
    "traces": ("off", "off"),
}
"""Settings that belong to the job: none given is what the other side says, or this, and how the help says it."""
PACKAGE_NAMES = frozenset(["Batch", "Column", "Consumer", "Producer", "Published", "Rollout", "errors"])
UTILS_NAMES = frozenset(
    [
        "Batch",
        "Consumer",
        "CrossJobDataBroker",
        "DataProducer",
        "FileSystemCommunicator",
        "Producer",
        "Published",
        "RayJobCommunicator",
        "Rollout",
        "Settings",
        "add_arguments",
        "errors",
        "returned",
        "setup_cross_job_communication",
    ]
)


@pytest.mark.parametrize(
    ("module", "names"), [("slime.cross_job", PACKAGE_NAMES), ("slime.utils.cross_job_utils", UTILS_NAMES)]
)
def test_exported_names(module, names):
    loaded = importlib.import_module(module)
    assert frozenset(loaded.__all__) == names
    assert [*loaded.__all__] == sorted(loaded.__all__)
    for name in names:
        found = getattr(loaded, name)
        assert getattr(found, "__name__", "").endswith(name)
        assert inspect.getdoc(found), name


def test_both_homes_name_the_same_things():
    utils = importlib.import_module("slime.utils.cross_job_utils")
    for name in PACKAGE_NAMES & UTILS_NAMES:
        assert getattr(utils, name) is getattr(slime.cross_job, name)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'Bach'"):
        slime.cross_job.Bach  # noqa: B018
    assert not hasattr(slime.cross_job, "_HOMES")


# ---------------------------------------------------------------------- signatures


@pytest.mark.parametrize(
    ("name", "signature"),
    [
        ("setup_cross_job_communication", "(namespace: str = 'slime_shared') -> CrossJobDataBroker"),
        ("CrossJobDataBroker.store_rollout_data", "(self, job_id: str, rollout_id: int, data_ref: Any) -> int"),
        ("CrossJobDataBroker.get_rollout_data", "(self, job_id: str, rollout_id: int) -> Any"),
        ("CrossJobDataBroker.list_available_rollouts", "(self, job_id: str | None = None) -> list[tuple[str, int]]"),
        ("DataProducer.produce_data", "(self, key: str, data: Any) -> Any"),
        ("DataProducer.get_data_ref", "(self, key: str) -> Any"),
    ],
)
def test_signatures_of_the_proposal(name, signature):
    found: Any = importlib.import_module("slime.utils.cross_job_utils")
    for part in name.split("."):
        found = getattr(found, part)
    said = str(inspect.signature(found)).replace("slime.cross_job.proposal.data_broker.", "").replace("typing.", "")
    assert said.replace("'CrossJobDataBroker'", "CrossJobDataBroker") == signature


@pytest.mark.parametrize(
    "name",
    [
        "Producer.publish",
        "Producer.publish_from",
        "Producer.next_demand",
        "Producer.demands",
        "Producer.weights",
        "Producer.value",
        "Producer.publish_value",
        "Consumer.claim",
        "Consumer.publish_weights",
        "Consumer.value_ref",
    ],
)
def test_what_may_wait_takes_a_deadline(name):
    owner, method = name.split(".")
    parameters = inspect.signature(getattr(getattr(slime.cross_job, owner), method)).parameters
    assert parameters["timeout_s"].default is None or parameters["timeout_s"].default == 0.0


# ---------------------------------------------------------------------- settings


def test_flags():
    parser = add_arguments(argparse.ArgumentParser(add_help=False))
    flags = {option for action in parser._actions for option in action.option_strings}
    assert flags == {"--job-id", *FLAGS}
    assert all(action.help for action in parser._actions)
    assert all(action.default is None for action in parser._actions)


def test_no_flag_is_the_default_and_attributes_may_be_absent():
    parser = add_arguments(argparse.ArgumentParser())
    assert Settings.from_args(parser.parse_args([])) == Settings()
    assert Settings.from_args(SimpleNamespace(job_id="x", rollout_batch_size=3)) == Settings()
    assert Settings().namespace == DEFAULT_NAMESPACE == "slime_shared"


def test_every_flag_arrives():
    words = [word for name, value in GIVEN.items() for word in ("--cross-job-" + name.replace("_", "-"), str(value))]
    args = add_arguments(argparse.ArgumentParser()).parse_args(["--job-id", "exp", *words])
    assert args.job_id == "exp"
    assert Settings.from_args(args) == Settings(**GIVEN)
    assert {name: getattr(Settings(**GIVEN), name) for name in GIVEN} == GIVEN


SECRET = "redis://:hunter2@host:6379/0"


def test_a_store_comes_from_one_of_three_sources_and_arguments_never_hold_what_two_of_them_hold(tmp_path, monkeypatch):
    (tmp_path / "store").write_text(SECRET + "\n")
    monkeypatch.setenv("STORE", SECRET)
    parser = add_arguments(argparse.ArgumentParser())
    for words in (["--cross-job-store-env", "STORE"], ["--cross-job-store-file", str(tmp_path / "store")]):
        args = parser.parse_args(words)
        settings = Settings.from_args(args)
        assert settings.store == SECRET
        assert settings == Settings(store=SECRET)
        assert "hunter2" not in f"{args} {settings}"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"store": "file:///a", "store_env": "STORE"}, "--cross-job-store and --cross-job-store-env say the same"),
        ({"store_env": "STORE", "store_file": "x"}, "--cross-job-store-env and --cross-job-store-file say"),
        ({"store_env": "NOWHERE"}, "--cross-job-store-env NOWHERE: there is no such environment variable"),
        ({"store_env": "PASSWORD"}, "--cross-job-store-env PASSWORD: the variable must hold one URI"),
        ({"store_env": "TWO"}, "must hold one URI"),
        ({"store_env": "EMPTY"}, "must hold one URI"),
        ({"store_env": SECRET}, "wants a name or a path, and was given a URI"),
        ({"store_file": SECRET}, "wants a name or a path, and was given a URI"),
        ({"store_file": "{tmp}/absent"}, "absent cannot be read on .*No such file"),
        ({"store_file": "{tmp}"}, "cannot be read on .*directory"),
        ({"store_file": "{tmp}/password"}, "password: the file must hold one URI"),
        ({"store_file": "{tmp}/bytes"}, "it is no text"),
    ],
)
def test_a_source_that_is_none_is_refused_without_showing_what_it_holds(given, said, tmp_path, monkeypatch):
    for name, value in {"STORE": SECRET, "PASSWORD": "hunter2", "TWO": f"{SECRET} {SECRET}", "EMPTY": " "}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "password").write_text("hunter2")
    (tmp_path / "bytes").write_bytes(b"\xff\xfehunter2")
    args = {f"cross_job_{name}": value.replace("{tmp}", str(tmp_path)) for name, value in given.items()}
    with pytest.raises(BadInput, match=said) as refused:
        Settings.from_args(SimpleNamespace(**args))
    assert "hunter2" not in str(refused.value)


def test_a_password_on_the_command_line_is_warned_of_once_and_not_shown(caplog):
    settings._warn_of_password.cache_clear()
    args = SimpleNamespace(cross_job_store=SECRET)
    assert Settings.from_args(args) == Settings.from_args(args)
    (warning,) = caplog.messages
    assert warning.startswith("--cross-job-store has a password in it")
    assert "give --cross-job-store-env NAME" in warning
    assert "hunter2" not in warning


@pytest.mark.parametrize(
    ("uri", "held"),
    [
        (SECRET, True),
        ("rediss://user:pa/ss@host:6379/0", True),
        ("redis://:pa#ss@host", True),
        ("redis://:pa?ss@host", True),
        ("s3://KEY:sec/ret@bucket/run", True),
        ("s3://bucket/run?endpoint=a&secret_access_key=x", True),
        ("unix:///socket?db=0&password=x", True),
        ("az://run?account_name=a&account_key=x", True),
        ("az://run?master_key=x", True),
        ("gs://run?service_account_key=x", True),
        ("rediss://host:6379/0?ssl_keyfile=/a/b", False),
        ("abfs://run@account?se=1&sig=x", True),
        ("abfs://run@account?sas_sig=x", True),
        ("abfs://run@account?signed=1&design=2", False),
        ("redis://host:6379/0", False),
        ("redis://user@host:6379/0", False),
        ("s3://bucket/run@1", False),
        ("file:///shared/a:b@c", False),
        ("file:///shared/run1", False),
    ],
)
def test_which_uris_hold_a_password(uri, held):
    assert holds_password(uri) is held


def test_the_help_says_the_defaults():
    text = add_arguments(argparse.ArgumentParser()).format_help()
    text = re.sub(r"\s+", " ", text)
    for flag, name in FLAGS.items():
        shown = re.search(rf"{flag} [A-Z_]+ [^-].*?\(default: ([^)]+)\)", text)
        assert shown, flag
        default = getattr(Settings(), "store" if name in STORE_SOURCES else name)
        assert shown[1] == (OF_THE_JOB.get(name, (None, "none"))[1] if default is None else str(default)), flag


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("namespace", ""),
        ("namespace", "  "),
        ("namespace", 3),
        ("max_ahead", -1),
        ("retain", -1),
        ("retain_s", -0.5),
        ("retain_bytes", 0),
        ("max_bytes", 0),
        ("max_staleness", -1),
        ("on_stale", "never"),
        ("on_stale", "drop"),  # without a bound on staleness it says nothing
        *(("max_ahead", bad) for bad in (True, 1.5, "3", math.nan, [1], np.array([1, 2]), 2**63)),
        *(("timeout_s", bad) for bad in (True, "3", [1], math.inf, np.array([1, 2]))),
        ("retain_bytes", 1e9),
        ("store", 3),
        ("store", b"file:///x"),
        ("on_stale", ["drop"]),
        ("traces", True),
        ("heartbeat_s", None),
        ("peer_grace_s", -0.1),
        ("peer_grace_s", math.nan),
        ("heartbeat_s", 0.0),
        ("heartbeat_s", 0.049),
        ("heartbeat_s", math.nan),
        ("timeout_s", -1.0),
        ("timeout_s", math.nan),
        ("dead_after_s", 2.9),
        ("dead_after_s", 0.0),
        ("dead_after_s", math.nan),
    ],
)
def test_refused_settings_name_their_flag(name, value):
    with pytest.raises(BadInput, match="--cross-job-" + name.replace("_", "-")):
        Settings(**{name: value})
    if value is not None:
        with pytest.raises(BadInput):
            Settings.from_args(SimpleNamespace(**{f"cross_job_{name}": value}))


@pytest.mark.parametrize(
    "given",
    [
        *(
            {"max_ahead": 0},
            {"retain": 0},
            {"retain_s": 0},
            {"retain_bytes": 1},
            {"max_bytes": 1},
            {"max_staleness": 0},
            {"timeout_s": 0},
        ),
        *({"max_staleness": 0, "on_stale": how} for how in ("wait", "drop", "regenerate")),
        {"heartbeat_s": 0.05, "dead_after_s": 0.2},
    ],
)
def test_the_least_that_is_accepted(given):
    Settings(**given)


def test_numbers_of_numpy_are_taken_as_those_of_python():
    found = Settings(max_ahead=np.int32(3), timeout_s=np.float32(2), peer_grace_s=5)
    assert (found.max_ahead, found.timeout_s, found.peer_grace_s) == (3, 2.0, 5.0)
    assert [type(getattr(found, name)) for name in ("max_ahead", "timeout_s", "peer_grace_s")] == [int, float, float]


def test_settings_do_not_change():
    with pytest.raises(AttributeError):
        Settings().max_ahead = 3  # type: ignore[misc]


# ---------------------------------------------------------------------- errors


def classes() -> list[type[CrossJobError]]:
    found = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, CrossJobError)]
    assert len(found) > 10
    return found


def examples() -> list[CrossJobError]:
    verdict = {"kind": "dead", "who": "producer of job exp", "silent_s": 3.5}
    told = [kind(f"{kind.__name__} of job 'exp': é", verdict) for kind in (WaitTimeout, PeerFailed)]
    bare = [kind("without a verdict") for kind in (WaitTimeout, PeerFailed)]
    return [*told, *bare, *(kind(f"{kind.__name__} of job 'exp': é") for kind in classes()), CrossJobError()]


@pytest.mark.parametrize("error", examples(), ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    "through",
    [
        *(lambda e, p=p: pickle.loads(pickle.dumps(e, p)) for p in range(2, pickle.HIGHEST_PROTOCOL + 1)),
        copy.copy,
        copy.deepcopy,
    ],
    ids=[*(f"pickle{p}" for p in range(2, pickle.HIGHEST_PROTOCOL + 1)), "copy", "deepcopy"],
)
def test_errors_survive_travel(error, through):
    error.__cause__ = ValueError("why")
    found = through(error)
    assert type(found) is type(error)
    assert found.args == error.args
    assert str(found) == str(error) == (error.args[0] if error.args else "")
    assert found.exit_code == error.exit_code
    if isinstance(error, (WaitTimeout, PeerFailed)):
        assert found.verdict == error.verdict == (error.args[1] or {})


def test_how_long_the_holder_of_a_place_is_silent_travels_with_the_refusal():
    assert pickle.loads(pickle.dumps(errors.JobIdTaken("taken", 12.5))).silent_s == 12.5
    assert errors.JobIdTaken("taken").silent_s == 0.0


def test_the_settings_of_a_job_are_those_that_the_ledger_takes():
    assert {*OF_THE_JOB} == {*OF_JOB}
    fresh = Job("exp")
    assert {name: getattr(fresh, name) for name in OF_JOB} == {name: held for name, (held, _) in OF_THE_JOB.items()}
    assert all(getattr(Settings(), name) is None for name in OF_JOB)
    assert ABOUT["on_stale"]["choices"] == (WAIT, DROP, REGENERATE)
    assert ABOUT["store_mode"]["choices"] == (WRITE_THROUGH, WRITE_BEHIND)


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [("BadInput", ValueError), ("WaitTimeout", TimeoutError), ("RolloutNotFound", KeyError)],
)
def test_errors_are_what_python_calls_them(kind, builtin):
    with pytest.raises(builtin) as raised:
        raise getattr(errors, kind)("message")
    assert str(raised.value) == "message"


def drawn_tree() -> dict[str, tuple[str, int]]:
    """Name -> (parent, exit code) as the docstring draws it; a line without a code has that of its parent."""
    line = re.compile(r"^    ([│├└─ ]*)([A-Z]\w+)(?: \((\w+)\))?(?: +(?:exit code )?(\d+)\b)?")
    found: dict[str, tuple[str, int]] = {}
    above: list[str] = []
    for text in (errors.__doc__ or "").splitlines():
        match = line.match(text)
        if match is None:
            continue
        depth, name = len(match[1]) // 4, match[2]
        parent = above[depth - 1] if depth else "Exception"
        above = [*above[:depth], name]
        found[name] = (parent, int(match[4]) if match[4] else found[parent][1])
        if match[3]:
            assert issubclass(getattr(errors, name), getattr(importlib.import_module("builtins"), match[3]))
    return found


def test_the_drawn_tree_is_the_real_one():
    assert drawn_tree() == {kind.__name__: (kind.__bases__[0].__name__, kind.exit_code) for kind in classes()}


def test_every_error_says_what_it_means():
    for kind in classes():
        assert kind.__doc__
        assert kind.__doc__ is not CrossJobError.__doc__ or kind is CrossJobError


# ---------------------------------------------------------------------- ids


@pytest.mark.parametrize("good", ["a", "0", "exp1", "Qwen2.5-7B_run.3", "x" * 128])
def test_job_ids(good):
    assert check_job_id(good) == good


@pytest.mark.parametrize(
    "bad", [None, "", " ", "a b", "a\n", ".hidden", "-x", "_x", "a/b", "é", "x" * 129, 3, b"exp", ["exp"], True]
)
def test_job_ids_that_are_refused(bad):
    with pytest.raises(BadInput, match="job id"):
        check_job_id(bad)


def test_no_job_id_says_what_to_pass():
    with pytest.raises(BadInput, match="--job-id NAME"):
        check_job_id(None)


@pytest.mark.parametrize("good", [0, 7, 2**63 - 2, np.int64(3), np.uint8(255), np.array(4)])
def test_rollout_ids(good):
    found = check_rollout_id(good)
    assert type(found) is int
    assert found == good


@pytest.mark.parametrize(
    "bad",
    [
        *(-1, np.int32(-1), True, np.bool_(True), 1.0, np.float64(2), math.nan, "0", None, [1], b"1"),
        *(np.array([1, 2]), np.array(1.5), np.array(True), 2**63 - 1, np.uint64(2**63), 10**5000),
    ],
    ids=lambda value: repr(value)[:30] if not isinstance(value, int) or value < 2**64 else "huge",
)
def test_rollout_ids_that_are_refused(bad):
    with pytest.raises(BadInput, match="rollout id"):
        check_rollout_id(bad)
