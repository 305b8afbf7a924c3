"""What of slime runs across two jobs: features as data, and the page cross-job-features.md made of them and outcomes.

    python -m tests.slime.features [FILE...]

merges files of outcomes into tests/slime/outcomes.json and writes the page anew. A run of tests adds lines to such a
file where SLIME_OUTCOMES names it, see tests/conftest.py. Kept are outcomes of tests/slime and of tests that a feature
names; those of a test that is gone are dropped. Tests are known by their source: none is imported, nor is slime.
"""

import ast
import functools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.slime.single_job import PINS
from tests.support.parsing import parsed

TESTS = Path(__file__).resolve().parents[1]
OUTCOMES = Path(__file__).with_name("outcomes.json")
PAGE = TESTS.parent / "slime_overlay" / "docs" / "en" / "advanced" / "cross-job-features.md"
BEFORE, NEW = PINS[:2], PINS[2:]
Outcomes = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Feature:
    """`tests` are ids below tests/ without parameters; in brackets one pin, or one case without its pin."""

    name: str
    text: str
    tests: tuple[str, ...]
    shown: Literal["runs", "partly", "refused"] = "runs"
    pins: tuple[str, ...] = PINS  # at which slime has it


_SAME = "slime/test_same_training.py::test_two_jobs_train_as_one"
_ON = "slime/test_features.py::test_generation_that_goes_on_from_rollout_to_rollout"
_COLUMNS = "slime/test_features.py::test_what_images_and_experts_leave_in_a_rollout_comes_to_the_training_ranks"
_LAYOUTS = "slime/test_features.py::test_model_parallel_layouts"
_SPLIT = "slime/test_layout.py::test_a_rollout_that_is_split_anew_is_what_slime_splits_for_that_layout"
_AGREE = "unit/test_handshake.py::test_what_rollouts_or_the_way_of_the_weights_depend_on_is_refused"
_REFUSED = "unit/test_arguments.py::test_what_cannot_work_is_refused"
_REFUSED_BY_SLIME = "slime/test_off.py::test_what_cannot_work_is_refused_with_the_reason"
_CUSTOM = "slime/test_custom.py::test_an_agent_with_a_tool_whose_samples_fan_out"
_BUFFER = "unit/test_data_source.py::test_what_waits_in_the_buffer_goes_on_as_it_is"

FEATURES = (
    Feature("One engine, `train.py`", "Equal to one job to the last bit.", (_SAME,)),
    Feature(
        "`train_async.py`",
        "Equal to one job to the last bit. With `--cross-job-max-ahead 1` staleness adds up (rollout 3 is generated "
        "by weights 0), and the train job warns.",
        (
            "slime/test_same_training.py::test_train_async_in_two_jobs",
            "unit/test_arguments.py::test_a_script_that_goes_ahead_by_itself_and_max_ahead_add_up",
        ),
    ),
    Feature(
        "Several engines",
        "Two and four engines, equal to one job to the last bit. Before v0.3 their number sizes the NCCL group, and "
        "another number in one job is refused.",
        (
            _ON,
            f"{_CUSTOM}[four-engines]",
            "slime/test_features.py::test_two_engines_take_the_weights_of_one_group",
            _AGREE,
            "unit/test_handshake.py::test_from_v03_on_the_number_of_engines_is_the_rollout_jobs_own_affair",
        ),
    ),
    Feature(
        "External engines (`--rollout-external-engine-addrs`)",
        "Equal to one job to the last bit, also through a rollout job that ends and comes back. The engines are "
        "marked as this job's.",
        (
            "slime/test_features.py::test_engines_that_the_job_did_not_start",
            "unit/test_engine_weights.py::test_external_engines_are_marked_as_this_jobs",
        ),
        pins=NEW,
    ),
    Feature(
        "Fault tolerance (`--use-fault-tolerance`)",
        "One of two engines dies in a rollout. slime starts another, which takes the next weights; the figures are "
        "those of one job. An engine that dies in an evaluation ends nothing; one that dies while it takes weights "
        "ends the train job, as in slime (in no test). The flag in one job alone is refused.",
        (
            "slime/test_features.py::test_an_engine_that_dies_is_started_again_and_takes_the_next_weights",
            "unit/test_gateway.py::test_an_engine_that_dies_in_an_evaluation_ends_nothing_if_others_answered",
            _AGREE,
        ),
        pins=NEW,
    ),
    Feature(
        "Partial rollout",
        "Equal to one job to the last bit; `standins/turns.py` makes the half of a response that an abort leaves. "
        "What waits in the buffer goes on after a restart. The flag in one job alone is refused.",
        (_ON, _BUFFER, _AGREE),
    ),
    Feature(
        "Dynamic sampling filter, over-sampling",
        "Equal to one job to the last bit. Other flags in one job are refused.",
        (_ON, _AGREE),
    ),
    Feature(
        "Custom generate function",
        "Every test of `tests/slime` has one (`standins/seeded_generate.py`). Another in one job is refused.",
        (_SAME, _AGREE),
    ),
    Feature(
        "Samples that fan out",
        "Of every second prompt's sample a custom generate function returns both turns, as two samples of one rollout "
        "(`standins/agent.py`). Two optimizer steps a rollout, equal to one job to the last bit.",
        (_CUSTOM,),
        pins=PINS[1:],
    ),
    Feature(
        "Tool output",
        "An agent of two turns with a tool between, whose tokens nobody trains on.",
        (_CUSTOM,),
    ),
    Feature(
        "Multi-turn masks",
        "Loss masks of any shape: every training rank reads what it reads in one job. From v0.3 on also when a "
        "rollout is split anew for a train job of another layout.",
        ("slime/test_equal_data.py::test_every_rank_reads_what_it_would_read_in_a_single_job", _SPLIT),
    ),
    Feature(
        "Custom reward",
        "Every test of `tests/slime` has one (`standins/reward_gym.py`). A hook may return any type that slime takes.",
        (_SAME, "unit/test_conversion.py::test_rewards_are_published_in_whatever_type_a_hook_returns_them"),
    ),
    Feature(
        "Rewards of several values (`--reward-key`)",
        "A dict for each sample, of which `--reward-key` names one value, also where "
        "`--custom-reward-post-process-path` makes the reward that is trained on.",
        (_CUSTOM,),
    ),
    Feature("`--use-rollout-logprobs`", "Equal to one job to the last bit.", (f"{_CUSTOM}[four-engines]",), pins=NEW),
    Feature("`--use-tis`", "Equal to one job to the last bit.", (f"{_CUSTOM}[top-p]",), pins=PINS[1:]),
    Feature(
        "`--rollout-top-p`",
        "Equal to one job to the last bit; the ids of the tokens that were kept come to the training ranks.",
        (f"{_CUSTOM}[top-p]",),
    ),
    Feature(
        "Debug dumps (`--dump-details`)",
        "What slime dumps of rollouts and of training data is the same, but for session ids, traces and versions.",
        (_CUSTOM,),
    ),
    Feature(
        "slime's data source",
        "Its position, its metadata and the samples in its buffer go on in the next rollout job.",
        ("slime/test_source.py::test_a_source_goes_on_where_another_stood", _BUFFER),
    ),
    Feature(
        "Custom data source (`--data-source-path`)",
        "Goes on by slime's contract, `save` and `load`. A source that does not keep the contract is refused.",
        (
            "slime/test_source.py::test_a_source_goes_on_where_another_stood",
            "unit/test_data_source.py::test_a_custom_source_goes_on_where_another_stood",
            "unit/test_data_source.py::test_a_custom_source_that_does_not_keep_the_contract_is_refused",
        ),
        pins=NEW,
    ),
    Feature(
        "Multimodal",
        "What slime's processor makes of an image comes to the training ranks as in one job; images may wait in the "
        "buffer. The processor and a model that sees are not in the test (`standins/more_columns.py`).",
        (_COLUMNS, "unit/test_data_source.py::test_sets_paths_and_images_come_back_as_such"),
        shown="partly",
        pins=NEW,
    ),
    Feature(
        "Routed experts (`--use-rollout-routing-replay`)",
        "They come to the training ranks as in one job. The flag in one job alone is refused. An SGLang that returns "
        "them and their replay in Megatron are not in the test.",
        (_COLUMNS, _AGREE),
        shown="partly",
        pins=NEW,
    ),
    Feature(
        "Samples' metadata",
        "What JSON has, arrays, paths, enums and sets are published. With anything else the rollout is set aside with "
        "the reason.",
        (
            "unit/test_training_data.py::test_paths_enums_and_sets_go_in_as_what_they_stand_for",
            "unit/test_dead_letters.py::"
            "test_what_cannot_be_published_for_what_it_holds_is_not_generated_again_and_again",
        ),
    ),
    Feature(
        "Evaluation",
        "Runs in the rollout job: the same evaluations by the same weights. Its data, samples and lengths are the "
        "same in both jobs, or refused.",
        ("slime/test_asked_for.py::test_evaluation_and_the_data_source_are_the_rollout_jobs", _AGREE),
    ),
    Feature("Evaluation with several data sets", "Two data sets, the figures of one job.", (_ON,)),
    Feature(
        "`--num-epoch`",
        "One epoch of five rollouts. slime ignores the flag where `--num-rollout` is given.",
        (_ON,),
    ),
    Feature(
        "`--num-rollout`, raised in a restart",
        "Also where only the train job is started again.",
        ("unit/test_engines.py::test_a_train_job_that_is_started_again_with_more_rollouts_gets_them",),
    ),
    Feature(
        "`--update-weights-interval`",
        "With `train_async.py`. `train.py` updates after every rollout, in one job as in two.",
        (_ON,),
    ),
    Feature(
        "`--num-steps-per-rollout`, `--global-batch-size`",
        "The split of a rollout for several steps is slime's.",
        (_SPLIT,),
    ),
    Feature(
        "Dynamic batch size",
        "From a checkpoint, equal to one job to the last bit. Before v0.3.1 the training ranks make these batches "
        "themselves, of the same data.",
        (f"{_LAYOUTS}[dynamic-batch]",),
    ),
    Feature(
        "Data parallelism",
        "Two ranks in every test; here one rank trains on what was published for two.",
        ("slime/test_survival.py::test_a_train_job_that_is_started_again_with_other_resources",),
    ),
    Feature(
        "Tensor, pipeline and context parallelism",
        "Two ranks of each, TP 2 with DP 2, and TP 2 with PP 2: from a checkpoint, equal to one job to the last bit. "
        "Layers and groups are megatron-core's on the CPU; `standins/layout.py` passes keys, values and activations. "
        "The split of a rollout for CP and virtual pipeline stages is slime's. Sequence and expert parallelism are in "
        "no test.",
        (*(f"{_LAYOUTS}[{layout}]" for layout in ("tp", "pp", "cp", "tp-dp", "tp-pp-nccl")), _SPLIT),
    ),
    Feature(
        "PPO critic",
        "Equal to one job to the last bit, with steps of the critic alone. A train job that is killed in these goes "
        "on from the critic's checkpoint. Checkpoints of both roles in one folder or behind different rollouts are "
        "refused. Actor and critic share GPUs within the train job by offloading, which is not in the test "
        "(`standins/torch_memory_saver`).",
        (
            "slime/test_features.py::test_ppo_with_steps_of_the_critic_alone",
            "slime/test_survival.py::test_a_train_job_of_ppo_that_was_killed_while_only_the_critic_trained",
            "unit/test_arguments.py::test_actor_and_critic_save_in_folders_of_their_own",
            "unit/test_arguments.py::test_actor_and_critic_go_on_behind_the_same_rollout",
        ),
        pins=NEW,
    ),
    Feature(
        "Weights over disk",
        "Each update is verified at the engines.",
        (
            "slime/test_weights.py::test_an_engine_that_ignores_an_update_ends_the_train_job",
            "slime/test_weights.py::test_a_train_job_that_begins_anew_goes_on_behind_what_the_engines_have_applied",
        ),
        pins=NEW,
    ),
    Feature(
        "Weights over NCCL",
        "slime's default, with gloo in NCCL's place: slime's own updater sends to two engines that join its group, "
        "equal to one job to the last bit, and both have the trainer's weights after each update. A job that is "
        "killed with half of an update sent is gone on from. Before v0.3 a folder carries the weights. With a real "
        "SGLang server groups are made, ended and made again, and no weights are sent: SGLang 0.5.23 takes none so, "
        "by its source, outside of /begin_weight_update, which these pins do not call. NCCL itself needs GPUs and has "
        "not been run.",
        (
            f"{_SAME}[079dbcf]",
            f"{_SAME}[v0.1.0]",
            "slime/test_features.py::test_weights_that_go_to_two_engines_over_nccl",
            f"{_LAYOUTS}[tp-pp-nccl]",
            "slime/test_survival.py::test_a_train_job_that_was_killed_while_it_sent_weights_over_nccl",
            "slime/test_survival.py::test_a_rollout_job_that_was_killed_when_its_engines_had_weights_over_nccl",
            "slime/test_survival.py::test_a_rollout_job_that_was_killed_while_it_got_weights_over_nccl",
            "slime/test_placement.py::test_engines_that_a_killed_train_job_left_take_weights_from_the_next",
        ),
        shown="partly",
    ),
    Feature(
        "`--update-weight-mode delta`", "Its first update gives the engines nothing.", (_REFUSED,), "refused", NEW
    ),
    Feature(
        "wandb",
        "One run for both jobs and all restarts.",
        (
            "slime/test_tracking.py::test_two_jobs_are_one_run_in_wandb",
            "slime/test_tracking.py::test_wandb_holds_the_figures_of_each_rollout",
        ),
    ),
    Feature(
        "TensorBoard",
        "The figures of each rollout.",
        ("slime/test_tracking.py::test_tensorboard_holds_the_figures_of_each_rollout",),
        pins=NEW,
    ),
    Feature(
        "`--debug-train-only`",
        "Trains on a recording, equal to the recorded run to the last bit.",
        ("slime/test_replay.py::test_a_recorded_run_trains_again_to_the_last_bit",),
    ),
    Feature(
        "`--debug-rollout-only`",
        "It runs without training: run slime without a role for that.",
        (_REFUSED, _REFUSED_BY_SLIME),
        "refused",
    ),
    Feature(
        "`--colocate`, offloading of engines",
        "Rollout and training share no GPU across jobs.",
        (_REFUSED, _REFUSED_BY_SLIME),
        "refused",
    ),
    Feature("`--release-train`", "It makes room for engines on the same GPUs.", (_REFUSED,), "refused", NEW),
    Feature(
        "`--rollout-data-transport nixl`",
        "Its data end with the rollout job's process; vaults keep rollouts in the object store.",
        (_REFUSED,),
        "refused",
        NEW,
    ),
    Feature(
        "`--ci-test` with weights over disk",
        "It expects slime's own number of an update at the engines, and they report this job's stamp.",
        (_REFUSED,),
        "refused",
        NEW,
    ),
    Feature(
        "Fully asynchronous rollout functions",
        "They draw prompts after they have returned. One of another name ends the rollout job when it does so.",
        (_REFUSED, "unit/test_rollout_driver.py::test_prompts_that_somebody_draws_between_two_rollouts_end_the_job"),
        "refused",
        NEW,
    ),
)

HEAD = """\
# What of slime runs across two jobs

`python -m tests.slime.features` makes this page of `tests/slime/features.py` (the features, and the tests that show
each) and of `tests/slime/outcomes.json` (how these tests ended). `tests/unit/test_slime_features.py` fails where the
page differs. To add outcomes, name a file for them in a run of tests, then merge it:

    SLIME_OUTCOMES=/tmp/outcomes.jsonl scripts/test.sh slime
    python -m tests.slime.features /tmp/outcomes.jsonl

Ids of tests are paths below `tests/`. Tests in `slime/` run real slime with CPU stand-ins (`tests/slime/standins`).
{dates} "before" stands for 079dbcf and v0.1.0. A cell says of a pin of slime:

| cell | meaning |
| --- | --- |
| runs | every test of the feature passed with this slime |
| partly | so they did, and they cover a part of the feature: see its row |
| unit tests | only tests that need no slime show it, and they passed |
| refused | both jobs, or the one that was given the flag, end at the start with the reason: the tests of that passed |
| **FAILED** | one of its tests failed |
| not run yet | of one of its tests there is no outcome |
| no test | slime has the feature there, and no test covers it |
| - | slime has no such feature there |

| feature | v0.3.1 | main | before | how it is shown |
| --- | --- | --- | --- | --- |
"""


@functools.cache
def cases(test: str) -> dict[str, int]:
    """Pin -> how many cases of a test its source has there (0: it does not say); {} where there is no such test.

    A test that takes no pin is of those that it or its module names, one outside tests/slime of all.
    """
    file, _, rest = test.partition("::")
    name, _, case = rest.rstrip("]").partition("[")
    body = parsed((TESTS / file).read_text()).body if (TESTS / file).is_file() else []
    is_it = (node for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name)
    if (function := next(is_it, None)) is None:
        return {}
    constants = [node for node in body if isinstance(node, ast.Assign)]
    number = 1
    for mark in function.decorator_list:
        if isinstance(mark, ast.Call) and ast.unparse(mark.func).endswith("parametrize") and not _pins_in([mark]):
            named = {ast.unparse(node.targets[0]): node.value for node in constants}
            given = named.get(ast.unparse(mark.args[1]), mark.args[1])
            values = getattr(given, "elts", getattr(given, "keys", ()))
            number *= 0 if any(isinstance(value, ast.Starred | None) for value in values) else len(values)
    pins = _pins_in(function.decorator_list)
    if not file.startswith("slime/"):
        pins = Counter(PINS)
    elif not pins:
        pins = Counter({*(_pins_in(function.body) or _pins_in(constants))})
    if case in PINS:
        return {case: pins[case] * number} if case in pins else {}
    if case:
        told = {node.value for top in body for node in ast.walk(top) if isinstance(node, ast.Constant)}
        return dict.fromkeys(pins, 1) if case in told else {}
    return {pin: times * number for pin, times in pins.items()}


def _pins_in(nodes: Iterable[ast.AST]) -> "Counter[str]":
    found = (part.value for node in nodes for part in ast.walk(node) if isinstance(part, ast.Constant))
    return Counter(value for value in found if value in PINS)


def split(test: str) -> tuple[str, str, str]:
    """The id of an outcome: the test, its pin, and its case without the pin; "" where it has none."""
    name, _, case = test.removesuffix("]").partition("[")
    pin = re.search(rf"(?:^|(?<=-))({'|'.join(map(re.escape, PINS))})(?=-|$)", case)
    if pin is None or not test.startswith("slime/"):
        return name, "", case
    return name, pin[0], (case[: pin.start()] + case[pin.end() :]).strip("-").replace("--", "-")


def outcomes_of(test: str, pin: str, outcomes: Outcomes) -> list[str]:
    """How the cases of a test at a pin ended."""
    found = []
    for one, kept in outcomes.items():
        name, at, case = split(one)
        if at in (pin, "") and test in (name, f"{name}[{case}]", f"{name}[{at}]"):
            found.append(kept["outcome"])
    return found


def is_gone(test: str) -> bool:
    """Whether the source has no test with this id of an outcome, or not at its pin."""
    name, pin, _ = split(test)
    there = cases(name)
    at_pins = name.startswith("slime/") and len(there) > 1  # so its id has a pin
    return not there or (pin not in there if pin or at_pins else False)


def cell(feature: Feature, pin: str, outcomes: Outcomes) -> str:
    if pin not in feature.pins:
        return "-"
    there = [test for test in feature.tests if pin in cases(test)]
    with_slime = [test for test in there if test.startswith("slime/")]
    by_slime = any(test.startswith("slime/") for test in feature.tests) and feature.shown != "refused"
    if not there or (by_slime and not with_slime):
        return "no test"
    ended = {test: outcomes_of(test, pin, outcomes) for test in there}
    if any(outcome != "passed" for found in ended.values() for outcome in found):
        return "**FAILED**"
    if any(len(found) < max(1, cases(test)[pin]) for test, found in ended.items()):
        return "not run yet"
    return feature.shown if by_slime or feature.shown == "refused" else "unit tests"


def page(outcomes: Outcomes) -> str:
    named = {test.partition("[")[0] for feature in FEATURES for test in feature.tests}
    days = [kept["date"][:10] for test, kept in outcomes.items() if split(test)[0] in named]
    dates = f"Outcomes are of {' to '.join(sorted({min(days), max(days)}))}." if days else "There are no outcomes yet."
    rows = []
    for feature in FEATURES:
        at = {pin: cell(feature, pin, outcomes) for pin in PINS}
        before = {pin: at[pin] for pin in BEFORE}
        same = len({*before.values()}) == 1
        said = at[BEFORE[0]] if same else ", ".join(f"{pin}: {what}" for pin, what in before.items())
        how = "<br>".join([feature.text, *(f"`{test}`" for test in feature.tests)])
        rows.append(f"| {feature.name} | {at['v0.3.1']} | {at['main']} | {said} | {how} |\n")
    return HEAD.format(dates=dates) + "".join(rows)


def merged(outcomes: Outcomes, files: Iterable[Path]) -> Outcomes:
    """With what the files say: of a test the newest outcome, of equal dates that of the file written last. A skipped
    test was not run, and says nothing."""
    found = dict(outcomes)
    for file in sorted(files, key=lambda file: file.stat().st_mtime):
        for line in file.read_text().splitlines():
            new = json.loads(line)
            test = new.pop("test")
            if new["outcome"] != "skipped" and new["date"] >= found.get(test, new)["date"]:
                found[test] = new
    named = {test.partition("[")[0] for feature in FEATURES for test in feature.tests}
    kept = (test for test in found if test.startswith("slime/") or split(test)[0] in named)
    return {test: found[test] for test in sorted(kept) if not is_gone(test)}


def kept_outcomes() -> Outcomes:
    return json.loads(OUTCOMES.read_text())


def main(files: list[str]) -> None:
    outcomes = merged(kept_outcomes(), map(Path, files))
    lines = (f"{json.dumps(test)}: {json.dumps(kept)}" for test, kept in outcomes.items())
    OUTCOMES.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    PAGE.write_text(page(outcomes))


if __name__ == "__main__":
    main(sys.argv[1:])
