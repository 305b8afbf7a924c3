"""slime's debug rollout files: read as data only, named clearly where they are something else."""

import builtins
import os
from pathlib import Path

import pytest
import torch

from slime.cross_job.adapter import debug_files
from slime.cross_job.errors import BadInput, PayloadDamaged

SAMPLE = {
    "index": 3,
    "tokens": [1, 2, 3],
    "response_length": 2,
    "reward": 1 / 3,
    "status": "completed",
    "metadata": {},
}


class Bomb:
    """What pickle would execute."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_what_is_written_is_read(tmp_path):
    template = debug_files.make_folder(tmp_path / "out")
    assert template == str(tmp_path / "out" / "{rollout_id}.pt")
    samples = [SAMPLE, {**SAMPLE, "rollout_routed_experts": torch.arange(6).reshape(3, 2)}]
    path = debug_files.write(template, 7, samples)
    assert path == tmp_path / "out" / "7.pt"
    assert [file.name for file in path.parent.iterdir()] == ["7.pt"]
    read = debug_files.read(path, 7)
    assert read[0] == SAMPLE
    assert read[1]["rollout_routed_experts"].equal(samples[1]["rollout_routed_experts"])
    assert torch.load(path, weights_only=False)["rollout_id"] == 7
    assert debug_files.find(template) == {7: path}


def test_nothing_of_a_file_is_executed(tmp_path):
    path, trap = tmp_path / "0.pt", tmp_path / "trap"
    torch.save({"rollout_id": 0, "samples": [{**SAMPLE, "metadata": {"x": Bomb(trap)}}]}, path)
    with pytest.raises(BadInput, match="reading it would execute code in the file, which is not done here"):
        debug_files.read(path, 0)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1, 2], "is not one of slime's debug rollout files: it has no list of samples"),
        ({"rollout_id": 0, "samples": []}, "no list of samples"),
        ({"rollout_id": 0, "samples": [SAMPLE, 5]}, "no list of samples"),
        ({"rollout_id": 4, "samples": [SAMPLE]}, "is named for rollout 0, and holds rollout 4"),
        ({"rollout_id": 0, "samples": [SAMPLE, {"tokens": [1]}]}, "sample 1 has no response_length, reward, status"),
    ],
)
def test_other_files_are_named(content, said, tmp_path):
    path = tmp_path / "0.pt"
    torch.save(content, path)
    with pytest.raises(BadInput, match=said):
        debug_files.read(path, 0)


@pytest.mark.parametrize("content", [b"", b"no file of torch's", b"PK\x03\x04 and then nothing"])
def test_a_file_that_is_torn_or_foreign_is_damaged(content, tmp_path):
    path = tmp_path / "0.pt"
    path.write_bytes(content)
    with pytest.raises((PayloadDamaged, BadInput), match=str(path)):
        debug_files.read(path, 0)
    with pytest.raises(BadInput, match="there is no file"):
        debug_files.read(tmp_path / "1.pt", 1)


def test_a_file_that_is_cut_off_is_damaged(tmp_path):
    path = debug_files.write(debug_files.make_folder(tmp_path / "out"), 0, [SAMPLE])
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(PayloadDamaged, match="cannot be read as a torch file"):
        debug_files.read(path, 0)


def test_files_are_found_by_slimes_template(tmp_path):
    for name in ("run-10.pt", "run-2.pt", "run-eval_2.pt", "run-2.pt.part", "other.pt"):
        (tmp_path / name).touch()
    assert debug_files.find(f"{tmp_path}/run-{{rollout_id}}.pt") == {
        2: tmp_path / "run-2.pt",
        10: tmp_path / "run-10.pt",
    }
    for template, said in (
        (f"{tmp_path}/run.pt", "is no template"),
        (f"{tmp_path}/{{rollout_id}}/x.pt", "is no template"),
        (f"{tmp_path}/none/{{rollout_id}}.pt", "there is no folder"),
        (f"{tmp_path}/never-{{rollout_id}}.pt", "there is no file"),
    ):
        with pytest.raises(BadInput, match=said):
            debug_files.find(template)


def test_a_folder_that_is_there_is_not_written_to(tmp_path):
    (tmp_path / "out").mkdir()
    for folder, said in (
        (tmp_path / "out", "exists already: give a new folder"),
        (tmp_path / "no" / "out", "cannot be made: No such file or directory"),
        (tmp_path / "{x}", "slime would take the braces for a field"),
    ):
        with pytest.raises(BadInput, match=said):
            debug_files.make_folder(folder)


def test_without_torch_one_is_told_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def without_torch(name, *args, **kwargs):
        if name == "torch":
            raise ImportError("no torch")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    with pytest.raises(BadInput, match="pip install torch"):
        debug_files.read(tmp_path / "0.pt", 0)
