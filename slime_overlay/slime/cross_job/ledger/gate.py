"""The gate between generations and weight updates: at any time engines either generate or take weights.

Pure state, one per job, part of the ledger. It is in use from the first `begin_update` on, or as soon as a producer
says that it generates with engines (`gated`); jobs that hand weights over as a value never meet it.

    rollout job   next_demand ──► generating ──► publish
    train job     begin_update ─(no generation)─► holding ──► end_update: the engines have weights `version`

Engines that are new (another rollout job), or whose update was broken off, have weights of no known version: nothing
is generated with them before an update has come to its end. Its `stamp` is what all engines said of their weights then
(engine_weights.py); empty: these engines report nothing.
"""

from dataclasses import dataclass
from typing import Any

_NEVER = "no weights were loaded into these engines yet"


@dataclass(slots=True)
class Gate:
    """See the module. Clients are named by their id, rollout jobs by their producer epoch."""

    version: int | None = None  # weights that the engines have; meaningful while `unknown` is empty
    unknown: str = _NEVER  # why nobody can say which weights the engines have
    engines: int = 0  # producer epoch whose engines those are
    generating: int | None = None  # rollout id that was given to the producer and is not published
    holder: str = ""  # client that updates the weights now
    wanted_by: str = ""  # client that waits to update them
    until: int | None = None  # number of rollouts of the run, as its train job says
    stamp: str = ""  # what the engines said after the last update

    def producer_is(self, epoch: int) -> None:
        """The producer with this epoch asks for work; if it is a new one, so are its engines."""
        if epoch != self.engines:
            self.engines, self.generating = epoch, None
            self.unknown, self.stamp = _NEVER, ""

    @property
    def open(self) -> bool:
        """Whether a generation may start as far as weights go."""
        return not self.unknown and not self.holder

    def begin(self, client_id: str) -> bool:
        """Let this client update the weights, if nothing is generated and nobody else updates them."""
        if self.holder == client_id:
            return True
        self.wanted_by = client_id
        if self.holder or self.generating is not None:
            return False
        self.holder, self.wanted_by = client_id, ""
        self.unknown = "a weight update is under way"
        return True

    def end(self, client_id: str, version: int, stamp: str = "") -> bool:
        """The update that this client holds the gate for is through. False: it does not hold the gate."""
        if self.holder != client_id:
            return False
        self.holder, self.unknown, self.version, self.stamp = "", "", version, stamp
        return True

    def differs(self, said: Any) -> list[str]:
        """What engines say that generated with the weights that the gate let in, as far as it differs from those."""
        return [str(text) for text in said if text != self.stamp] if self.stamp and isinstance(said, list) else []

    def gone(self, client_id: str, who: str) -> None:
        """This client ended: a wish ends with it, and an update that it began stays broken off."""
        if self.wanted_by == client_id:
            self.wanted_by = ""
        if self.holder == client_id:
            self.holder, self.unknown = "", f"the {who} ended in the middle of a weight update"

    def producer_gone(self) -> None:
        """The producer ended: what it was generating will not be published, and its engines are gone."""
        self.generating, self.unknown = None, _NEVER

    def new_history(self, who: str) -> None:
        """Training goes on from a checkpoint: what the engines have may be of a history that is void now."""
        if self.engines and not self.unknown:
            self.unknown = f"the {who} has resumed and not loaded its weights yet"
