"""The live view's server over HTTP, before a stand-in of the viewer: what it asks the broker, how old its answers are,
who is let in. No Ray, no browser."""

import contextlib
import http.client
import json
import socket
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

import pytest

from slime.cross_job.errors import BadInput, BrokerLost, NoBroker
from slime.cross_job.ops.access import CONTROL, VIEW, Door, given_token, host_is_ours, is_loopback, ray_asks
from slime.cross_job.ops.web import WebView
from tests.support.patience import patient
from tests.support.viewer_stand_in import HOSTILE, ViewerStandIn

POLL_S = 0.1


class Client:
    """Asks a WebView, as curl would."""

    def __init__(self, view):
        self.port = view.port
        self.headers = {"Host": f"127.0.0.1:{view.port}"}

    def ask(self, path, method="GET", body=None, **headers):
        """(status, headers, body)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            sent = self.headers | {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()

    def get(self, path, **query):
        """JSON; its status is in "http"."""
        status, _, body = self.ask(f"{path}?{urllib.parse.urlencode(query)}")
        return json.loads(body) | {"http": status}

    def look(self, **query):
        return self.get("/api/look", **query)

    def post(self, wish, **headers):
        headers = {"Content_Type": "application/json"} | headers
        status, _, body = self.ask("/api/control", "POST", json.dumps(wish), **headers)
        return json.loads(body) | {"http": status}


def until(condition, timeout_s=10.0):
    deadline = time.monotonic() + patient(timeout_s)
    while not (found := condition()):
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)
    return found


@pytest.fixture
def viewer():
    return ViewerStandIn().begin()


@pytest.fixture
def client(viewer):
    with WebView(lambda: viewer, poll_s=POLL_S) as view:
        yield Client(view)


@pytest.fixture
def steering(viewer):
    with WebView(lambda: viewer, poll_s=POLL_S, allow_control=True) as view:
        yield Client(view)


# ---------------------------------------------------------------- what is told


def test_the_first_look_has_all_and_the_next_what_is_new(viewer, client):
    viewer.run(5)
    found = client.look()
    assert (found["http"], found["job_id"], found["anew"], found["namespace"]) == (200, "exp", True, "stand-in")
    rows = [dict(zip(found["fields"], row)) for row in found["rows"]]
    assert sorted(row["rollout_id"] for row in rows) == [0, 1, 2, 3, 4]
    assert found["status"]["acked"] == 5
    assert [event["kind"] for event in found["events"]] == ["attached", "attached"]
    viewer.demand(5)
    viewer.ledger.note_event("exp", "restarted", "its broker")

    def more():
        known = {"run": found["run"], "since": found["seq"], "events_since": 2}
        new = client.look(job="exp", **known)
        return new if new["rows"] and new["events"] else None  # perhaps looked for between the two

    new = until(more)
    assert not new["anew"]
    assert [row[0] for row in new["rows"]] == [5]
    assert [event["kind"] for event in new["events"]] == ["restarted"]
    assert client.look(job="exp", run=new["run"], since=new["seq"], events_since=3)["rows"] == []


def test_fifty_who_look_cost_the_broker_one_question_a_second(viewer):
    viewer.run(200)
    poll_s, last_s = 0.5, 4.0
    with WebView(lambda: viewer, poll_s=poll_s) as view, ThreadPoolExecutor(50) as pool:

        def look_on(number):
            client, known, looks = Client(view), {}, 0
            while time.monotonic() < end:
                found = client.look(job="exp", **known)
                known = {"run": found["run"], "since": found["seq"], "events_since": 2}
                looks += 1
                time.sleep(0.4)
            return looks

        end = time.monotonic() + last_s
        looks = sum(pool.map(look_on, range(50)))
    last_s += time.monotonic() - end  # the last looks took their time
    asked = viewer.calls.count("look")
    assert looks > 5 * asked  # the witness: they looked far more often
    assert asked <= last_s / poll_s + 2
    assert len(viewer.calls) - asked <= 2  # the list of jobs


def test_nobody_looks_and_nothing_is_asked(viewer):
    with WebView(lambda: viewer, poll_s=0.05):
        time.sleep(0.5)
        assert viewer.calls == []


def test_only_what_changed_is_asked_for(viewer, client):
    asked = []
    look = viewer.look
    viewer.look = lambda job_id, **known: (asked.append(known), look(job_id, **known))[1]
    viewer.run(20)
    client.look()
    until(lambda: len(asked) > 2)
    assert asked[0] == {"since": -1, "events_since": 0}
    assert asked[-1] == {"since": viewer.look("exp")["seq"], "events_since": 2}


@pytest.mark.parametrize("how", ["fewer", "as many"])
def test_a_job_that_began_anew_is_asked_for_anew(viewer, client, how):
    viewer.run(6)
    found = client.look()
    viewer.forget()
    viewer.begin()
    viewer.run(2 if how == "fewer" else 6)
    known = {"run": found["run"], "since": found["seq"], "events_since": 2}
    rows = 2 if how == "fewer" else 6  # perhaps looked for before all of them were there
    anew = until(lambda: (new := client.look(job="exp", **known))["anew"] and len(new["rows"]) == rows and new)
    assert len(anew["events"]) == 2


def test_an_unreachable_broker_makes_the_figures_old_and_is_told(viewer, client):
    viewer.run(3)
    before = client.look()
    assert before["kind"] is None
    assert before["age_s"] < patient(1)
    viewer.error = BrokerLost("the broker does not answer for 10 s")
    lost = until(lambda: (found := client.look())["kind"] and found)
    time.sleep(0.4)
    later = client.look()
    assert (later["http"], later["kind"], later["status"]["acked"]) == (200, "BrokerLost", 3)
    assert later["age_s"] >= lost["age_s"] + 0.3
    viewer.error = None
    back = until(lambda: (found := client.look())["kind"] is None and found)
    assert back["age_s"] < patient(1)


def test_a_broker_that_hangs_makes_the_figures_old(viewer, client):
    viewer.run(3)
    assert client.look()["age_s"] < patient(1)
    viewer.hangs = threading.Event()
    time.sleep(0.8)
    began = time.monotonic()
    found = client.look()
    assert time.monotonic() - began < patient(0.5)  # nobody waits for it
    assert found["age_s"] > 0.6
    viewer.hangs.set()
    until(lambda: client.look()["age_s"] < patient(0.5))


def test_who_looks_before_there_is_a_broker_is_told_why_and_sees_it_come(viewer):
    there = threading.Event()

    def factory():
        if not there.is_set():
            raise NoBroker("namespace 'x' has no broker")
        return viewer

    with WebView(factory, poll_s=POLL_S) as view:
        client = Client(view)
        found = client.look()
        assert (found["http"], found["kind"]) == (503, "NoBroker")
        assert "no broker" in found["error"]
        there.set()
        until(lambda: client.look()["http"] == 200)


def test_no_jobs_and_no_such_job(client, viewer):
    assert client.look(job="other")["kind"] == "JobNotFound"
    viewer.forget()
    with WebView(lambda: viewer, poll_s=POLL_S) as view:
        found = Client(view).look()
    assert (found["http"], found["kind"]) == (404, "JobNotFound")
    assert "no jobs yet" in found["error"]


def test_of_several_jobs_the_newest_that_is_open_is_shown_and_all_are_named(viewer, client):
    viewer.begin("newer")
    found = until(lambda: (found := client.look()).get("status") and found)
    assert found["job_id"] == "newer"
    assert found["jobs"] == {"exp": False, "newer": False}
    assert client.look(job="exp")["job_id"] == "exp"


def test_details_and_samples(viewer, client):
    viewer.texts = lambda row: {"response": HOSTILE[row], "big": "x" * 10_000_000, "nan": float("nan")}
    viewer.demand(0)
    viewer.make(0)
    client.look()
    detail = client.get("/api/rollout", job="exp", id=0)
    assert detail["versions"][0]["num_samples"] == 8
    found = client.get("/api/samples", job="exp", id=0, first=2, count=3)
    assert [sample["index"] for sample in found["samples"]] == [2, 3, 4]
    assert found["samples"][0]["values"]["response"] == HOSTILE[2]
    assert len(found["samples"][0]["values"]["big"]) < 21_000
    assert found["samples"][0]["values"]["nan"] == "nan"
    assert client.get("/api/samples", job="exp", id=9)["http"] == 404
    assert client.get("/api/samples", job="exp", id="0;drop")["kind"] == "BadInput"
    assert client.get("/api/samples", job="exp")["http"] == 400
    assert client.get("/api/rollout", job="../etc", id=0)["kind"] == "BadInput"


def test_answers_hold_no_markup_and_no_guessing_of_types(client):
    status, headers, _ = client.ask("/api/look?job=%3Cscript%3E")
    assert status == 400
    assert headers["Content-Type"].startswith("application/json")
    assert headers["X-Content-Type-Options"] == "nosniff"
    status, headers, _ = client.ask("/")
    assert status == 200
    assert "script-src 'sha256-" in headers["Content-Security-Policy"]
    assert headers["Cache-Control"] == "no-store"
    assert client.ask("/nowhere")[0] == 404
    assert json.loads(client.ask("/nowhere")[2])["kind"] == "BadInput"


def test_clicks_beyond_what_is_sane_are_turned_away(viewer, client):
    viewer.run(2)
    client.look()
    viewer.hangs = threading.Event()
    with ThreadPoolExecutor(60) as pool:
        asked = [pool.submit(client.get, "/api/rollout", job="exp", id=0) for _ in range(60)]
        until(lambda: sum(f.done() for f in asked) >= 20)
        viewer.hangs.set()
        kinds = [future.result().get("kind") for future in asked]
    refused = kinds.count("Unreachable")
    assert 20 <= refused <= 24, "36 are taken in, and the last few to come may find room again"
    assert kinds.count(None) == 60 - refused


# ---------------------------------------------------------------- steering


def test_read_only_unless_it_was_allowed(viewer, client):
    found = client.post({"action": "pause", "job": "exp"})
    assert (found["http"], found["kind"]) == (403, "Refused")
    assert "--allow-control" in found["error"]
    assert viewer.ledger.jobs["exp"].control == "running"
    assert client.look()["allow_control"] is False


def test_a_job_is_steered_where_it_was_allowed(viewer, steering):
    viewer.demand(0, 1)
    viewer.make(0)
    viewer.make(1)
    viewer.train(0, ack=False)
    assert steering.look()["allow_control"] is True
    for action, control in (("pause", "paused"), ("drain", "draining"), ("resume", "running")):
        assert steering.post({"action": action, "job": "exp"})["http"] == 200
        assert viewer.ledger.jobs["exp"].control == control
    assert "pid 4711" in steering.post({"action": "requeue", "job": "exp", "rollout_id": 0})["said"]
    assert steering.post({"action": "discard", "job": "exp", "rollout_id": 1})["said"] == 1_250_000
    assert steering.post({"action": "discard", "job": "exp", "rollout_id": 1})["kind"] == "RolloutNotFound"
    assert steering.post({"action": "forget", "job": "exp"})["http"] == 400
    assert steering.post(["pause"])["http"] == 400


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example:80"},
        {"Host": ""},
        {"Content_Type": "text/plain"},
        {"Content_Type": "application/x-www-form-urlencoded"},
    ],
)
def test_other_sites_steer_nothing(viewer, steering, headers):
    steering.look()
    assert steering.post({"action": "pause", "job": "exp"}, **headers)["http"] in (400, 403)
    assert viewer.ledger.jobs["exp"].control == "running"
    ours = {"Origin": f"http://127.0.0.1:{steering.port}", "Sec_Fetch_Site": "same-origin"}
    assert steering.post({"action": "pause", "job": "exp"}, **ours)["http"] == 200


def test_other_sites_read_nothing(client):
    assert client.ask("/api/look", Host="rebound.example")[0] == 403
    assert client.ask("/", Host="rebound.example")[0] == 403
    assert client.ask("/api/look", Sec_Fetch_Site="cross-site")[0] == 403
    assert client.ask("/", Sec_Fetch_Site="cross-site")[0] == 200  # a link


# ---------------------------------------------------------------- the token


@pytest.fixture
def guarded(viewer):
    with WebView(lambda: viewer, poll_s=POLL_S, view_token="s3cret") as view:
        yield Client(view)


def test_without_the_token_nothing_is_told(viewer, guarded):
    for path in ("/", "/api/look", "/api/rollout?id=0", "/nowhere", "/?token=wrong", "/?token="):
        status, _, body = guarded.ask(path)
        assert (status, json.loads(body)["kind"]) == (401, "Refused")
    assert guarded.ask("/api/look", Authorization="Bearer wrong")[0] == 401
    assert guarded.ask("/api/look", Authorization="Basic s3cret")[0] == 401
    assert guarded.ask("/api/look", Cookie=f"slime_cross_job_{guarded.port}=s3cret")[0] == 401
    assert viewer.calls == []


def test_the_token_as_a_header_or_once_in_the_address(guarded):
    assert guarded.ask("/api/look", Authorization="Bearer s3cret")[0] == 200
    status, headers, _ = guarded.ask("/?token=s3cret&job=exp")
    assert (status, headers["Location"]) == (303, "/?job=exp")
    cookie = headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert "s3cret" not in cookie  # it goes to every server of this machine
    assert guarded.ask("/", Cookie=cookie.partition(";")[0])[0] == 200
    assert guarded.ask("/?token=s3cret&job=//evil")[0] == 400


@pytest.fixture
def two_tokens(viewer):
    with WebView(
        lambda: viewer, poll_s=POLL_S, allow_control=True, view_token="for looking", control_token="for steering"
    ) as view:
        yield Client(view)


def test_who_may_look_may_not_steer(viewer, two_tokens):
    look, steer = {"Authorization": "Bearer for looking"}, {"Authorization": "Bearer for steering"}
    wish = {"action": "pause", "job": "exp"}
    assert two_tokens.post(wish)["http"] == 401
    found = two_tokens.post(wish, **look)
    assert (found["http"], found["kind"]) == (403, "Refused")
    assert "for looking" in found["error"]
    assert viewer.ledger.jobs["exp"].control == "running"
    assert json.loads(two_tokens.ask("/api/look", **look)[2])["allow_control"] is False
    assert json.loads(two_tokens.ask("/api/look", **steer)[2])["allow_control"] is True
    assert two_tokens.post(wish, **steer)["http"] == 200
    assert viewer.ledger.jobs["exp"].control == "paused"


def test_a_browser_may_do_what_the_token_allows_by_which_it_came_in(viewer, two_tokens):
    def cookie(token):
        status, headers, _ = two_tokens.ask(f"/?token={token}")
        assert status == 303
        return {"Cookie": headers["Set-Cookie"].partition(";")[0]}

    wish = {"action": "pause", "job": "exp"}
    looks, steers = cookie("for%20looking"), cookie("for%20steering")
    assert json.loads(two_tokens.ask("/api/look", **looks)[2])["allow_control"] is False
    assert json.loads(two_tokens.ask("/api/look", **steers)[2])["allow_control"] is True
    assert two_tokens.post(wish, **looks)["http"] == 403
    assert two_tokens.post(wish, **steers)["http"] == 200


def test_steering_may_ask_for_a_token_where_looking_does_not(viewer):
    with WebView(lambda: viewer, poll_s=POLL_S, allow_control=True, control_token="for steering") as view:
        client = Client(view)
        assert client.look()["allow_control"] is False
        assert client.post({"action": "pause", "job": "exp"})["http"] == 403
        assert client.post({"action": "pause", "job": "exp"}, Authorization="Bearer for steering")["http"] == 200


def test_tokens_come_from_the_environment_or_a_file_and_are_not_shown(tmp_path):
    (tmp_path / "file").write_text("f" * 24 + "\n")
    (tmp_path / "short").write_text("hunter2")
    assert given_token("T", None, {}) is None
    assert given_token("T", None, {"T": "e" * 24}) == "e" * 24
    assert given_token("T", tmp_path / "file", {}) == "f" * 24
    for file, environment, said in (
        (tmp_path / "file", {"T": "e" * 24}, "use one of them"),
        (tmp_path / "none", {}, "cannot be read"),
        (tmp_path / "short", {}, "must be one word of 16 characters"),
        (None, {"T": "hunter2 hunter2 hunter2"}, "must be one word"),
        (None, {"T": ""}, "must be one word"),
    ):
        with pytest.raises(BadInput, match=said) as refused:
            given_token("T", file, environment)
        assert "hunter2" not in str(refused.value)


def test_whether_ray_asks_for_a_token(tmp_path):
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("from home\n")
    elsewhere = tmp_path / "elsewhere"
    assert ray_asks({"RAY_AUTH_MODE": "token"}, elsewhere)
    assert ray_asks({}, tmp_path)  # as Ray has it
    assert ray_asks({"RAY_AUTH_TOKEN": "given"}, elsewhere)
    assert ray_asks({"RAY_AUTH_TOKEN_PATH": str(tmp_path / ".ray" / "auth_token")}, elsewhere)
    assert not ray_asks({}, elsewhere)
    assert not ray_asks({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "given"}, tmp_path)


def test_what_others_reach_has_a_token_and_it_is_not_rays(viewer, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    for host in ("0.0.0.0", "", "::"):
        with pytest.raises(BadInput, match="SLIME_CROSS_JOB_VIEW_TOKEN"):
            WebView(lambda: viewer, host=host)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "rays")
    with pytest.raises(BadInput, match="or Ray asks for a token"):
        WebView(lambda: viewer)
    with pytest.raises(BadInput, match="steering needs a token of its own"):
        WebView(lambda: viewer, view_token="mine", allow_control=True)
    with pytest.raises(BadInput, match="different values"):
        WebView(lambda: viewer, view_token="mine", control_token="mine", allow_control=True)
    with WebView(lambda: viewer, host="0.0.0.0", view_token="mine") as view:
        client = Client(view)
        assert client.ask("/api/look", Authorization="Bearer rays")[0] == 401
        assert client.ask("/api/look", Authorization="Bearer mine")[0] == 200


@pytest.mark.parametrize(
    ("header", "ours"),
    [
        ("127.0.0.1:8000", True),
        ("localhost:9", True),
        ("LOCALHOST", True),
        ("a.localhost:1", True),
        ("[::1]:80", True),
        ("10.1.2.3", True),
        ("node7:80", True),
        ("evil.example:80", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.nip.example", False),
        ("[::1", True),
        ("", False),
        ("2130706433", False),
    ],
)
def test_hosts(header, ours):
    assert host_is_ours(header, ["node7"]) is ours


def test_loopback_is_recognised():
    assert is_loopback("127.0.0.1")
    assert is_loopback("::1")
    assert not is_loopback("0.0.0.0")
    with pytest.raises(BadInput, match="is no address"):
        is_loopback("no such host!")


def test_a_cookie_is_good_for_one_server():
    one, other = Door("v", "c", 1), Door("v", "c", 2)
    for level in (VIEW, CONTROL):
        assert one.admits({}, {one.cookie: one.cookie_value(level)}) == level
        assert not other.admits({}, {other.cookie: one.cookie_value(level)})
    assert not one.admits({"Authorization": "Bearer \udcff"}, {one.cookie: "\udcff"})
    assert not one.admits({"Authorization": "Bearer "}, {one.cookie: ""})


def test_who_may_do_what():
    assert Door(None, None, 1).admits({}, {}) == CONTROL
    assert Door(None, "c", 1).admits({}, {}) == VIEW
    assert Door(None, "c", 1).level_of("c") == CONTROL
    assert Door("v", None, 1).admits({}, {}) == ""
    assert Door("v", None, 1).level_of("v") == CONTROL  # which a view that is read-only gives nobody
    assert Door("v", None, 1).cookie_value(CONTROL)
    assert Door("v", "c", 1).level_of("v") == VIEW
    assert Door("v", "c", 1).level_of("c") == CONTROL
    assert Door("v", "c", 1).level_of("x") == ""


# ---------------------------------------------------------------- start and stop


def test_a_port_that_is_taken_is_told(viewer):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(BadInput, match=r"cannot listen at 127\.0\.0\.1, port \d+ .*choose another"):
            WebView(lambda: viewer, port=taken.getsockname()[1])
