"""The state of a source of prompts goes on elsewhere exactly, or is refused by name: nothing of it is dropped.

`Sample` and `Slimes` stand for slime's Sample and RolloutDataSourceWithBuffer at v0.3.1; the real ones, at each pin:
tests/slime/test_source.py.
"""

import json
import sys
import time
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from slime.cross_job.adapter import data_source
from slime.cross_job.batch import Batch
from slime.cross_job.errors import BadInput, ContentRefused


@dataclass
class Sample:
    index: int | None = None
    tokens: list[int] = field(default_factory=list)
    rollout_log_probs: list[float] | None = None
    rollout_routed_experts: Any = None
    multimodal_inputs: Any = None

    class Status(Enum):
        PENDING = "pending"
        ABORTED = "aborted"

    status: Status = Status.PENDING
    metadata: dict = field(default_factory=dict)

    def to_dict(self):
        return {**self.__dict__, "status": self.status.value}

    @staticmethod
    def from_dict(data):
        return Sample(**{**data, "status": Sample.Status(data["status"])})


class Slimes:
    def __init__(self, args):
        self.args, self.metadata, self.buffer, self.dataset = args, {}, [], None
        self.epoch_id = self.sample_offset = self.sample_index = self.sample_group_index = 0

    def save(self, rollout_id):
        if self.args.rollout_global_dataset:
            Path(self.args.save, f"state_{rollout_id}.json").write_text(json.dumps([self.sample_offset]))

    def load(self, rollout_id=None):
        path = Path(self.args.load or "", f"state_{rollout_id}.json")
        if self.args.rollout_global_dataset and self.args.load and path.exists():
            (self.sample_offset,) = json.loads(path.read_text())


Slimes.__module__ = "slime.rollout.data_source"


class Cursor:
    """A source of a user's own, which keeps slime's contract."""

    def __init__(self, args):
        self.args, self.line = args, 0

    def draw(self, count):
        self.line += count

    def save(self, rollout_id):
        if self.args.rollout_global_dataset:
            folder = Path(self.args.save, "rollout")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"cursor_{rollout_id}.json").write_text(str(self.line))

    def load(self, rollout_id=None):
        path = Path(self.args.load or "", "rollout", f"cursor_{rollout_id}.json")
        if path.exists():
            self.line = int(path.read_text())


@pytest.fixture(autouse=True)
def slime_types(monkeypatch):
    types = ModuleType("slime.utils.types")
    types.Sample = Sample
    monkeypatch.setitem(sys.modules, "slime.utils.types", types)


def manager(source: Any = Slimes, rollout_id: int = -1, **args: Any) -> Any:
    made = SimpleNamespace(save=None, load=None, rollout_global_dataset=True, rollout_shuffle=False, **args)
    found = SimpleNamespace(args=made, data_source=source(made), rollout_id=rollout_id)
    found.load = getattr(found.data_source, "load", None)
    return found


def elsewhere(state: Batch) -> Batch:
    """As another process opens it."""
    return Batch.from_ipc(state.ipc.to_pybytes())


def continued(one: Any, source: Any = Slimes) -> Any:
    """Another manager, whose source goes on where that of `one` stands."""
    other = manager(source)
    data_source.restore(other, elsewhere(data_source.state(one)))
    return other


def test_what_waits_in_the_buffer_goes_on_as_it_is():
    one = manager()
    one.data_source.epoch_id, one.data_source.sample_offset, one.data_source.sample_index = 2, 31, 70
    one.data_source.metadata = {"best": {3: 0.25}, "seen": (1, 2)}
    half = Sample(7, [5, 6, 151_000], [-0.1, float("nan")], np.arange(12, dtype=np.int32).reshape(3, 2, 2))
    half.status, half.metadata = Sample.Status.ABORTED, {"turns": {0: "a", 1: np.float32([0.5])}, "raw": b"\x00"}
    half.of_a_hook = [1, None]
    one.data_source.buffer = [[half, Sample(8)], [], [Sample(9, [1])]]
    found = continued(one).data_source
    assert (found.epoch_id, found.sample_offset, found.sample_index) == (2, 31, 70)
    assert found.metadata == {"best": {3: 0.25}, "seen": (1, 2)}
    assert [[sample.index for sample in group] for group in found.buffer] == [[7, 8], [], [9]]
    assert repr(found.buffer[0][0]) == repr(half)
    assert found.buffer[0][0].rollout_routed_experts.dtype == np.int32
    assert found.buffer[0][0].of_a_hook == [1, None]
    assert not hasattr(found.buffer[0][1], "of_a_hook")
    found.buffer[0][0].rollout_routed_experts[0] = 7  # slime may write to it


def test_tensors_come_back_as_tensors():
    torch = pytest.importorskip("torch")
    one = manager()
    experts = torch.arange(24, dtype=torch.int32).reshape(3, 4, 2)
    one.data_source.buffer = [[Sample(0, [1, 2], rollout_routed_experts=experts), Sample(1)]]
    found = continued(one).data_source.buffer[0]
    assert torch.equal(found[0].rollout_routed_experts, experts)
    assert found[0].rollout_routed_experts.dtype == torch.int32
    assert found[1].rollout_routed_experts is None


def test_sets_paths_and_images_come_back_as_such():
    Image = pytest.importorskip("PIL.Image")
    image = Image.frombytes("RGB", (2, 3), bytes(range(18)))
    one = manager()
    one.data_source.metadata = {"seen": {1, (2, "a")}, "at": Path("a/b")}
    sample = Sample(0, [1, 2], multimodal_inputs={"images": [image], "masks": [np.ones((2, 2)), None]})
    one.data_source.buffer = [[sample, Sample(1)]]
    found = continued(one).data_source
    assert found.metadata == {"seen": {1, (2, "a")}, "at": Path("a/b")}
    back = found.buffer[0][0]
    (picture,) = back.multimodal_inputs["images"]
    assert (picture.mode, picture.size, picture.tobytes()) == ("RGB", (2, 3), image.tobytes())
    assert back.tokens == [1, 2]
    back.multimodal_inputs["masks"][0][:] = 3


class Picture:
    """Stands for what no batch holds."""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda s: setattr(s.buffer[1][0], "multimodal_inputs", {"images": [Picture()]}),
            r"multimodal_inputs', sample 1.*Picture",
        ),
        (lambda s: s.metadata.update(rule=Picture()), r"attrs\['metadata'\]\['rule'\].*Picture"),
        (lambda s: s.buffer.append([Picture()]), "buffer holds a .*Picture"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(change, said):
    one = manager()
    one.data_source.buffer = [[Sample(0)], [Sample(1)]]
    data_source.state(one)
    change(one.data_source)
    with pytest.raises(ContentRefused, match=f"(?s){said}"):
        data_source.state(one)


@pytest.mark.parametrize("global_dataset", [True, False])
def test_a_custom_source_goes_on_where_another_stood(global_dataset):
    one = manager(Cursor, rollout_id=4)
    one.args.rollout_global_dataset = global_dataset
    one.args.save = one.args.load = "/nowhere"
    one.data_source.draw(31)
    assert continued(one, Cursor).data_source.line == 31
    assert vars(one.args) == {
        **{"save": "/nowhere", "load": "/nowhere", "rollout_global_dataset": global_dataset},
        "rollout_shuffle": False,
    }


def test_a_custom_sources_buffer_goes_on_too():
    class WithBuffer(Cursor):
        def __init__(self, args):
            super().__init__(args)
            self.buffer = []

    one = manager(WithBuffer)
    one.data_source.draw(3)
    one.data_source.buffer = [[Sample(5, [1, 2])]]
    found = continued(one, WithBuffer).data_source
    assert (found.line, found.buffer) == (3, [[Sample(5, [1, 2])]])


def test_a_custom_source_that_does_not_keep_the_contract_is_refused():
    class Elsewhere(Cursor):
        def save(self, rollout_id):
            """To a place of its own."""

    class Deaf(Cursor):
        def load(self, rollout_id=None):
            """From a place of its own."""

    class Broken(Cursor):
        def save(self, rollout_id):
            raise KeyError("no session")

    class Silent:
        def __init__(self, args):
            self.args = args

    for source, said in [
        (Elsewhere, r"Elsewhere wrote nothing under args.save when save\(0\) was called"),
        (Broken, r"save\(0\) of the data source .*Broken failed: KeyError: 'no session'"),
        (Silent, r"Silent has no save\(rollout_id\)"),
    ]:
        with pytest.raises(BadInput, match=said):
            data_source.state(manager(source))
    one = manager(Deaf)
    one.data_source.draw(5)
    with pytest.raises(BadInput, match=r"load\(0\) of the data source .*Deaf changed nothing"):
        continued(one, Deaf)


@pytest.mark.parametrize("source", [Slimes, Cursor])
def test_a_checkpoint_is_read_where_the_train_job_says(source, tmp_path, caplog):
    """This job may have been started when there was none, with what slime falls back to."""
    trained, one = manager(source), manager(source)
    position = "sample_offset" if source is Slimes else "line"
    setattr(trained.data_source, position, 12)
    trained.args.save = tmp_path
    trained.data_source.save(3)
    one.args.load = "/the/reference/model"
    found = data_source.load(one, 3, str(tmp_path))
    assert getattr(one.data_source, position) == 0, "the source itself stays"
    assert one.args.load == "/the/reference/model"
    assert not caplog.text
    data_source.restore(one, elsewhere(found))
    assert getattr(one.data_source, position) == 12
    data_source.load(one, 9, str(tmp_path))
    assert "load(9) of the data source changed nothing" in caplog.text


def test_prompts_that_are_drawn_meanwhile_are_noticed():
    one = manager()
    one.data_source.buffer = [[Sample(0)]]
    state = elsewhere(data_source.state(one))
    assert data_source.stands_at(one, state)
    one.data_source.sample_offset += 1
    assert not data_source.stands_at(one, state)
    data_source.restore(one, state)
    one.data_source.buffer.append([Sample(1)])
    assert not data_source.stands_at(one, state)


def test_a_full_buffer_costs_little_more_than_a_copy_of_its_arrays():
    """64 x 8 samples with the ids that top-p kept; the baseline is a copy of them, in the same run."""
    one, arrays = manager(), [np.full(8 * 1024, i, np.int32) for i in range(512)]
    one.data_source.buffer = [
        [Sample(8 * g + i, rollout_routed_experts=arrays[8 * g + i]) for i in range(8)] for g in range(64)
    ]
    copied_s = min(_seconds(lambda: np.concatenate(arrays)) for _ in range(5))
    kept_s = min(_seconds(lambda: data_source.state(one)) for _ in range(5))
    nbytes = sum(array.nbytes for array in arrays)
    assert data_source.state(one).nbytes < 1.05 * nbytes
    assert kept_s < 10 * copied_s + 0.1, (kept_s, copied_s)


def _seconds(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
