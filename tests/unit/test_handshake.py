"""What slime's two jobs state of themselves when they attach."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from slime.cross_job.adapter.handshake import differences, others, terms, warn_of
from slime.cross_job.errors import Refused
from slime.cross_job.types import MOST_META_BYTES, check_facts, in_words
from tests.support.ledger import attach

TOKENIZER = "the tokenizer in --hf-checkpoint"


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"vocab": {"a": 0}}')
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return tmp_path


def test_what_is_not_set_is_not_stated(checkpoint):
    stated = terms(SimpleNamespace(rollout_batch_size=8, num_rollout=None, hf_checkpoint=str(checkpoint)), False)
    assert stated["--rollout-batch-size"] == 8
    assert "--num-rollout" not in stated
    assert "--n-samples-per-prompt" not in stated


def test_the_tokenizer_is_known_by_its_files_wherever_they_lie(checkpoint, tmp_path_factory):
    first = terms(SimpleNamespace(hf_checkpoint=str(checkpoint)), False)[TOKENIZER]
    elsewhere = tmp_path_factory.mktemp("copy")
    (elsewhere / "tokenizer.json").write_text('{"vocab": {"a": 0}}')
    assert terms(SimpleNamespace(hf_checkpoint=str(elsewhere)), False)[TOKENIZER] == first, (
        "weights are not the tokenizer"
    )
    (elsewhere / "tokenizer.json").write_text('{"vocab": {"b": 0}}')
    assert terms(SimpleNamespace(hf_checkpoint=str(elsewhere)), False)[TOKENIZER] != first


def test_a_checkpoint_that_lies_elsewhere_is_known_by_its_name():
    assert terms(SimpleNamespace(hf_checkpoint="Org/Model"), False)[TOKENIZER] == "Org/Model"


@pytest.mark.parametrize(
    ("name", "mine", "theirs"),
    [
        ("n_samples_per_prompt", 8, 4),
        ("use_rollout_routing_replay", True, False),
        ("update_weight_local_checkpoint_dir", "/local", None),
        ("use_tis", True, False),
        ("use_opd", True, False),
        ("rollout_top_p", 1.0, 0.95),
        ("multimodal_keys", {"image": "images"}, None),
        ("custom_generate_function_path", "agent.generate", None),
        ("dynamic_sampling_filter_path", "filter.keep", None),
        ("over_sampling_batch_size", 16, 8),
        ("partial_rollout", True, False),
        ("use_fault_tolerance", True, False),
        ("rollout_num_gpus", 8, 16),
        ("rollout_num_gpus_per_engine", 1, 2),
        ("rollout_stop", ["</s>"], []),
        ("eval_prompt_data", ["aime", "/data/aime.jsonl"], None),
        ("n_samples_per_eval_prompt", 16, 1),
    ],
)
def test_what_rollouts_or_the_way_of_the_weights_depend_on_is_refused(ledger, name, mine, theirs):
    """Also where only one of the jobs was given it."""
    attach(ledger, "p", terms=terms(SimpleNamespace(**{name: mine}), False))
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(Refused) as refused:
        attach(ledger, "c", terms=terms(SimpleNamespace(**{name: theirs}), False))
    assert f"disagree: {flag} is {in_words(theirs)} here and {in_words(mine)} there. Give both the same" in str(
        refused.value
    )
    assert flag in ledger.heartbeat("p", "generating")["notice"], "the job that was there hears of it, too"
    assert "notice" not in ledger.heartbeat("p", "generating"), "once"
    assert [event.kind for event in ledger.jobs["exp"].events.values()][-1] == "refused"
    attach(ledger, "c", terms=terms(SimpleNamespace(**{name: mine}), False))


def test_from_v03_on_the_number_of_engines_is_the_rollout_jobs_own_affair():
    args = SimpleNamespace(rollout_num_gpus=8, rollout_num_gpus_per_engine=2, rollout_num_engines=4)
    assert not {name for name in {**terms(args, True), **others(args, True)} if name.startswith("--rollout-num")}
    assert len([name for name in terms(args, False) if name.startswith("--rollout-num")]) == 3


def test_the_train_job_alone_says_how_long_the_run_is(ledger):
    """--num-rollout may be raised when it is started again: the rollout job has the value of before."""
    attach(ledger, "p", terms=terms(SimpleNamespace(num_rollout=100, cross_job_role="rollout"), False))
    attach(ledger, "c", terms=terms(SimpleNamespace(num_rollout=200, cross_job_role="train"), False))


def test_what_is_neither_of_one_job_nor_of_the_rollouts_is_warned_about(caplog):
    mine = {"lr": 1e-6, "eval_interval": 5, "seed": 1, "actor_num_nodes": 1, "wandb_key": "secret", "rank": 0}
    theirs = {"lr": 2e-6, "eval_interval": None, "seed": 1, "actor_num_nodes": 2, "wandb_key": "other", "rank": 3}
    one, other = (others(SimpleNamespace(rollout_batch_size=8, **args), True) for args in (mine, theirs))
    found = differences(one, other)
    assert found == ["--eval-interval is 5 here and not set there", "--lr is 1e-06 here and 2e-06 there"]
    warn_of("exp", "train", found)
    assert "--lr is 1e-06 here and 2e-06 there" in caplog.text


def test_whatever_slimes_parser_holds_is_compared_in_json_and_shows_no_secret():
    class Dataset:
        def __repr__(self) -> str:
            return f"<Dataset at {id(self):#x}>"

    strange = {
        "rollout_a": Path("/data"),
        "rollout_b": {1: "a", 2: (3, 4)},
        "rollout_c": math.nan,
        "rollout_d": [Dataset()],
        "rollout_e": {"a", "b"},
        "rollout_f": "x" * 100_000,
        "rollout_g": "redis://:swordfish@host:6379/0",
        "sglang_api_key": "swordfish",
        "train_env_vars": {"HF_TOKEN": "swordfish"},
    }
    one, other = (terms(SimpleNamespace(**strange), True) for _ in range(2))
    assert "swordfish" not in json.dumps([one, others(SimpleNamespace(**strange), True)])
    assert check_facts(one, "terms") == json.loads(json.dumps(one)) or math.isnan(one["--rollout-c"])
    assert json.dumps(one) == json.dumps(other)
    changed = terms(SimpleNamespace(**{**strange, "rollout_f": "x" * 99_999 + "y"}), True)
    assert changed["--rollout-f"] != one["--rollout-f"], "what is too long to be kept is compared all the same"


def test_thousands_of_arguments_are_within_what_the_broker_takes():
    args = SimpleNamespace(**{f"rollout_{number}": "x" * 1000 for number in range(700)})
    assert len(json.dumps(terms(args, True))) < MOST_META_BYTES


@pytest.mark.parametrize("name", ["judge_api_key", "hf_token", "grader_password"])
def test_what_may_be_a_secret_is_stated_to_nobody(name):
    args = SimpleNamespace(**{name: "x1y2z3", "rm_url": "http://judge"})
    assert "x1y2z3" not in json.dumps([terms(args, True), others(args, True), terms(args, False), others(args, False)])
