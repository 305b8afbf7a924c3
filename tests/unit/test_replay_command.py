"""The command cross_job_replay.py, as far as it needs neither Ray nor slime: what it lists, writes and refuses."""

import json
from types import SimpleNamespace

import pytest

from cross_job_replay import main, parse_ids
from slime.cross_job.adapter.conversion import MISSING
from slime.cross_job.adapter.handshake import PIN
from slime.cross_job.errors import BadInput, RolloutNotFound
from slime.cross_job.storage import open_store
from slime.cross_job.storage.recording import RECORDED, Header, Recording

from .test_conversion import split, whole

TERMS = {"--num-rollout": 4, "--global-batch-size": 8, PIN: "abc"}


@pytest.fixture
def uri(tmp_path):
    uri = f"file://{tmp_path}/store"
    recording = Recording.make(open_store(uri), "kept", Header("exp", RECORDED, TERMS))
    for rollout_id in (0, 1, 3):
        parts, meta = split(whole(sample_indices=[8 * rollout_id + row for row in range(8)]))
        recording.keep(rollout_id, parts, weight_version=rollout_id, meta=meta)
    return uri


def test_recordings_and_their_rollouts_are_listed(uri, capsys):
    main(["list", "--store", uri])
    assert capsys.readouterr().out.startswith("kept: rollouts 0 to 1, 3, recorded from exp, ")
    main(["list", "--store", uri, "--json"])
    (summary,) = json.loads(capsys.readouterr().out)
    assert (summary["recording"], summary["ids"], summary["ended"]) == ("kept", [[0, 2], [3, 4]], "")
    main(["list", "--store", uri, "--recording", "kept"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("rollout 3 version 1: 8 samples in 2 parts, ")
    assert lines[2].endswith(", weights 3")
    main(["list", "--store", uri, "--recording", "kept", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["terms"] == TERMS
    assert [entry["rollout_id"] for entry in told["rollouts"]] == [0, 1, 3]


def test_a_store_is_named_by_a_variable_or_a_file_too(uri, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("STORE", uri)
    (tmp_path / "uri").write_text(uri)
    main(["list", "--store-env", "STORE"])
    main(["list", "--store-file", str(tmp_path / "uri")])
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    assert first.startswith("kept: ")
    with pytest.raises(SystemExit):
        main(["list"])


def test_a_header_that_is_damaged_hides_no_other_recording(uri, capsys):
    open_store(uri).put("_recordings/broken.json", b"{}")
    main(["list", "--store", uri])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("kept: rollouts")
    assert second.startswith("broken: the header of recording 'broken' in file://")


def test_an_empty_store_has_no_recordings(tmp_path, capsys):
    main(["list", "--store", f"file://{tmp_path}/empty"])
    assert capsys.readouterr().out.startswith("no recordings in file://")


def test_what_is_exported_is_in_slimes_files_and_what_they_lack_is_said(uri, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    main(["export", "--store", uri, "--recording", "kept", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert f"--load-debug-rollout-data '{tmp_path}/out/{{rollout_id}}.pt'" in said
    assert MISSING in said
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["0.pt", "1.pt", "3.pt"]
    found = torch.load(tmp_path / "out" / "3.pt", weights_only=True)
    assert found["rollout_id"] == 3
    assert [sample["index"] for sample in found["samples"]] == [24 + row for row in range(8)]
    main(["export", "--store", uri, "--recording", "kept", "--rollouts", "1", str(tmp_path / "one")])
    assert [file.name for file in (tmp_path / "one").iterdir()] == ["1.pt"]


@pytest.mark.parametrize(
    ("words", "kind", "said"),
    [
        (["export", "--recording", "kept", "{out}"], BadInput, "out exists already"),
        (["export", "--recording", "kept", "--rollouts", "1-3", "{new}"], RolloutNotFound, "has rollouts 0 to 1, 3"),
        (["export", "--recording", "none", "{new}"], RolloutNotFound, "has no recording 'none'"),
        (["list", "--recording", "none"], RolloutNotFound, "it has kept"),
        (["list", "--", "--lr", "1"], BadInput, "list takes none of slime's arguments"),
        (["import", "--recording", "new", "{out}/{{rollout_id}}.pt"], BadInput, "give slime's arguments after --"),
        (["import", "--recording", "x", "{out}/0.pt", "--", "--lr", "1"], BadInput, "is no template"),
        (["import", "--recording", "kept", "{out}/{{rollout_id}}.pt", "--", "--lr", "1"], BadInput, "has a recording"),
        (
            ["import", "--recording", "x", "--rollouts", "0-2", "{out}/{{rollout_id}}.pt", "--", "--lr", "1"],
            BadInput,
            "there is no file for rollouts 1 to 2",
        ),
        (
            ["serve", "--recording", "kept", "--job-id", "r", "--free", "lr"],
            BadInput,
            "'--lr' is no term of recording",
        ),
        (["serve", "--recording", "none", "--job-id", "r"], RolloutNotFound, "has no recording 'none'"),
        (["serve", "--recording", "kept"], BadInput, "no job id"),
        (["record", "--recording", "kept"], BadInput, "no job id"),
    ],
)
def test_what_cannot_be_done_is_said(words, kind, said, uri, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "0.pt").touch()
    command, *rest = words
    filled = [word.format(out=tmp_path / "out", new=tmp_path / "new") for word in rest]
    with pytest.raises(kind, match=said):
        main([command, "--store", uri, *filled])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("text", ["", "a", "3-1", "1-", "-1", "1,,2"])
def test_ids_are_written_plainly(text, uri, tmp_path, capsys):
    assert [*parse_ids("0-2, 7")] == [0, 1, 2, 7]
    with pytest.raises(SystemExit):
        main(["export", "--store", uri, "--recording", "kept", f"--rollouts={text}", str(tmp_path / "new")])
    assert f"{text!r} names no rollouts: write ids and ranges, as 0-4,7" in capsys.readouterr().err


def test_a_recording_is_served_under_the_terms_of_its_run():
    from slime.cross_job.adapter.replay import terms_of

    recording = SimpleNamespace(name="kept", terms=TERMS)
    assert terms_of(recording) == TERMS
    assert terms_of(recording, 2, ("--global-batch-size",)) == {"--num-rollout": 2, PIN: "abc"}
    with pytest.raises(BadInput, match="'--lr' is no term of recording 'kept'; its terms are: --global-batch-size"):
        terms_of(recording, free=("--lr",))


def test_what_only_engines_and_prompts_are_about_binds_no_train_job_of_a_recording():
    """Both lay elsewhere when it was recorded."""
    from slime.cross_job.adapter.handshake import terms
    from slime.cross_job.adapter.replay import terms_of

    elsewhere = {"prompt_data": "/then/p", "update_weight_disk_dir": "/then/w", "eval_top_k": 1, "input_key": "q"}
    of_the_data = {"rollout_batch_size": 8, "rollout_num_gpus": 1, "use_tis": False}
    recording = SimpleNamespace(name="kept", terms=terms(SimpleNamespace(**elsewhere, **of_the_data), False))
    assert {*terms_of(recording)} == {PIN, "--rollout-batch-size", "--use-tis"}
    assert {*terms_of(recording, free=("--prompt-data",))} == {*terms_of(recording)}, "it says what holds anyway"
