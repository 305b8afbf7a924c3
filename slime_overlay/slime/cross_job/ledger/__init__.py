"""The ledger: who published, demanded, leased and acked what. The broker's whole logic, without Ray and without Arrow.

Pure state with an injected clock: every method returns at once; waiting is the broker's business, which asks again
when something changed. A method that finds nothing *yet* returns None; one that can never succeed raises.

    ledger.py       holds the parts            registry.py   every job and client, and the clocks
    membership.py   who is attached            leases.py     claim, ack, release, resume
    rollouts.py     versions, values, losses   retention.py  how long what is acked is kept
    pacing.py       what is generated next     prompts.py    where the source of prompts stands
    weight_gate.py  weights and engines        operator.py   pause, drain, requeue, discard
    history.py      what happened, for people  views.py      status and verdicts
    lifetime.py     complete, forgotten        garbage.py    what vaults and stores may free
    operations.py   how operations are declared

Below them, what they share: state.py (plain records), tables.py and changes.py (what changed in a job), gate.py (the
states of the engines' weights), status.py and verdicts.py (in words), snapshot.py and records_json.py (a job as it is
kept, and made again).

A part is given those parts that it uses; no part imports or holds one that stands on it.
"""

from .ledger import Ledger

__all__ = ["Ledger"]
