"""What slime's two jobs state of themselves when they attach."""

from types import SimpleNamespace

import pytest

from slime.cross_job.errors import Refused
from slime.cross_job.handshake import terms

from .ledger_hands import attach

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


def test_jobs_that_differ_in_slimes_arguments_are_told_which(checkpoint, ledger):
    mine = terms(SimpleNamespace(n_samples_per_prompt=8, global_batch_size=64, hf_checkpoint=str(checkpoint)), False)
    other = terms(SimpleNamespace(n_samples_per_prompt=4, global_batch_size=64, hf_checkpoint=str(checkpoint)), False)
    attach(ledger, "p", terms=mine)
    with pytest.raises(Refused, match=r"disagree: --n-samples-per-prompt is 4 here and 8 there\. Give both the same"):
        attach(ledger, "c", terms=other)
    attach(ledger, "c", terms=mine)
