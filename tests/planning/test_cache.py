"""Answers on disk: nothing good is lost, nothing wrong comes out, and nothing is left lying about."""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from tests.planning.random_graphs import random_graph

from retensor.errors import PlanError, RetensorError
from retensor.graph import Graph, Operator, Tensor
from retensor.planning import bounds, cache, tasks
from retensor.planning.cache import STALE_SECONDS, PlanCache, cache_folder
from retensor.planning.tasks import BoundsTask, PlanTask, peak_bytes

TENSORS = [Tensor("x", 4, "input"), Tensor("a", 4), Tensor("b", 6), Tensor("c", 4), Tensor("y", 4)]
OPERATORS = [
    Operator("f", "F", ("x",), ("a",)),
    Operator("g", "G", ("a",), ("b",)),
    Operator("h", "H", ("b",), ("c",)),
    Operator("k", "K", ("a", "c"), ("y",)),
]
GRAPH = Graph("skip", OPERATORS, TENSORS, ["y"])
TASK = PlanTask(GRAPH, 12)


@pytest.fixture
def store(tmp_path):
    found = PlanCache(tmp_path / "plans")
    found.prepare()
    return found


@pytest.fixture(scope="module")
def best():
    return TASK.solve(10.0, 1, None)


def files(store):
    return [path for path in store.folder.rglob("*") if path.is_file()]


def test_a_kept_plan_comes_back_equal_and_under_the_name_of_who_asks(store, best):
    assert store.find(TASK) is None
    assert not store.holds(TASK)
    assert store.keep(TASK, best, 10.0).answer == best
    assert store.holds(TASK)
    assert store.find(TASK).answer == best
    renamed = replace(TASK, graph=Graph("other", OPERATORS, TENSORS, ["y"], options={"fuse": True}))
    found = store.find(renamed).answer
    assert (found.graph_name, found.graph_options) == ("other", {"fuse": True})
    assert replace(found, graph_name="skip", graph_options={}) == best


def test_kept_bounds_come_back_equal(store):
    task = BoundsTask(GRAPH, alignment=4)
    found = task.solve(10.0, 1, None)
    store.keep(task, found, 10.0)
    assert store.find(task).answer == found


def test_a_proved_plan_serves_any_time_limit_and_another_only_those_up_to_its_own(store, best):
    kept = store.keep(TASK, replace(best, bound_bytes=0, seconds=99.0), 5.0)
    assert store.serves(TASK, kept, 5.0)
    assert store.serves(TASK, kept, 1.0)
    assert not store.serves(TASK, kept, 5.1)
    kept = store.keep(TASK, best, 2.0)
    assert TASK.proved(kept.answer)
    assert store.serves(TASK, kept, 1e9)
    # What the longer search found no better is known to have been searched for that long.
    assert kept.time_limit == 5.0


@dataclass(frozen=True)
class Guess:
    """A task whose answers are two numbers, the less and the more the better."""

    key: str = "0" * 32

    def solve(self, time_limit, workers, progress):
        raise AssertionError

    def proved(self, answer):
        return answer[0] <= answer[1]

    def join(self, one, other):
        return (min(one[0], other[0]), max(one[1], other[1]))

    def write(self, answer):
        return {"found": answer[0], "bound": answer[1]}

    def read(self, form):
        if set(form) != {"found", "bound"}:
            raise PlanError("no guess")
        return form["found"], form["bound"]


def test_a_worse_answer_of_a_longer_search_loses_nothing(store):
    store.keep(Guess(), (70, 10), 5.0)
    assert store.keep(Guess(), (90, 20), 60.0).answer == (70, 20)
    found = store.find(Guess())
    assert (found.answer, found.time_limit) == ((70, 20), 60.0)
    assert len(files(store)) == 1


def test_of_two_plans_the_traffic_of_one_goes_with_the_bound_of_the_other(best):
    # At 13 bytes the plan of 12 is as good; pretend to a lower one by hand.
    low, high = replace(best, bound_bytes=0), replace(best, bound_bytes=best.non_compulsory_bytes, seconds=1e3)
    for joined in (TASK.join(low, high), TASK.join(high, low)):
        assert joined.non_compulsory_bytes == best.non_compulsory_bytes
        assert joined.status == "optimal"
        assert joined.seconds == low.seconds


def test_a_bound_above_what_a_plan_needs_is_not_believed(best):
    liar = replace(best, bound_bytes=best.non_compulsory_bytes + 1)
    assert TASK.join(replace(best, bound_bytes=0), liar).bound_bytes <= best.non_compulsory_bytes
    found = bounds(GRAPH)
    task = BoundsTask(GRAPH)
    assert task.join(found, replace(found, m_p=found.m_p + 9, m_p_bound=found.m_p + 5)).m_p_bound == found.m_p_bound


def test_files_that_are_cut_altered_or_another_tasks_are_absent_and_are_replaced(store, best):
    store.keep(TASK, best, 10.0)
    (path,) = files(store)
    whole = path.read_bytes()
    dice = random.Random(1)
    damages = [b"", whole[:-1], whole + b" ", b"\0" * len(whole), b"{}\n"]
    damages += [whole[: dice.randrange(len(whole))] for _ in range(20)]
    for _ in range(40):
        place = dice.randrange(len(whole))
        damages.append(whole[:place] + bytes([whole[place] ^ 1 << dice.randrange(8)]) + whole[place + 1 :])
    for damage in damages:
        path.write_bytes(damage)
        assert store.find(TASK) is None
        assert store.keep(TASK, best, 10.0).answer == best
        assert files(store) == [path]
        assert path.read_bytes() == whole
    # The name is part of what is checked: another key or a longer limit cannot be claimed.
    for name in (path.name.replace("-10.0-", "-99.0-"), path.name.replace(TASK.key, "0" * 32)):
        liar = path.parent / name
        path.rename(liar)
        assert store.find(TASK) is None
        liar.rename(path)
    assert store.find(TASK).answer == best


def test_neither_folders_nor_pipes_nor_links_in_place_of_a_file_stop_it(store, best):
    store.keep(TASK, best, 10.0)
    (path,) = files(store)
    path.unlink()
    os.mkfifo(path)
    assert store.find(TASK) is None
    path.unlink()
    path.mkdir()
    assert store.find(TASK) is None
    path.rmdir()
    path.symlink_to("nowhere")
    assert store.find(TASK) is None
    other = path.with_name(path.name.replace("-10.0-", "-9.0-"))
    other.mkdir()
    assert store.keep(TASK, best, 10.0).answer == best
    assert store.find(TASK).answer == best


def forged(store, task, form):
    """Put ``form`` into the cache under a name that is right for it."""
    content = json.dumps(form).encode()
    folder = store.folder / task.key[:2]
    folder.mkdir(exist_ok=True)
    path = folder / f"{task.key}-60.0-{cache._checksum(task.key, '60.0', content)}.json"
    path.write_bytes(content)
    return path


def test_a_forged_plan_that_breaks_a_rule_never_comes_out(store, best):
    sound = TASK.write(best)
    assert store.find(TASK) is None
    path = forged(store, TASK, sound)
    assert store.find(TASK).answer == best
    path.unlink()
    forgeries = []
    for i, stay in enumerate(sound["residencies"]):
        forgeries += [
            sound | {"residencies": [*sound["residencies"][:i], stay | change, *sound["residencies"][i + 1 :]]}
            for change in ({"address": 100}, {"to": stay["from"]}, {"tensor": "nobody"})
        ]
    forgeries += [sound | {"order": sound["order"][::-1]}, sound | {"transfers": []}, sound | {"parameters": True}]
    forgeries += [sound | {"accelerator": {"scratchpad_bytes": 11, "alignment": 1}}, [], {}, None, "plan", 7]
    forgeries += [sound | {"bound_bytes": 9, "gap": 0.0}, sound | {"fixed_order": True}]
    for forgery in forgeries:
        path = forged(store, TASK, forgery)
        assert store.find(TASK) is None, forgery
        path.unlink()
    forged(store, TASK, forgeries[0])
    store.keep(TASK, best, 1.0)
    assert len(files(store)) == 1
    assert store.find(TASK).answer == best


def test_forged_bounds_never_come_out(store):
    task = BoundsTask(GRAPH)
    sound = task.write(task.solve(10.0, 1, None))
    path = forged(store, task, sound)
    assert store.find(task).answer.m_p == 14
    path.unlink()
    for change in (
        {"m_p": 13},
        {"m_p": 15},
        {"m_r": 11},
        {"m_p_bound": 15},
        {"m_p_bound": 11},
        {"m_p_bound": True},
        {"order": ["f"]},
        {"order": ["g", "f", "h", "k"]},
        {"order": "fghk"},
        {"alignment": 2},
        {"parameters": True},
        {"m_h": 1},
        {"seconds": "1"},
        {"more": 1},
        {"schema": "retensor.plan/1"},
        {"graph": "0" * 64},
    ):
        path = forged(store, task, sound | change)
        assert store.find(task) is None, change
        path.unlink()


def test_whatever_decides_a_plan_is_in_its_key(monkeypatch):
    variants = [
        TASK,
        replace(TASK, scratchpad_bytes=13),
        replace(TASK, alignment=2),
        replace(TASK, parameters=True),
        replace(TASK, order="default"),
        replace(TASK, seed=1),
        replace(TASK, graph=Graph("skip", OPERATORS, [*TENSORS[:-1], Tensor("y", 5)], ["y"])),
        BoundsTask(GRAPH),
        BoundsTask(GRAPH, alignment=2),
    ]
    keys = [task.key for task in variants]
    assert len(set(keys)) == len(keys)
    assert PlanTask(GRAPH, 12).key == TASK.key
    monkeypatch.setattr(tasks, "_planner", lambda: "a better one")
    assert PlanTask(GRAPH, 12).key != TASK.key


def test_the_key_changes_with_any_source_of_the_planner(monkeypatch, tmp_path):
    shutil.copytree(Path(tasks.__file__).parent, tmp_path / "planning", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(tasks, "__file__", str(tmp_path / "planning" / "tasks.py"))
    before = tasks._planner.__wrapped__()
    assert before == tasks._planner.__wrapped__()
    with (tmp_path / "planning" / "search.py").open("a") as source:
        source.write("\n")
    assert tasks._planner.__wrapped__() != before


@pytest.mark.parametrize("seed", range(4))
def test_many_threads_that_keep_at_once_lose_nothing_and_leave_one_file(store, seed):
    dice = random.Random(seed)
    rounds = [[(dice.randint(50, 99), dice.randint(0, 49)) for _ in range(12)] for _ in range(8)]
    gate = threading.Barrier(8)

    def work(answers):
        gate.wait()
        best = None
        for answer in answers:
            best = store.keep(Guess(), answer, dice.choice([1.0, 60.0])).answer
            seen = store.find(Guess()).answer
            # What has been kept stays kept, whoever writes beside it.
            assert seen[0] <= best[0]
            assert seen[1] >= best[1]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, rounds))
    flat = [answer for answers in rounds for answer in answers]
    assert store.find(Guess()).answer == (min(a for a, _ in flat), max(b for _, b in flat))
    assert len(files(store)) == 1


def test_a_file_written_between_looking_and_writing_is_joined(store, monkeypatch):
    other = PlanCache(store.folder)
    real = store._write

    def late(target, content):
        monkeypatch.setattr(store, "_write", real)
        other.keep(Guess(), (60, 5), 2.0)
        real(target, content)

    monkeypatch.setattr(store, "_write", late)
    assert store.keep(Guess(), (70, 40), 1.0).answer == (60, 40)
    assert len(files(store)) == 1
    found = store.find(Guess())
    assert (found.answer, found.time_limit) == ((60, 40), 2.0)


def test_files_that_killed_writers_left_go_when_they_are_old_and_only_those(store):
    folder = store.folder / TASK.key[:2]
    folder.mkdir()
    stale, fresh, foreign, outside = (
        folder / f".{TASK.key}-60.0-a.abc",
        folder / f".{TASK.key}-60.0-b.abd",
        folder / ".notes",
        store.folder / f".{TASK.key}-60.0-c.abe",
    )
    for path in (stale, fresh, foreign, outside):
        path.write_text("half")
    old = time.time() - STALE_SECONDS - 5
    for path in (stale, foreign, outside):
        os.utime(path, (old, old))
    store.prepare()
    assert [path.exists() for path in (stale, fresh, foreign, outside)] == [False, True, True, True]


KILLED_WHILE_WRITING = """
import os, signal, sys
from retensor.graph.json import read_graph
from retensor.planning.cache import PlanCache
from retensor.planning.tasks import PlanTask
task = PlanTask(read_graph(sys.argv[1]), 12)
plan = task.solve(10.0, 1, None)
def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[3] == "written":
    os.fsync = die
elif sys.argv[3] == "renamed":
    os.replace = os.rename = die
else:
    real = os.fdopen
    def half(handle, mode):
        os.write(handle, b'{"schema": "retens')
        die()
    os.fdopen = half
PlanCache(sys.argv[2]).keep(task, plan, 10.0)
"""


@pytest.mark.parametrize("moment", ["half written", "written", "renamed"])
def test_a_writer_killed_at_its_worst_moment_leaves_no_plan_file_and_no_harm(store, best, moment, tmp_path):
    from retensor.graph.json import write_graph

    write_graph(GRAPH, tmp_path / "graph.json")
    arguments = [str(tmp_path / "graph.json"), str(store.folder), moment]
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, *arguments], capture_output=True, timeout=60)
    assert done.returncode == -9, done.stderr
    (left,) = files(store)
    assert left.name.startswith(".")
    assert store.find(TASK) is None
    assert store.keep(TASK, best, 10.0).answer == best
    os.utime(left, (0, 0))
    store.prepare()
    assert [path.name[0] for path in files(store)] == [TASK.key[0]]


@pytest.mark.parametrize("seed", range(150))
def test_the_peak_of_the_mpmf_schedule_is_m_p(seed):
    dice = random.Random(seed)
    graph, parameters, alignment = random_graph(dice), dice.random() < 0.5, dice.choice([1, 4])
    found = bounds(graph, parameters=parameters, alignment=alignment)
    assert max(found.m_r, peak_bytes(graph, found.order, parameters, alignment)) == found.m_p
    task = BoundsTask(graph, alignment, parameters)
    assert task.read(json.loads(json.dumps(task.write(found)))) == found


def test_folders_that_cannot_be_used_are_refused_in_a_sentence(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    for folder in (file, file / "below", "", "a\0b", "/proc/retensor", tmp_path / ("x" * 300)):
        with pytest.raises(RetensorError, match=r"cannot keep plans in '.*or keep none$"):
            PlanCache(folder).prepare()

    def denied(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache.tempfile, "TemporaryFile", denied)
    with pytest.raises(RetensorError, match="permission denied; name a folder elsewhere"):
        PlanCache(tmp_path / "locked").prepare()


def test_the_default_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("RETENSOR_CACHE", "/some/where")
    assert cache_folder() == Path("/some/where")
    monkeypatch.delenv("RETENSOR_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/retensor/plans")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/retensor/plans"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == Path.home() / "Library/Caches/retensor/plans"
