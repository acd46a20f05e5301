"""Files are written whole or not at all, through links, and never in the place of what is no ordinary file."""

import os
import stat

import pytest

from retensor import files
from retensor.errors import RetensorError
from retensor.files import brief, broken_link, write_atomic


def test_a_link_is_written_through(tmp_path):
    target = tmp_path / "data" / "plan.json"
    target.parent.mkdir()
    target.write_text("old")
    link = tmp_path / "link.json"
    link.symlink_to("data/plan.json")
    write_atomic(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    target.unlink()
    write_atomic(link, "made")
    assert link.is_symlink()
    assert target.read_text() == "made"
    assert [path.name for path in target.parent.iterdir()] == ["plan.json"]


def test_pipes_and_links_to_them_are_refused_and_stay(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    link = tmp_path / "link"
    link.symlink_to(pipe)
    for path in (pipe, link):
        with pytest.raises(RetensorError, match="not an ordinary file"):
            write_atomic(path, "x")
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert link.is_symlink()


def test_links_in_a_circle_are_refused_and_stay(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.symlink_to(two)
    two.symlink_to(one)
    with pytest.raises(RetensorError, match="in a circle"):
        write_atomic(one, "x")
    assert one.is_symlink()
    assert two.is_symlink()


def test_folders_of_the_system_are_refused_even_where_they_lead_to_a_file(tmp_path, monkeypatch):
    """As /dev/stdout does, whose link was once replaced by the plan."""
    system, elsewhere = tmp_path / "dev", tmp_path / "elsewhere"
    system.mkdir()
    (system / "shm").mkdir()
    elsewhere.write_text("old")
    (system / "stdout").symlink_to(elsewhere)
    (tmp_path / "link").symlink_to(system / "stdout")
    monkeypatch.setattr(files, "_SYSTEM", (str(system),))
    monkeypatch.setattr(files, "_ORDINARY", (str(system / "shm"),))
    for path in (system / "stdout", tmp_path / "link", system / "new"):
        with pytest.raises(RetensorError, match="part of the system"):
            write_atomic(path, "x")
    assert elsewhere.read_text() == "old"
    assert sorted(path.name for path in system.iterdir()) == ["shm", "stdout"]
    write_atomic(system / "shm" / "file", "x")


def test_the_real_folders_of_the_system_are_known():
    assert {"/dev", "/proc", "/sys"} <= set(files._SYSTEM)


def test_long_names_are_one_short_sentence(tmp_path):
    with pytest.raises(RetensorError, match="too long") as caught:
        write_atomic(tmp_path / ("x" * 400 + ".json"), "x")
    assert len(str(caught.value)) < 250


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    target = tmp_path / "plan.json"
    target.write_text("old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RetensorError, match=r"plan\.json'.*No space left"):
        write_atomic(target, "new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_broken_links_are_named(tmp_path):
    assert broken_link(tmp_path) is None
    assert broken_link(tmp_path / "nothing") is None
    (tmp_path / "dangling").symlink_to("nowhere")
    assert "'nowhere', which is not there" in broken_link(tmp_path / "dangling")
    (tmp_path / "loop").symlink_to("loop")
    assert "circle" in broken_link(tmp_path / "loop")


def test_brief_is_one_line_and_bounded():
    assert brief("a\nb\u2028c\udcff") == "a\\nb\\u2028c\\udcff"
    assert len(brief("é" * 5000)) == 120
