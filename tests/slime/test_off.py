"""With no cross-job flag given, patched slime is slime: same defaults, same code path, nothing of cross-job loaded."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from slime.cross_job.types import MOST_META_BYTES
from tests.slime import single_job
from tests.slime.single_job import IN_PARTS
from tests.slime.slime_jobs import ROUTER_019, at_pins

FLAGS = {
    *("enable_cross_job_communication", "job_id", "cross_job_role", "cross_job_namespace", "cross_job_max_ahead"),
    *(
        "cross_job_retain",
        "cross_job_retain_s",
        "cross_job_retain_bytes",
        "cross_job_retain_from",
        "cross_job_forget_after_s",
        "cross_job_heartbeat_s",
        "cross_job_dead_after_s",
        "cross_job_peer_grace_s",
    ),
    *("cross_job_timeout_s", "cross_job_rollout_timeout_s", "cross_job_update_timeout_s"),
    *("cross_job_resources_s", "cross_job_max_bytes", "cross_job_max_staleness"),
    *(
        "cross_job_on_stale",
        "cross_job_on_poison",
        "cross_job_store",
        "cross_job_store_env",
        "cross_job_store_file",
        "cross_job_store_mode",
        "cross_job_compression",
    ),
    *("cross_job_metrics", "cross_job_traces"),
}

ON = ("--enable-cross-job-communication", "--job-id", "x")

LOOK = """
import json, sys
sys.argv = ["train.py", *json.loads(sys.argv[1])]
import train, train_async, slime.ray.placement_group, slime.ray.rollout
from slime.utils.arguments import parse_args
args = {name: repr(value) for name, value in sorted(vars(parse_args()).items())}
loaded = sorted(name for name in sys.modules if name.startswith("slime.cross_job"))
print("LOOKED", json.dumps([args, loaded, slime.ray.rollout.__file__]))
"""

AGREE = """
import json, sys
sys.argv = ["train.py", *json.loads(sys.argv[1])]
import slime.ray.placement_group
from slime.utils.arguments import parse_args
from slime.cross_job.adapter.handshake import others, terms
args, in_parts = parse_args(), hasattr(slime.ray.placement_group, "create_training_models")
print("LOOKED", json.dumps([terms(args, in_parts), others(args, in_parts)]))
"""


def look(pin: str, folder: Path, root: Path, *extra: str, script: str = LOOK) -> subprocess.CompletedProcess[str]:
    """Parse slime's arguments as train.py does, in a process of its own."""
    folders = single_job.Folders(root)
    folders.prepare()
    arguments = single_job.slime_arguments(
        pin, folders.model, folders.prompts, weight_dir=folders.weights, extra=extra
    )
    env = single_job.environment(pin, folder, engine="toy", weight_dir=folders.weights, router_019=ROUTER_019)
    command = [sys.executable, "-c", script, json.dumps(arguments)]
    return subprocess.run(
        command, cwd=folder, env={"PATH": "/usr/bin:/bin", **env}, capture_output=True, text=True, check=False
    )


@at_pins("079dbcf", "v0.1.0", "v0.3.1", "main")
def test_without_a_flag_patched_slime_is_slime(pin, checkout: Callable[..., Path], tmp_path: Path):
    seen = []
    for patched in (False, True):
        done = look(pin, checkout(pin, patched), tmp_path)
        line = next((line for line in done.stdout.splitlines() if line.startswith("LOOKED ")), None)
        assert line is not None, done.stderr[-4000:]
        args, loaded, where = json.loads(line.removeprefix("LOOKED "))
        assert where.startswith(str(checkout(pin, patched))), "another slime was looked at"
        seen.append((args, [name for name in loaded if name.split(".")[1] == "cross_job"]))
    (theirs, _), (ours, loaded) = seen
    assert {name for name in ours if name not in theirs} == FLAGS
    assert {name: ours[name] for name in theirs} == theirs
    assert {ours[name] for name in FLAGS} == {"False", "None"}
    assert loaded == [], "slime.cross_job was imported with the feature off"


BY_ITSELF = (("--job-id", "x"), "--job-id without --enable-cross-job-communication")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        pytest.param(*BY_ITSELF, marks=pytest.mark.ci),
        (
            (*ON, "--cross-job-role", "train", "--colocate"),
            "--colocate does not go with --cross-job-role train: rollout and training share no GPU across jobs",
        ),
        (("--cross-job-role", "train"), "--cross-job-role without --enable-cross-job-communication"),
        (("--enable-cross-job-communication",), "no job id"),
        ((*ON, "--cross-job-role", "judge"), "invalid choice: 'judge'"),
        (
            (*ON, "--cross-job-role", "rollout", "--debug-rollout-only"),
            "--debug-rollout-only does not go with --cross-job-role rollout",
        ),
        ((*ON, "--cross-job-max-ahead", "-1"), "--cross-job-max-ahead -1 is too small"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(flags, said, checkout: Callable[..., Path], tmp_path: Path):
    done = look("v0.3.1", checkout("v0.3.1"), tmp_path, *flags)
    assert done.returncode != 0
    assert said in done.stderr, done.stderr[-3000:]


@at_pins("v0.3.1", also=("main", "079dbcf", "v0.1.0"))
def test_jobs_with_the_same_flags_agree_on_every_argument(pin, checkout: Callable[..., Path], tmp_path: Path):
    """What slime's parser makes of them depends on neither role nor process; and the broker has room for it."""
    told = []
    for role in ("rollout", "train"):
        done = look(pin, checkout(pin), tmp_path, *ON, "--cross-job-role", role, script=AGREE)
        line = next((line for line in done.stdout.splitlines() if line.startswith("LOOKED ")), None)
        assert line is not None, done.stderr[-4000:]
        told.append(json.loads(line.removeprefix("LOOKED ")))
    (refused, warned), (theirs, warned_theirs) = told
    assert refused.pop("--num-rollout") == 3
    assert refused == theirs
    assert warned == warned_theirs
    names = {"--rollout-batch-size", "--rollout-num-gpus", "--custom-generate-function-path", "--rollout-top-p"}
    assert names - {*refused} == ({"--rollout-num-gpus"} if pin in IN_PARTS else set())
    assert {"--lr", "--num-layers"} <= {*warned}
    assert max(len(json.dumps(facts)) for facts in (refused, warned)) < MOST_META_BYTES / 2
