"""Which names of slime the overlay uses, which a commit has, and what is said where it lacks one."""

from __future__ import annotations

import pytest

from patchset.names import Slime, Wanted, compare, table

OVERLAY = {
    "hooks.py": """
from slime.utils.old import start
from slime.cross_job.errors import BadInput

def hook(manager, args, engine):
    start(args.actor_num_nodes, getattr(args, "use_critic", False), args.cross_job_role, args.job_id)
    manager.data_source.load(1)
    getattr(engine, "get_url", None)
    return manager.of_ours
""",
    "names.py": 'PLACES = {"log": ("slime.observability.logs", "slime.utils.logs")}',
    "handshake.py": 'MUST_AGREE = (*("rollout_*",), "seed")',
    "conversion.py": '_NEEDED = ("tokens",)',
    "gateway.py": """
class Gateway:
    def generate(self, rollout_id):
        return self._ask("generate", rollout_id)

for _method in ("save",):
    setattr(Gateway, _method, forward(_method))
""",
    "train_group.py": """
class InFront:
    def train(self, rollout_id):
        return super().train(rollout_id)
""",
}
SLIME = {
    "slime/utils/old.py": "def start(nodes, critic=False): ...",
    "slime/utils/logs.py": "def log(args): ...",
    "slime/utils/arguments.py": """
parser.add_argument("--actor-num-nodes")
parser.add_argument("--use-critic")
parser.add_argument("--rollout-batch-size")
args.seed = 1
""",
    "slime/rollout/data_source.py": """
class RolloutDataSource:
    def load(self, rollout_id): ...

class RolloutDataSourceWithBuffer(RolloutDataSource):
    pass
""",
    "slime/ray/rollout.py": """
class RolloutManager:
    def __init__(self):
        self.data_source = make()

    def generate(self, rollout_id): ...

    def _convert_samples_to_train_data(self, samples):
        return {"tokens": []}
""",
    "slime/backends/engine.py": "class SGLangEngine:\n    def get_url(self): ...",
    "slime/ray/actor_group.py": "class RayTrainGroup:\n    def train(self, rollout_id):\n        pass",
    "train.py": "rollout_manager.generate.remote(1)\nrollout_manager.save.remote(1)",
    "tests/test_it.py": "not python",
}


def wanted() -> Wanted:
    files = {f"slime/cross_job/adapter/{name}": text.encode() for name, text in OVERLAY.items()}
    return Wanted.read({**files, "slime/cross_job/ops/other.py": b"from slime.utils.nowhere import it"})


def slime(**changes: str | None) -> Slime:
    """SLIME, but for these files; `__` stands for a slash."""
    changed = {name.replace("__", "/") + ".py": text for name, text in changes.items()}
    return Slime.read({path: text.encode() for path, text in {**SLIME, **changed}.items() if text is not None})


def test_every_kind_of_name_is_found():
    told = table(wanted(), {"pin": slime(), "empty": Slime()})
    rows = [line.split(" | ") for line in told.splitlines()[2:]]
    assert {row[0].removeprefix("| ") for row in rows} == {
        "`slime.utils.old.start`",
        "`slime.observability.logs.log or slime.utils.logs.log`",
        "`args.actor_num_nodes`",
        "`args.use_critic`",
        "`args.rollout_*`",
        "`args.seed`",
        '`data["tokens"]`',
        "`RolloutManager or RolloutController or Buffer.data_source`",
        "`RolloutManager or RolloutController or Buffer.generate`",
        "`RolloutDataSource or RolloutDataSourceWithBuffer.load`",
        "`SGLangEngine.get_url`",
        "`RayTrainGroup.train`",
    }, "what is ours, Python's or Ray's is in no pin"
    assert {row[1] for row in rows} == {"yes"}
    assert {row[2] for row in rows} == {""}
    assert compare(wanted(), slime(), slime()) == ([], [])


DRAINS = SLIME["slime/ray/actor_group.py"].replace("pass", "self._rollout_manager.drain.remote()")
HOOKS, GROUP = "slime/cross_job/adapter/hooks.py", "slime/cross_job/adapter/train_group.py"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"slime__utils__old": None, "slime__new": "def start(nodes, critic): ..."},
            f"missing slime.utils.old.start: was in slime/utils/old.py, is in slime.new now; wanted by {HOOKS}:2",
        ),
        (
            {"slime__utils__logs": "import slime.elsewhere"},
            "missing slime.observability.logs.log or slime.utils.logs.log: was in slime/utils/logs.py; wanted by "
            "slime/cross_job/adapter/names.py:1",
        ),
        (
            {"slime__backends__engine": "class SGLangEngine:\n    def url(self): ..."},
            f"missing SGLangEngine.get_url: was in slime/backends/engine.py; wanted by {HOOKS}:8",
        ),
        (
            {"slime__ray__rollout": SLIME["slime/ray/rollout.py"].replace("tokens", "ids")},
            'missing data["tokens"]: was in slime/ray/rollout.py; wanted by slime/cross_job/adapter/conversion.py:1',
        ),
        (
            {"slime__utils__arguments": SLIME["slime/utils/arguments.py"].replace("--use-critic", "--critic")},
            f"missing args.use_critic: was in slime/utils/arguments.py; wanted by {HOOKS}:6",
        ),
        (
            {"slime__utils__old": "def start(nodes, critic=False, *, more): ..."},
            f"changed slime.utils.old.start: wants more, too (slime/utils/old.py:1); used by {HOOKS}:2",
        ),
        (
            {"slime__utils__old": "def start(critic=False, nodes=1): ..."},
            "changed slime.utils.old.start: its parameters have another order (slime/utils/old.py:1); used by "
            f"{HOOKS}:2",
        ),
        (
            {"slime__utils__old": "def start(nodes): ..."},
            f"changed slime.utils.old.start: no parameter critic any more (slime/utils/old.py:1); used by {HOOKS}:2",
        ),
        (
            {"slime__ray__actor_group": "class RayTrainGroup:\n    def train(self, rollout_id, data=None): ..."},
            "changed RayTrainGroup.train: may get data, too, and ours does not take it "
            f"(slime/ray/actor_group.py:2); used by {GROUP}:4",
        ),
        (
            {"slime__utils__old": "async def start(nodes, critic=False): ..."},
            f"changed slime.utils.old.start: it is async now (slime/utils/old.py:1); used by {HOOKS}:2",
        ),
        (
            {"slime__utils__old": "def start(nodes, critic): ..."},
            f"changed slime.utils.old.start: wants critic, too (slime/utils/old.py:1); used by {HOOKS}:2",
        ),
        (
            {"slime__utils__old": "def start(nodes, kind=None, critic=False): ..."},
            "changed slime.utils.old.start: its parameters have another order (slime/utils/old.py:1); used by "
            f"{HOOKS}:2",
        ),
        (
            {"slime__utils__old": "def start(nodes, *, critic=False): ..."},
            f"changed slime.utils.old.start: takes critic by name alone (slime/utils/old.py:1); used by {HOOKS}:2",
        ),
        (
            {"slime__ray__rollout": SLIME["slime/ray/rollout.py"].replace("rollout_id)", "rollout_id, budget=1)")},
            "changed RolloutManager or RolloutController or Buffer.generate: may get budget, too, and ours does not "
            "take it (slime/ray/rollout.py:6); used by slime/cross_job/adapter/gateway.py:4",
        ),
        (
            {"slime__ray__actor_group": DRAINS},
            "asked slime/ray/actor_group.py:3 calls drain, which Gateway lacks",
        ),
        (
            {"train": "rollout_manager.offload.remote()"},
            "asked train.py:1 calls offload, which Gateway lacks",
        ),
    ],
)
def test_what_a_newer_commit_breaks_is_named_with_the_place_that_wants_it(changes, said):
    assert [" ".join(line.split()) for line in compare(wanted(), slime(), slime(**changes)).broken] == [said]


@pytest.mark.parametrize(
    "changes",
    [
        {"slime__utils__old": "def start(nodes, critic=False, more=None, *, most=1): ..."},
        {"slime__utils__logs": None, "slime__observability__logs": "def log(args): ..."},
        {"slime__rollout__data_source": "class RolloutDataSourceWithBuffer:\n    def load(self, rollout_id): ..."},
        {"slime__utils__old": "from slime.new import start", "slime__new": "def start(nodes, more): ..."},
        {"train": "rollout_manager.generate.remote(1)"},
    ],
)
def test_what_breaks_nothing_is_not_named(changes):
    assert compare(wanted(), slime(), slime(**changes)).broken == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"slime__utils__arguments": SLIME["slime/utils/arguments.py"].replace("args.seed", "args.sown")},
            "note gone: args.seed: was in slime/utils/arguments.py; wanted by slime/cross_job/adapter/handshake.py:1",
        ),
        (
            {"slime__ray__rollout": SLIME["slime/ray/rollout.py"].replace("[]}", '[], "masks": []}')},
            "note new in what makes training data, perhaps columns: masks",
        ),
        ({"slime__mine": "1 2"}, "note slime/mine.py cannot be read (invalid syntax (<unknown>, line 1))"),
    ],
)
def test_what_is_worth_a_look_refuses_nothing(changes, said):
    found = compare(wanted(), slime(), slime(**changes))
    assert ([" ".join(line.split()) for line in found.notes], found.broken) == ([said], [])


def test_a_pin_that_this_python_cannot_read_proves_nothing():
    blind = slime(slime__utils__old="1 2")
    (said,) = compare(wanted(), blind, blind).broken
    assert "at the pin, slime/utils/old.py cannot be read" in said
    assert "set PYTHON" in said


def test_classes_in_a_circle_end():
    assert compare(wanted(), slime(), slime(slime__odd="class Odd(Even): ...\nclass Even(Odd): ...")).broken == []
