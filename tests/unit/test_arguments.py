"""slime's arguments in a job of one role: what cannot work is refused, with the flag and the reason."""

import argparse
import sys
from types import SimpleNamespace

import pytest

from slime.cross_job.adapter import arguments
from slime.cross_job.errors import BadInput
from slime.cross_job_arguments import add_arguments, check_arguments

SWITCH = ["--enable-cross-job-communication", "--job-id", "exp"]
ROLE = [*SWITCH, "--cross-job-role", "train"]


def parse(*words, **of_slime):
    args = add_arguments(argparse.ArgumentParser()).parse_args(words)
    defaults = {"colocate": False, "debug_train_only": False, "rollout_num_gpus": 2}
    return SimpleNamespace(**{**defaults, **vars(args), **of_slime})


@pytest.mark.parametrize(
    ("words", "of_slime"),
    [
        ([], {"colocate": True}),  # without the switch nothing is checked
        (SWITCH, {}),
        (SWITCH, {"colocate": True, "offload": True, "rollout_num_gpus": None}),  # without a role: any slime job
        (ROLE, {}),
        (ROLE, {"rollout_num_gpus": None, "rollout_external": True}),  # engines that are not started need no GPUs
        (ROLE, {"rollout_num_gpus": None, "debug_train_only": True}),
        ([*SWITCH, "--cross-job-role", "rollout", "--cross-job-max-ahead", "1"], {}),
    ],
)
def test_what_works_passes(words, of_slime):
    check_arguments(parse(*words, **of_slime))


@pytest.mark.parametrize(
    ("words", "of_slime", "said"),
    [
        (["--job-id", "exp"], {}, "--job-id without --enable-cross-job-communication"),
        (["--cross-job-role", "train"], {}, "--cross-job-role without --enable-cross-job-communication"),
        (["--cross-job-retain", "0"], {}, "--cross-job-retain without --enable-cross-job-communication"),
        (["--cross-job-store-env", "X"], {}, "--cross-job-store-env without --enable-cross-job-communication"),
        (SWITCH[:1], {}, "no job id"),
        ([*SWITCH, "--cross-job-max-ahead", "-1"], {}, "--cross-job-max-ahead -1 is too small"),
        (ROLE, {"colocate": True}, "--colocate does not go with --cross-job-role train"),
        (ROLE, {"offload": True}, "--offload does not go with"),
        (ROLE, {"offload_rollout": True}, "--offload-rollout does not go with"),
        (ROLE, {"release_train": True}, "--release-train does not go with"),
        (ROLE, {"debug_rollout_only": True}, "--debug-rollout-only does not go with"),
        (ROLE, {"update_weight_mode": "delta"}, "--update-weight-mode delta does not go with --cross-job-role"),
        (ROLE, {"rollout_data_transport": "nixl"}, "--rollout-data-transport nixl"),
        (ROLE, {"ci_test": True, "update_weight_transport": "disk"}, "--ci-test does not go with"),
        (ROLE, {"rollout_num_gpus": None}, "--rollout-num-gpus is not set"),
        (ROLE, {"rollout_function_path": "fully_async_rollout.generate_rollout_fully_async"}, "trained on twice"),
        (
            [*SWITCH, "--cross-job-role", "rollout"],
            {"rollout_function_path": "slime.rollout.fully_async_rollout.generate_rollout_fully_async"},
            "--rollout-function-path .* does not go with --cross-job-role rollout",
        ),
    ],
)
def test_what_cannot_work_is_refused(words, of_slime, said):
    with pytest.raises(BadInput, match=said):
        check_arguments(parse(*words, **of_slime))


def ppo(monkeypatch, role="train", overrides=None, **of_slime):
    """A job of PPO; `overrides` are those of --megatron-config-path, by role."""
    of_role = lambda args, path, role: SimpleNamespace(**{**vars(args), **overrides.get(role, {})})  # noqa: E731
    monkeypatch.setitem(sys.modules, "slime.utils.arguments", SimpleNamespace(parse_megatron_role_args=of_role))
    given = {"use_critic": True, "num_critic_only_steps": 2, "num_rollout": 9, "save": "/saved", "load": None}
    given |= {"megatron_config_path": overrides and "/roles.yaml", "finetune": False, "ckpt_step": None, **of_slime}
    return parse(*SWITCH, "--cross-job-role", role, **given)


@pytest.mark.parametrize("role", ["rollout", "train"])
@pytest.mark.parametrize("overrides", [None, {"critic": {"lr": 1.0}}])
def test_actor_and_critic_save_in_folders_of_their_own(role, overrides, monkeypatch):
    """Else the checkpoint by which a rollout is acked is no actor's any more."""
    with pytest.raises(BadInput, match="write its checkpoints over the actor's, in /saved"):
        check_arguments(ppo(monkeypatch, role, overrides))
    check_arguments(ppo(monkeypatch, role, overrides, save=None))
    check_arguments(ppo(monkeypatch, role, overrides, num_critic_only_steps=9))
    check_arguments(ppo(monkeypatch, role, {"actor": {"save": "/saved/actor"}}))


def test_who_gives_the_critic_a_folder_beside_save_hears_what_cannot_go_on(monkeypatch, caplog):
    """slime begins anew where --load has no checkpoint, whatever the critic's own `load` says."""
    check_arguments(ppo(monkeypatch, overrides={"critic": {"save": "/critic"}}, num_critic_only_steps=0))
    check_arguments(ppo(monkeypatch, overrides={"actor": {"save": "/actor"}}))
    assert caplog.messages == []
    check_arguments(ppo(monkeypatch, overrides={"critic": {"save": "/critic"}}))
    assert "ends in the first 2 rollouts" in caplog.text
    assert "in /critic. Let --save and --load name that folder" in caplog.text


def test_actor_and_critic_go_on_behind_the_same_rollout(monkeypatch, tmp_path):
    """A job may end between the two checkpoints."""
    for name, last in (("actor", "3"), ("critic", "1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "latest_checkpointed_iteration.txt").write_text(last)
    actor, critic = str(tmp_path / "actor"), str(tmp_path / "critic")
    own, of_critic = {"actor": {"save": actor, "load": actor}}, {"save": critic, "load": critic}
    with pytest.raises(BadInput, match=r"actor .* after rollout 3 .*critic .* after rollout 1 .*--ckpt-step"):
        check_arguments(ppo(monkeypatch, "train", own, **of_critic))
    check_arguments(ppo(monkeypatch, "train", own, **of_critic, ckpt_step=1))
    check_arguments(ppo(monkeypatch, "train", {"actor": {"save": actor, "load": "/sft"}}, **of_critic))
    (tmp_path / "critic" / "latest_checkpointed_iteration.txt").write_text("3")
    check_arguments(ppo(monkeypatch, "train", own, **of_critic))


def test_slimes_jobs_let_each_other_come_back_unless_told_otherwise():
    assert arguments.settings(parse(*ROLE)).peer_grace_s == arguments.PEER_GRACE_S == 1800
    assert arguments.settings(parse(*ROLE, "--cross-job-peer-grace-s", "0")).peer_grace_s == 0
    assert arguments.settings(parse(*SWITCH)).peer_grace_s == 0


@pytest.mark.parametrize(
    ("script", "max_ahead", "said"),
    [
        ("/slime/train_async.py", 1, "up to 2 versions behind"),
        ("train_async.py", 0, None),
        ("/slime/train.py", 1, None),
    ],
)
def test_a_script_that_goes_ahead_by_itself_and_max_ahead_add_up(script, max_ahead, said):
    words = arguments.staleness_adds_up(script, max_ahead)
    assert (words is None) if said is None else said in words
