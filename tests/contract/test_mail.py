"""Questions and answers of brokers, in every store: each arrives whole, is answered once, and executes nothing."""

import threading

import pytest

from slime.cross_job.errors import BadInput, CrossJobError, JobIdTaken, NotStored, WaitTimeout
from slime.cross_job.mail import Mail
from slime.cross_job.types import ClientInfo, Located, Payload

NAME = "0000000000001-a"


@pytest.fixture
def mail(store) -> Mail:
    return Mail(store, "exp")


def test_a_question_and_its_answer_arrive_as_they_are(mail, place):
    payload = Payload("t", "", 3, meta={"x": [1, None]}, columns=("a", "b"), stored="n")
    mail.ask(NAME, "me", {"method": "call", "args": ["publish", "p", 0, payload], "kwargs": {"compare": True}})
    other = Mail(place.open(), "exp")
    assert other.questions() == [NAME]
    asked = other.question(NAME)
    assert asked == {
        "asker": "me",
        "method": "call",
        "args": ["publish", "p", 0, payload],
        "kwargs": {"compare": True},
    }
    with pytest.raises(NotStored):
        mail.take(NAME, "me")
    located = Located("exp", 0, 1, payload, 5.5, 1)
    other.answer(NAME, "me", (True, located))
    assert other.questions() == []
    assert mail.answers("me") == [NAME]
    assert mail.answers("somebody-else") == []
    assert mail.take(NAME, "me") == (True, located)
    assert mail.answers("me") == []


@pytest.mark.parametrize(
    "error", [JobIdTaken("taken", 2.5), WaitTimeout("late", {"kind": "dead"}), CrossJobError("something")]
)
def test_an_error_is_raised_where_it_was_asked(mail, error):
    mail.ask(NAME, "me", {"method": "call"})
    mail.answer(NAME, "me", error)
    with pytest.raises(type(error)) as raised:
        mail.take(NAME, "me")
    assert raised.value.args == error.args
    assert vars(raised.value) == vars(error)


def test_what_is_withdrawn_is_not_asked(mail):
    mail.ask(NAME, "me", {"method": "call"})
    mail.withdraw(NAME)
    assert mail.question(NAME) is None
    assert mail.questions() == []


@pytest.mark.parametrize(
    "hostile",
    [
        b"",
        b"cos\nsystem\n(S'true'\ntR.",
        b'{"format": 1, "xxh3_128": "0", "body": {}}',
        b'{"format": 99, "xxh3_128": "0", "body": {"text": "{}"}}',
    ],
)
def test_what_is_no_letter_goes_and_disturbs_nobody(mail, store, hostile):
    store.put(f"exp/mail/question/{NAME}.json", hostile)
    assert mail.question(NAME) is None
    assert mail.questions() == []


@pytest.mark.parametrize("name", ["__init__", "Any", "BadInputs", "CrossJobError.__class__"])
def test_an_error_of_a_kind_that_is_not_known_is_one_of_ours(mail, store, name):
    from slime.cross_job.mail import _letter

    store.put(f"exp/mail/answer/me/{NAME}.json", _letter({"error": name, "args": ["boom"]}))
    with pytest.raises(CrossJobError, match="boom") as raised:
        mail.take(NAME, "me")
    assert type(raised.value) is CrossJobError


def test_what_json_cannot_hold_is_refused(mail):
    with pytest.raises(BadInput):
        mail.ask(NAME, "me", {"args": [object()]})
    assert mail.questions() == []


def test_mail_that_nobody_fetches_is_listed_and_deleted(mail):
    mail.ask(NAME, "me", {"method": "call"})
    mail.ask("0000000000002-b", "me", {"method": "call"})
    mail.answer("0000000000002-b", "me", 1)
    mail.ask("9999999999999-c", "me", {"method": "call"})
    letters = mail.letters()
    assert len(letters) == 3
    mail.delete([key for key in letters if "-c" not in key])
    assert mail.questions() == ["9999999999999-c"]


def test_many_ask_at_once(mail, place):
    names = [f"000000000000{n}-{n}" for n in range(8)]

    def ask(name: str) -> None:
        Mail(place.open(), "exp").ask(name, name, {"args": [name, ClientInfo(name, "exp", "consumer")]})

    threads = [threading.Thread(target=ask, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mail.questions() == names
    assert [mail.question(name)["args"][0] for name in names] == names
