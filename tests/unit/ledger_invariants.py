"""What must hold of the ledger after every step of test_ledger_model.py, as of its model (ledger_model.py)."""

from hypothesis.stateful import invariant

from tests.unit.ledger_clients import JOB, KEYS, Clients
from tests.unit.ledger_model import Life


class Invariants(Clients):
    """See the module."""

    @invariant()
    def holds(self) -> None:
        self.nothing_is_lost_and_nothing_leaks()
        self.leases_belong_to_the_living_and_to_one_of_a_group()
        self.the_figures_agree()
        self.what_is_over_is_not_remembered()
        self.what_people_are_shown_is_true()

    def nothing_is_lost_and_nothing_leaks(self) -> None:
        """Every recorded token can be read, was lost, or its vault was told once to free it; never two of these."""
        self.tell_of_drops()
        readable = [v.payload.token for r in self.ledger.catalog() for v in self.ledger.versions(JOB, r.rollout_id)]
        values = [self.ledger.get_value(JOB, key) for key in KEYS]
        readable += [value.payload.token for value in values if value is not None]
        assert sorted(readable) == sorted((self.life or Life()).tokens())
        self.shed |= {*(self.life or Life()).shed_tokens}
        twice = [token for token in self.shed if token in readable or token in self.lost]
        assert sorted([*readable, *self.told.elements(), *self.lost]) == sorted([*self.payloads, *twice])

    def leases_belong_to_the_living_and_to_one_of_a_group(self) -> None:
        groups = self.ledger.jobs[JOB].groups.values() if JOB in self.ledger.jobs else ()
        held = {(g.name, r): lease for g in groups for r, lease in g.leases.items()}
        assert held == (self.life.leases if self.life else {})
        for (group, _), (owner, _) in held.items():
            assert self.ledger.clients[owner].attached
            assert self.ledger.clients[owner].info.group == group

    def the_figures_agree(self) -> None:
        status = self.ledger.status()
        if self.life is None:
            assert status == {}
            return
        life, told = self.life, status[JOB]
        expected = life.figures()
        assert {name: told[name] for name in expected} == expected
        assert expected["claimed"] - expected["requeued"] - expected["acked"] == len(life.leases)
        states = {group: members[-1].state for group, members in life.groups.items()}
        assert {group: shown["state"] for group, shown in told["consumers"].items()} == states

    def what_is_over_is_not_remembered(self) -> None:
        """Beyond ids and clients, nothing grows with what was freed or has ended."""
        job = self.ledger.jobs.get(JOB)
        assert (job is None) == (self.life is None)
        assert set(self.ledger.clients) == set(self.people)
        if job is None or self.life is None:
            return
        life, outstanding = self.life, {*self.life.published} - self.life.freed
        assert {r: {v.version: v.payload for v in versions} for r, versions in job.rollouts.items()} == life.readable
        assert [*job.done] == life.settled
        assert len(job.done) <= (
            job.retain if job.retain is not None else 0 if job.retain_s is None is job.retain_bytes else 99
        )
        assert not life.too_many_bytes() or all(
            p.stored for r in life.settled for p in life.readable.get(r, {}).values()
        )
        assert job.complete or job.demands == life.wanted
        assert set(job.positions) <= outstanding
        assert len(job.sources) <= len(job.positions) + 1
        for group in job.groups.values():
            assert set(group.acked) <= outstanding or job.complete
            assert set(group.leases) <= outstanding
            assert set(group.acked).isdisjoint(group.leases)
            assert len(group.ready) <= job.published + job.requeued + job.losses + job.dropped + job.regenerated

    def what_people_are_shown_is_true(self) -> None:
        """`progress` says of every rollout what the model knows of it."""
        job, life = self.ledger.jobs.get(JOB), self.life
        if job is None or life is None:
            return
        assert {*life.readable, *life.lost} <= {*job.progress} or job.complete
        for rollout_id, known in job.progress.items():
            allowed: tuple[str, ...] = ("demanded", "generating", "acked")  # acked: by another group than wants it
            if rollout_id in life.readable:
                allowed = ("published", "claimed", "acked")
            elif rollout_id in life.freed:
                allowed = ("freed", "dropped")
            elif rollout_id in job.done:
                allowed = ("acked",)  # its payload went with a vault since
            elif job.complete:
                allowed = ("acked", "lost", "demanded", "generating")
            elif rollout_id in life.lost:
                allowed = ("lost", "demanded", "generating", "acked")
            assert known.state in allowed, (rollout_id, known.state, allowed)
            groups = job.groups.values()
            if known.state == "claimed":
                assert any(rollout_id in g.leases for g in groups)
            elif known.state == "acked":
                assert any(rollout_id in g.acked for g in groups)
            elif known.state == "demanded":
                assert rollout_id in job.demands or rollout_id in life.begun
            elif known.state == "generating":
                assert rollout_id in job.handed
        seqs = [known.seq for known in job.progress.values()]
        assert seqs == sorted({*seqs})
        assert not seqs or seqs[-1] <= job.seq
