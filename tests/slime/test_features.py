"""What slime's users switch on, whole: a single job and two jobs train on the same, see cross-job-features.md."""

import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import requests

from local_cluster import free_ports
from tests.slime import single_job, sums
from tests.slime.slime_jobs import FIGURES, NCCL, at_pins, end_well, ppo, weights_that_generated, while_they_move
from tests.support.patience import patient, wait_for

ROLLOUTS = 5
_TP, _PP, _CP = (f"--{kind}-parallel-size" for kind in ("tensor-model", "pipeline-model", "context"))
LAYOUTS = {  # name: (data-parallel ranks, flags of the train job, flags of both jobs)
    "dynamic-batch": (2, (), ("--use-dynamic-batch-size", "--max-tokens-per-gpu", "60")),
    "tp": (1, (_TP, "2"), ()),
    "cp": (1, (_CP, "2"), ()),
    "pp": (1, (_PP, "2"), ()),
    "tp-dp": (2, (_TP, "2", "--actor-num-gpus-per-node", "4"), ()),
    "tp-pp-nccl": (1, (_TP, "2", _PP, "2", "--actor-num-gpus-per-node", "4"), NCCL),  # a group for each stage
}
"""How training ranks share the work; those of `standins/layout.py`."""


@at_pins(also=("v0.3.1", "main"))
def test_generation_that_goes_on_from_rollout_to_rollout(pin, new_run):
    """Two engines, over-sampling, a filter, partial rollouts, two sets to evaluate, --num-epoch, an update of the
    weights after every second rollout."""
    logs = {}
    for name in ("single", "split"):
        run = new_run(pin, name, options={"num_rollout": None, "engines": 2})
        sums.write_prompts(run.folders.prompts, 8 * ROLLOUTS)  # one epoch
        sums.write_prompts(others := run.root / "others.jsonl", 8, seed=1)
        run.extra = (
            *("--num-epoch", "1", "--update-weights-interval", "2"),
            *("--over-sampling-batch-size", "16", "--dynamic-sampling-filter-path", "turns.keep"),
            *("--partial-rollout", "--mask-offpolicy-in-partial-rollout"),
            *("--custom-generate-function-path", "turns.generate"),
            *("--eval-interval", "2", "--n-samples-per-eval-prompt", "1", "--eval-max-response-len", "4"),
            *("--eval-prompt-data", "sums", str(run.folders.prompts), "others", str(others)),
        )
        if name == "single":
            jobs = [run.start("train_async.py", *run.extra)]
        else:
            jobs = [run.rollout_job(), run.train_job(script="train_async.py")]
        end_well(*jobs)
        logs[name] = run.steps(*FIGURES), jobs
    (expected, (alone,)), (steps, (rollout, train)) = logs["single"], logs["split"]
    assert [step[0] for step in expected] == list(range(ROLLOUTS))
    assert steps == expected
    assert weights_that_generated(train) == {0: 0, 1: 0, 2: 0, 3: 2, 4: 2}
    for found in (partial_samples, dropped_groups, evaluations):
        assert found(rollout) == found(alone)
        assert found(rollout), found
    assert max(partial_samples(rollout)) > 0, "nothing was aborted: there is nothing to go on with"


@at_pins(also=("v0.3.1", "main"))
def test_what_images_and_experts_leave_in_a_rollout_comes_to_the_training_ranks(pin, new_run):
    steps = {}
    for name in ("single", "split"):
        run = new_run(pin, name, options={"num_rollout": 2})
        run.extra = ("--custom-generate-function-path", "more_columns.generate", "--use-rollout-routing-replay")
        end_well(*([run.start("train.py", *run.extra)] if name == "single" else [run.rollout_job(), run.train_job()]))
        steps[name] = run.steps(*FIGURES, "columns")
    assert steps["split"] == steps["single"]
    assert all({"multimodal_train_inputs", "rollout_routed_experts"} <= {*step[-1]} for step in steps["single"])


@at_pins(also=("v0.3.1", "main"))
def test_ppo_with_steps_of_the_critic_alone(pin, new_run, single_ppo):
    run = new_run(pin, "run")
    run.options, run.extra = {"save": run.root / "critic", "save_interval": 2}, ppo(run)
    rollout, train = run.rollout_job(), run.train_job()
    end_well(rollout, train)
    assert {role: run.steps(*FIGURES, role=role) for role in ("actor", "critic")} == single_ppo(pin)
    assert weights_that_generated(train) == {step: step for step in range(ROLLOUTS)}


@at_pins(also=("v0.3.1", "main"))
@pytest.mark.parametrize("name", LAYOUTS)
def test_model_parallel_layouts(pin, name, new_run, single, tmp_path):
    """Two jobs go on from a single job's checkpoint as it does itself; it trains as plain data parallelism does."""
    ranks, of_train, of_both = LAYOUTS[name]
    alone = new_run(pin, "single", options={"num_rollout": 3, "save": tmp_path / "saved"})
    end_well(alone.start("train.py", *of_train, *of_both))
    split = new_run(pin, "split", options={"num_rollout": 3, "load": tmp_path / "saved"}, extra=of_both)
    end_well(split.rollout_job(), split.train_job(*of_train, "--ckpt-step", "0"))
    expected = alone.steps(*FIGURES)
    assert split.steps(*FIGURES) == expected[1:]
    for step, plain in zip(expected[:2], single(pin), strict=False):  # hashes differ: other ranks, and other bits
        figures = [(a, b) for a, b in zip(step, plain, strict=True) if not isinstance(a, str)]
        assert [a for a, _ in figures] == pytest.approx([b for _, b in figures], rel=1e-4, abs=1e-6)
    sizes = [step[-1] for step in alone.steps("micro_batches")]
    if name == "dynamic-batch":
        assert all(len(step) > 64 // ranks // 8 for step in sizes), sizes
    else:
        assert sizes == [[8] * (64 // ranks // 8)] * 3


@at_pins(also=("079dbcf", "v0.1.0"))
def test_two_engines_take_the_weights_of_one_group(pin, new_run, single):
    """Up to v0.1 their number sizes the group of processes that the weights go to."""
    run = new_run(pin, "run", options={"engines": 2})
    rollout, train = run.rollout_job(), run.train_job()
    end_well(rollout, train)
    assert run.steps(*FIGURES) == single(pin)
    assert len(set(re.findall(r"http://[\d.]+:\d+", re.search(r"its engines: ([^\n]*)", rollout.logs)[1]))) == 2


@at_pins(also=("v0.3.1", "main"))
def test_weights_that_go_to_two_engines_over_nccl(pin, new_run, single):
    """As slime sends them by default, with gloo in the place of NCCL: each update gives both engines all weights."""
    run = new_run(pin, "run", probe=True, options={"engines": 2}, extra=NCCL)
    rollout, train = run.rollout_job(), run.train_job()
    end_well(rollout, train)
    assert "[slime-pp_0] Update weights: " in train.logs
    assert not [*run.folders.weights.iterdir()], "they went over disk"
    assert run.steps(*FIGURES) == single(pin)
    assert weights_that_generated(train) == {step: step for step in range(ROLLOUTS)}
    probes = single_job.read_log(run.folders.log, "probe")
    assert [probe["version"] for probe in probes] == [*range(1, ROLLOUTS + 1)]
    for probe in probes:
        assert len({server["url"] for server in probe["servers"]}) == 2
        assert {server["checksum"] for server in probe["servers"]} == {probe["trainer_checksum"]}


@at_pins(also=("v0.3.1", "main"))
def test_engines_that_the_job_did_not_start(pin, new_run, single):
    """They serve the weights under this job's name, also to the rollout job's next life, and outlive both jobs."""
    run = new_run(pin, "run", probe=True)
    with toy_engine(run) as one, toy_engine(run) as other:
        run.extra = ("--rollout-external-engine-addrs", one, other)
        hold = run.root / "hold-rollout"
        hold.write_text("2")
        run.env["SLIME_CPU_HOLD_ROLLOUT"] = str(hold)
        first, train = run.rollout_job(), run.train_job()
        while_they_move(Path(f"{hold}.held").exists, first, train)
        first.client.stop_job(first.id)
        assert first.wait(patient(60)) in ("STOPPED", "SUCCEEDED"), "the fault did not happen"
        hold.unlink()
        end_well(run.rollout_job(), train)
        versions = [said(address, "get_weight_version") for address in (one, other)]
    assert run.steps(*FIGURES) == single(pin)
    assert weights_that_generated(train) == {step: step for step in range(5)}
    assert all(version["weight_version"].startswith(f"{run.name}/5/") for version in versions), versions


@at_pins(also=("v0.3.1", "main"))
def test_an_engine_that_dies_is_started_again_and_takes_the_next_weights(pin, new_run, single):
    run = new_run(pin, "run", options={"engines": 2})
    run.extra = ("--use-fault-tolerance", "--rollout-health-check-interval", "1")
    hold = run.root / "hold-rollout"
    hold.write_text("2")
    run.env["SLIME_CPU_HOLD_ROLLOUT"] = str(hold)
    rollout, train = run.rollout_job(), run.train_job()
    while_they_move(Path(f"{hold}.held").exists, rollout, train)
    (killed, _), left = servers(run)
    killed.kill()
    while_they_move(lambda: "Successfully killed engine at index" in rollout.logs, rollout, train)
    hold.write_text("4")
    Path(f"{hold}.held").unlink()
    while_they_move(Path(f"{hold}.held").exists, rollout, train)
    now = servers(run)
    assert left in now
    assert len(now) == 2, "slime started none in its place"
    assert len({said(address, "get_weight_version")["weight_version"] for _, address in now}) == 1
    hold.unlink()
    end_well(rollout, train)
    assert run.steps(*FIGURES) == single(pin)


@contextmanager
def toy_engine(run):
    """Address of an engine that no job has started."""
    (port,) = free_ports(1)
    engine = Path(__file__).with_name("standins") / "toy_engine.py"
    command = [sys.executable, str(engine), "--model-path", str(run.folders.model), "--port", str(port)]
    process = subprocess.Popen(command)
    try:
        wait_for(lambda: said(f"127.0.0.1:{port}", "health"), 60)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def servers(run):
    """(process, address) of each toy engine that a run has started, the oldest first."""
    found = []
    for process in psutil.process_iter(["cmdline", "create_time"]):
        words = process.info["cmdline"] or []
        if str(run.folders.model) in words and any(word.endswith("toy_engine.py") for word in words[:2]):
            host, port = (words[words.index(flag) + 1] for flag in ("--host", "--port"))
            found.append((process.info["create_time"], process.pid, f"{host}:{port}"))
    return [(psutil.Process(pid), address) for _, pid, address in sorted(found)]


def said(address, what):
    """What an engine answers; None where none does."""
    try:
        return requests.get(f"http://{address}/{what}", timeout=60).json()
    except requests.RequestException:
        return None


def partial_samples(job):
    return [int(number) for number in re.findall(r"Collected (\d+) partial samples", job.logs)]


def dropped_groups(job):
    return re.findall(r"dynamic_filter/drop_every_third'?: (\d+)", job.logs)


def evaluations(job):
    """(rollout id, data set, reward) of each evaluation that the job's log tells of."""
    told = re.findall(r"eval (\d+): ([^\n]*)", job.logs)
    return [(r, *found) for r, text in told for found in re.findall(r"'eval/(sums|others)': ([-\d.e]+)", text)]
