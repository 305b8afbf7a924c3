"""Questions of one broker to another, which it reaches through a job's durable store only: a key each.

    JOB/mail/question/NAME.json           what is asked, and whose answer it is to be
    JOB/mail/answer/ASKER/NAME.json       what came of it: a value, or an error of ours

Whoever keeps the job's journal answers; a question that nobody has answered yet is answered by the next keeper. So a
question may be carried out twice, as a call of Ray's may whose answer was lost; operations bear that. NAME begins with
the time, as that of a payload. Records of the ledger travel as JSON
(records_json.py): nothing that is read can execute anything.
"""

import logging
from collections.abc import Sequence
from typing import Any

from . import errors
from .archive import opened, sealed
from .errors import BadInput, CrossJobError, NotStored, PayloadDamaged
from .records_json import decode, encode
from .stores import Store

logger = logging.getLogger(__name__)


class Mail:
    """Questions about one job, and their answers, in a store. Methods block."""

    def __init__(self, store: Store, job_id: str):
        self._store, self._folder = store, f"{job_id}/mail"

    def ask(self, name: str, asker: str, question: dict[str, Any]) -> None:
        """Leave a question. Raises BadInput for what JSON cannot hold, such as Ray's handles."""
        self._store.put(self._question(name), _letter({"asker": asker, **question}))

    def withdraw(self, name: str) -> None:
        """Nobody waits for the answer any more."""
        self._store.delete([self._question(name)])

    def questions(self) -> list[str]:
        """Names of those without an answer, oldest first."""
        return [_name(key) for key in self._store.keys(f"{self._folder}/question")]

    def question(self, name: str) -> dict[str, Any] | None:
        """What is asked; None: it was withdrawn, or is not readable, and goes."""
        try:
            found = _read(self._store.get(self._question(name)))
        except NotStored:
            return None
        except (PayloadDamaged, BadInput) as error:
            logger.warning("question %s is not answered: %s", name, error)
            self.withdraw(name)
            return None
        return found

    def answer(self, name: str, asker: str, outcome: Any) -> None:
        """Leave an answer: a value, or an error that the asker is to raise."""
        body: dict[str, Any] = {"value": outcome}
        if isinstance(outcome, CrossJobError):
            body = {"error": type(outcome).__name__, "args": [*outcome.args]}
        self._store.put(self._answer(asker, name), _letter(body))
        self._store.delete([self._question(name)])

    def answers(self, asker: str) -> list[str]:
        """Names of the questions of this asker that were answered."""
        return [_name(key) for key in self._store.keys(f"{self._folder}/answer/{asker}")]

    def take(self, name: str, asker: str) -> Any:
        """The answer, which is taken out of the store. Raises the error that it is. NotStored: there is none."""
        found = _read(self._store.get(self._answer(asker, name)))
        self._store.delete([self._answer(asker, name)])
        if "error" not in found:
            return found["value"]
        kind = getattr(errors, found["error"], CrossJobError)
        raise (kind if isinstance(kind, type) and issubclass(kind, CrossJobError) else CrossJobError)(*found["args"])

    def letters(self) -> list[str]:
        """Keys of all questions and answers that are there: nobody fetches those that stay for minutes."""
        return self._store.keys(self._folder)

    def delete(self, keys: Sequence[str]) -> None:
        """Delete these letters."""
        self._store.delete(keys)

    def _question(self, name: str) -> str:
        return f"{self._folder}/question/{name}.json"

    def _answer(self, asker: str, name: str) -> str:
        return f"{self._folder}/answer/{asker}/{name}.json"


def _name(key: str) -> str:
    return key.rpartition("/")[2].removesuffix(".json")


def _letter(body: dict[str, Any]) -> bytes:
    return sealed({"text": encode(body).decode()})


def _read(data: Any) -> dict[str, Any]:
    try:
        found = decode(opened(data)["text"].encode())
    except (KeyError, TypeError, AttributeError) as error:
        raise PayloadDamaged(f"it is no letter: {error}") from None
    if not isinstance(found, dict):
        raise PayloadDamaged("it is no letter")
    return found
