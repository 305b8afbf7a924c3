"""What it takes a broker that restarts to know its rollouts again: pages of a vault's inventory, and its ledger.

Without Ray: each page is pickled and unpickled, as Ray does on both sides. The figure is how this grows, and how long
the longest single page takes: silence of a vault is bounded by the page, not by the inventory.
"""

import argparse
import json
import pickle
import time
from dataclasses import dataclass, replace

from bench_report import figure, table
from slime.cross_job.ledger import Ledger
from slime.cross_job.ledger.snapshot import gathered, listing, restore, snapshot
from slime.cross_job.ledger.state import TABLES
from slime.cross_job.types import ClientInfo, Located, Payload
from slime.cross_job.vault import actor as vault

_JOB = "bench"


@dataclass(frozen=True)
class Restart:
    """Seconds of CPU, by the number of rollouts that are published and not acked."""

    rollouts: int
    items: int
    pages_s: float
    longest_page_s: float
    restore_s: float


def measure(rollouts: int) -> Restart:
    """Restart a broker whose only job has so many rollouts."""
    ledger, held = Ledger(), list[Located]()
    ledger.membership.attach(ClientInfo("p", _JOB, "producer"), max_ahead=rollouts)
    ledger.membership.attach(ClientInfo("c", _JOB, "consumer", group="train"))
    for rollout_id in range(rollouts):
        payload = Payload(f"{rollout_id:032x}", f"{'f' * 56}/1", 20_000, num_samples=512, weight_version=rollout_id)
        payload = replace(payload, columns=("tokens", "mask"), source={"next": 512 * rollout_id})
        held.append(ledger.publish("p", rollout_id, payload)[1])
    tables = {name: dict(getattr(ledger.jobs[_JOB], name)) for name in TABLES}
    items = listing([*held], [(snapshot(ledger, _JOB, 1, 1), tables)])
    came, took = [], []
    for first in range(0, len(items), vault._PAGE):
        began = time.process_time()
        came += pickle.loads(pickle.dumps(items[first : first + vault._PAGE]))
        took.append(time.process_time() - began)
    began = time.process_time()
    again = Ledger()
    missing = restore(again, *gathered(came))
    restore_s = time.process_time() - began
    if missing or again.listed(_JOB) != ledger.listed(_JOB):
        raise SystemExit("the ledger is not what it was")
    return Restart(rollouts, len(items), sum(took), max(took), restore_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    found = [measure(rollouts) for rollouts in asked.rollouts]
    if asked.json:
        print(json.dumps([vars(one) for one in found]))
        return
    header = ["rollouts", "items", "pages, s", "longest page, s", "ledger, s"]
    rows = [
        [f"{one.rollouts:,}", f"{one.items:,}", *map(figure, (one.pages_s, one.longest_page_s, one.restore_s))]
        for one in found
    ]
    print(table("A broker restarts: seconds of CPU, both sides", header, rows))


if __name__ == "__main__":
    main()
