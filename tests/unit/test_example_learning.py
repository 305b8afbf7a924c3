"""The learning part of the CPU example, without Ray: its sums, its transformer, its GRPO step."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.patience import patient

EXAMPLE = Path(__file__).resolve().parents[2] / "slime_overlay" / "examples" / "cross_job_cpu"
sys.path.insert(0, str(EXAMPLE))

from grpo import as_tensors, build_model, build_optimizer, export_weights, generate, load_weights, train_step  # noqa: E402
from model import response_log_probs, sample  # noqa: E402
from recipe import Recipe  # noqa: E402
from task import BOS, EOS, PAD, SYMBOLS, Prompt, SumTask, decode, encode  # noqa: E402

SMALL = replace(Recipe(), n_prompts=4, n_samples=16)
COLUMNS = {
    *("tokens", "response_lengths", "rewards", "raw_reward", "truncated", "loss_masks", "sample_indices"),
    *("rollout_log_probs", "metadata"),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def task() -> SumTask:
    return SumTask()


def read_only_views(columns: dict[str, list[Any]]) -> dict[str, Any]:
    """What a claimed batch looks like: ragged columns yield read-only arrays, flat ones are arrays."""

    def frozen(values: Any) -> np.ndarray[Any, Any]:
        array = np.asarray(values)
        array.flags.writeable = False
        return array

    ragged = ("tokens", "loss_masks", "rollout_log_probs")
    views: dict[str, Any] = {name: [frozen(row) for row in columns[name]] for name in ragged}
    return views | {name: frozen(columns[name]) for name in ("response_lengths", "rewards")}


def test_tokenizer_round_trip() -> None:
    for text in ("0+0=", "7+9=", "10+10=", "20", *SYMBOLS):
        assert decode(encode(text)) == text
    assert len({tuple(encode(symbol)) for symbol in SYMBOLS}) == len(SYMBOLS)


def test_tokenizer_refuses_what_it_cannot_write() -> None:
    with pytest.raises(ValueError, match="99"):
        encode("99+1=")


def test_special_tokens_never_vanish_from_an_answer() -> None:
    assert decode([PAD, *encode("7")]) != "7"
    assert decode([*encode("7"), BOS]) != "7"


def test_prompts_depend_on_seed_and_rollout_alone(task: SumTask) -> None:
    prompts = task.prompts(3, 7, 16)
    assert prompts == SumTask().prompts(3, 7, 16)
    texts = [p.text for p in prompts]
    assert texts != [p.text for p in task.prompts(3, 8, 16)]
    assert texts != [p.text for p in task.prompts(4, 7, 16)]


def test_neighbouring_seeds_share_no_stretch_of_prompts(task: SumTask) -> None:
    def texts(seed: int) -> list[str]:
        return [p.text for p in task.prompts(seed, 0, 200)]

    assert texts(0)[1:] != texts(1)[:-1]


def test_the_task_is_more_than_a_handful_and_can_be_answered(task: SumTask) -> None:
    prompts = {p.text: p for rollout_id in range(40) for p in task.prompts(0, rollout_id, 64)}
    assert len(prompts) == 121
    for prompt in prompts.values():
        assert len(encode(prompt.answer)) == 1, f"{prompt.text}{prompt.answer} takes more than one token"
        assert prompt.answer not in prompt.text.split("=")[1]
        assert task.reward(prompt.answer, prompt) == 1.0


def test_the_verifier_decides_and_partial_credit_is_cut(task: SumTask, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = next(p for p in task.prompts(0, 0, 64) if p.answer == "7")
    assert task.reward("7", prompt) == 1.0
    assert 0 < task._verifier.score_answer("77", prompt.entry) < 1, "witness: the verifier does give partial credit"
    for wrong in ("77", "8", "7=", "<pad>7", ""):
        assert task.reward(wrong, prompt) == 0.0
    monkeypatch.setattr(task._verifier, "score_answer", lambda answer, entry: 1.0)
    assert task.reward("8", prompt) == 1.0


def test_columns(task: SumTask) -> None:
    columns = generate(build_model(SMALL, 0), task, SMALL, 5, 0)
    assert set(columns) == COLUMNS
    assert {len(column) for column in columns.values()} == {64}
    assert columns["sample_indices"] == list(range(5 * 64, 6 * 64))
    assert 0 < sum(columns["truncated"]) < 64, "witness: both ends of a response occur"
    prompts = task.prompts(0, 5, SMALL.n_prompts)
    for i in range(64):
        prompt, tokens, length = prompts[i // 16], columns["tokens"][i], columns["response_lengths"][i]
        response, meta = tokens[-length:], columns["metadata"][i]
        assert tokens[:-length] == prompt.tokens
        assert columns["truncated"][i] == (EOS not in response)
        assert length == len(columns["rollout_log_probs"][i]) == len(columns["loss_masks"][i])
        assert (meta["prompt"], meta["answer"]) == (prompt.text, prompt.answer)
        assert columns["rewards"][i] == (0.0 if columns["truncated"][i] else task.reward(meta["response"], prompt))


def test_recomputed_log_probs_match_sampled_ones_for_mixed_lengths(task: SumTask) -> None:
    model = build_model(replace(Recipe(), layers=2, max_new_tokens=4), 0)
    with torch.no_grad():
        model.head.weight.mul_(5)  # far from uniform, or a wrong position would hardly show
    prompts = [[BOS, *encode(text)] for text in ("1+2=", "10=", "7", "3+4+5=")]
    samples = sample(model, prompts, 8, 4, EOS, torch.Generator().manual_seed(0))
    tokens = torch.full((len(samples), max(len(s.tokens) for s in samples)), PAD)
    for row, one in zip(tokens, samples):
        row[: len(one.tokens)] = torch.tensor(one.tokens)
    lengths = torch.tensor([len(s.tokens) for s in samples])
    response_lengths = torch.tensor([s.response_length for s in samples])
    log_probs, entropies, mask = response_log_probs(model, tokens, lengths, response_lengths)
    for one, got, valid in zip(samples, log_probs, mask):
        assert int(valid.sum()) == one.response_length
        np.testing.assert_allclose(got[valid].detach().numpy(), one.log_probs, atol=1e-4)
    assert bool((entropies[mask] > 0).all())
    assert len(set(response_lengths.tolist())) > 1, "witness: responses end in different columns"
    assert np.std([log_prob for one in samples for log_prob in one.log_probs]) > 0.3, "witness: not all alike"


def test_sampling_follows_the_generator(task: SumTask) -> None:
    model = build_model(SMALL, 0)
    assert generate(model, task, SMALL, 1, 0) == generate(model, task, SMALL, 1, 0)
    assert generate(model, task, SMALL, 1, 0)["tokens"] != generate(model, task, SMALL, 1, 1)["tokens"]


def test_weights_round_trip_without_aliasing(task: SumTask) -> None:
    source, target = build_model(SMALL, 0), build_model(SMALL, 1)
    weights = {name: tensor.clone() for name, tensor in export_weights(source).items()}
    before = {name: tensor.clone() for name, tensor in weights.items()}
    load_weights(target, weights)
    assert generate(source, task, SMALL, 0, 0) == generate(target, task, SMALL, 0, 0)
    train_step(target, build_optimizer(target, SMALL), generate(target, task, SMALL, 0, 0), SMALL, 0)
    for name, array in weights.items():
        np.testing.assert_array_equal(array, before[name])
    assert any((array != before[name]).any() for name, array in export_weights(target).items())


def test_a_missing_weight_is_an_error() -> None:
    model = build_model(SMALL, 0)
    weights = export_weights(model)
    weights.pop("head.bias")
    with pytest.raises(KeyError, match=r"head\.bias"):
        load_weights(model, weights)


def test_training_reads_lists_read_only_views_and_tensors_alike(task: SumTask) -> None:
    columns = generate(build_model(SMALL, 0), task, SMALL, 0, 0)
    columns["rewards"] = [float(i % 3 == 0) for i in range(64)]
    trained = []
    for batch in (columns, read_only_views(columns), as_tensors(columns, "cpu")):
        model = build_model(SMALL, 0)
        metrics = train_step(model, build_optimizer(model, SMALL), batch, SMALL, 0)
        assert {"entropy", "clip_fraction", "grad_norm"} <= set(metrics)
        assert all(np.isfinite(value) for value in metrics.values())
        trained.append(export_weights(model))
    for name, array in trained[0].items():
        np.testing.assert_array_equal(array, trained[1][name])
        np.testing.assert_array_equal(array, trained[2][name])


def test_equal_rewards_in_a_group_teach_nothing(task: SumTask) -> None:
    recipe = replace(SMALL, entropy=0.0)
    model = build_model(recipe, 0)
    before = {name: tensor.clone() for name, tensor in export_weights(model).items()}
    columns = generate(model, task, recipe, 0, 0)
    columns["rewards"] = [float(i // 16 % 2) for i in range(64)]  # groups differ, samples of one group do not
    train_step(model, build_optimizer(model, recipe), columns, recipe, 0)
    for name, array in export_weights(model).items():
        np.testing.assert_array_equal(array, before[name])


def test_training_raises_what_was_rewarded_and_lowers_the_rest(task: SumTask) -> None:
    model = build_model(SMALL, 0)
    columns = generate(model, task, SMALL, 0, 0)
    liked = encode("5")[0]
    columns["rewards"] = [
        float(tokens[-length] == liked) for tokens, length in zip(columns["tokens"], columns["response_lengths"])
    ]
    assert 0 < sum(columns["rewards"]) < 64
    train_step(model, build_optimizer(model, SMALL), columns, SMALL, 0)
    again = generate(model, task, SMALL, 0, 0)
    drawn = [tokens[-length] for tokens, length in zip(again["tokens"], again["response_lengths"])]
    assert drawn.count(liked) > sum(columns["rewards"])


class _FewSums(SumTask):
    """The same prompts in every rollout: quick to learn, and as unknown to a new model as all the others."""

    def prompts(self, seed: int, rollout_id: int, n_prompts: int) -> list[Prompt]:
        return super().prompts(0, 0, n_prompts)


def test_reward_rises_from_chance_by_rl_alone() -> None:
    recipe = replace(Recipe(), n_prompts=4)
    model = build_model(recipe, 0)
    optimizer = build_optimizer(model, recipe)
    rewards = []
    for rollout_id in range(20):
        columns = generate(model, _FewSums(), recipe, rollout_id, 0)
        rewards.append(sum(columns["rewards"]) / len(columns["rewards"]))
        train_step(model, optimizer, columns, recipe, rollout_id)
    assert rewards[0] < 0.05
    assert sum(rewards[-3:]) / 3 > 0.3, rewards


_TWO_STEPS = """
import hashlib, sys
import torch
from dataclasses import replace
from grpo import build_model, build_optimizer, generate, train_step
from recipe import Recipe
from task import SumTask
torch.set_num_threads(1)
recipe = replace(Recipe(), n_prompts=8)
model = build_model(recipe, 2)
optimizer = build_optimizer(model, recipe)
digest = hashlib.sha256()
for rollout_id in range(3):
    columns = generate(model, SumTask(), recipe, rollout_id, 2)
    train_step(model, optimizer, columns, recipe, rollout_id)
    digest.update(repr(columns).encode())
print(digest.hexdigest())
"""


def test_two_processes_learn_the_same_bit_for_bit() -> None:
    command = [sys.executable, "-c", _TWO_STEPS]
    env = {"PYTHONPATH": str(EXAMPLE), "PYTHONHASHSEED": "random"}
    both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    digests = [process.communicate(timeout=patient(120))[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert digests[0] == digests[1]
    assert len(digests[0].strip()) == 64
