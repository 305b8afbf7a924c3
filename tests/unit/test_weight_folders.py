"""Folders that weights pass through: the greatest number in them, and whose they are."""

import json
from types import SimpleNamespace

import pytest

from slime.cross_job.adapter import weight_folders
from slime.cross_job.errors import BadInput


def engine(folder, external=False, url="http://127.0.0.1:15000"):
    args = SimpleNamespace(update_weight_local_checkpoint_dir=str(folder), rollout_external=external)
    return SimpleNamespace(args=args, get_url=lambda: url)


def pulled(folder, version):
    (folder / ".weight_sync").mkdir(parents=True)
    (folder / ".weight_sync" / "state.json").write_text(json.dumps({"version": f"{version:06d}"}))


def test_the_greatest_number_that_was_published(tmp_path):
    assert weight_folders.published(str(tmp_path / "new"), "exp").newest == 0
    for name in ("weight_v000002", "weight_v000011", "weight_v000011.tmp", "weight_vx", "other"):
        (tmp_path / name).mkdir()
    assert weight_folders.published(str(tmp_path), "exp").newest == 11


def test_the_number_that_a_host_has_applied(tmp_path):
    assert weight_folders.local(engine(tmp_path / "new"), "exp").newest == 0
    pulled(tmp_path / "old", 50)
    assert weight_folders.local(engine(tmp_path / "old"), "exp").newest == 50
    assert weight_folders.local(engine(tmp_path / "old", external=True), "exp").newest == 50


def test_nobody_looks_into_the_folders_of_another_host(tmp_path):
    elsewhere = engine(tmp_path / "there", external=True, url="http://192.0.2.1:15000")  # an address of nobody
    assert weight_folders.local(elsewhere, "exp").newest is None
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("text", ["", '{"version"', "{}", "[]", '{"version": null}'])
def test_a_host_that_does_not_say_which_update_it_has_is_named(text, tmp_path):
    (tmp_path / ".weight_sync").mkdir()
    (tmp_path / ".weight_sync" / "state.json").write_text(text)
    with pytest.raises(BadInput, match=r"state.json on \S+ does not say which update .*: remove "):
        weight_folders.local(engine(tmp_path), "exp")


@pytest.mark.parametrize(
    "look", [weight_folders.published, lambda path, *who: weight_folders.local(engine(path), *who)]
)
def test_a_folder_is_of_who_came_first_until_that_job_is_gone(look, tmp_path):
    path = str(tmp_path / "weights")
    assert [look(path, who).owner for who in ("exp", "exp2", "exp")] == ["exp", "exp", "exp"]
    assert look(path, "exp2", "exp3").owner == "exp", "another is gone"
    assert look(path, "exp2", "exp").owner == "exp2"
    assert look(path, "exp").owner == "exp2"


def test_a_mark_whose_writer_died_before_it_wrote_is_nobodys(tmp_path):
    (tmp_path / ".slime-cross-job").write_text("")
    assert [weight_folders.published(str(tmp_path), who).owner for who in ("exp", "exp2")] == ["exp", "exp"]


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"--update-weight-disk-dir \S+/file cannot be used on"):
        weight_folders.published(str(tmp_path / "file"), "exp")


def test_one_engine_actor_for_each_node():
    server = SimpleNamespace(all_engines=["a", None, "b"])
    assert weight_folders.hosts(SimpleNamespace(_get_updatable_server=lambda: server)) == ["a", "b"]
    assert weight_folders.hosts(SimpleNamespace(_get_updatable_server=lambda: None)) == []
    assert weight_folders.hosts(SimpleNamespace()) == [], "a recording has no engines"
