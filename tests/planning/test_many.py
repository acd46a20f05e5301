"""Many plans at once: in processes, on a cluster, killed and started again, two at once; always the same plans."""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import joblib
import pytest
from tests.planning.layered import layered_graph

from retensor.errors import RetensorError
from retensor.graph import Graph, Operator, Tensor
from retensor.graph.json import read_graph, write_graph
from retensor.planning import many, verify
from retensor.planning.cache import PlanCache
from retensor.planning.many import How, solve_all
from retensor.planning.progress import Clock
from retensor.planning.sweep import sweep
from retensor.planning.tasks import PlanTask

PATIENCE = 120


class Unpicklable:
    """Stands for a program, which may hold what no other process can have."""

    def __reduce__(self):
        raise AssertionError("the program was sent to another process")


def small_graphs():
    dice = random.Random(3)
    graphs = [layered_graph(dice, 9) for _ in range(4)]
    return {
        f"net{i}": Graph(g.name, g.operators, g.tensors, g.outputs, program=Unpicklable()) for i, g in enumerate(graphs)
    }


def figures(rows):
    """What must not depend on where rows were planned."""
    return [
        (r.model, r.accelerator, r.parameters, r.status, r.non_compulsory_bytes, r.bound_bytes, r.error) for r in rows
    ]


@functools.cache
def alone():
    return figures(sweep(small_graphs(), ["M_P", "M_H", "M_R", "0.5*M_R"], parameters=(False, True)))


def together(**options):
    return sweep(small_graphs(), ["M_P", "M_H", "M_R", "0.5*M_R"], parameters=(False, True), **options)


def test_some_rows_move_bytes_and_some_do_not_fit():
    assert any(row[4] for row in alone())
    assert {row[3] for row in alone()} == {"optimal", "infeasible"}


def test_two_processes_give_the_rows_of_one_in_its_order(tmp_path):
    assert figures(together(jobs=2)) == alone()
    assert figures(together(jobs=2, cache=tmp_path)) == alone()
    assert {row.cached for row in together(cache=tmp_path) if row.plan} == {True}


@pytest.mark.parametrize("backend", ["loky", "threading", "multiprocessing"])
def test_the_same_call_runs_on_any_backend_of_joblib(backend, tmp_path):
    # multiprocessing, like Ray's backend, gives its results at the end only.
    with joblib.parallel_config(backend=backend, n_jobs=2):
        assert figures(together(cache=tmp_path)) == alone()
    assert {row.cached for row in together(cache=tmp_path) if row.plan} == {True}


@pytest.mark.parametrize("processes", [False, True])
def test_the_same_call_runs_on_a_dask_cluster(processes, tmp_path):
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=processes,
            dashboard_address=None,
            **({"host": "127.0.0.1"} if processes else {}),
            local_directory=tmp_path / "dask",
        ) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config(backend="dask"),
    ):
        rows = together(cache=tmp_path / "plans")
    assert figures(rows) == alone()
    assert {row.cached for row in rows} == {False}
    assert {row.cached for row in together(cache=tmp_path / "plans") if row.plan} == {True}


def test_what_a_worker_could_not_keep_is_kept_by_who_asked(tmp_path, monkeypatch):
    store = PlanCache(tmp_path)
    store.prepare()
    home = os.getpid()
    tasks = [PlanTask(graph, 1000) for graph in small_graphs().values()]
    bare = [PlanTask(Graph(t.graph.name, t.graph.operators, t.graph.tensors, t.graph.outputs), 1000) for t in tasks]
    # Threads of this process stand for machines that have another disk.
    real = PlanCache.keep

    def elsewhere(self, task, answer, time_limit):
        if many.threading.current_thread() is not many.threading.main_thread():
            raise RetensorError("no such disk")
        return real(self, task, answer, time_limit)

    monkeypatch.setattr(PlanCache, "keep", elsewhere)
    with joblib.parallel_config(backend="threading"):
        done = dict(solve_all(bare, How(10.0, 2, store), Clock(60.0), lambda index: None))
    assert os.getpid() == home
    assert sorted(done) == list(range(len(bare)))
    for index, answer in done.items():
        assert store.find(bare[index]).answer == answer.value


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_cache_that_cannot_be_written_to_is_a_sentence(jobs, tmp_path, monkeypatch):
    def full(*arguments):
        raise RetensorError("cannot write 'plan': no space left on device; name a file elsewhere or make room")

    monkeypatch.setattr(PlanCache, "keep", full)
    with joblib.parallel_config(backend="threading"), pytest.raises(RetensorError, match="no space left"):
        together(jobs=jobs, cache=tmp_path)


def test_a_sweep_that_is_done_starts_no_process(tmp_path, monkeypatch):
    together(cache=tmp_path)
    monkeypatch.setattr(many, "_solve_apart", None)
    assert figures(together(cache=tmp_path, jobs=2)) == alone()


@dataclass(frozen=True)
class Fatal:
    """A task that kills the process it runs in, unless that is the test's."""

    home: int
    key: str = "f" * 32

    def solve(self, time_limit, workers, progress):
        assert os.getpid() != self.home
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_a_sentence():
    tasks = [joblib.wrap_non_picklable_objects(Fatal(os.getpid()))] * 2
    with pytest.raises(RetensorError, match="a worker process was killed, perhaps for want of memory"):
        list(solve_all(tasks, How(10.0, 2), Clock(60.0), lambda index: None))
    # The next call starts new ones.
    assert figures(together(jobs=2)) == alone()


SWEEP = """
import json, sys
from retensor.graph.json import read_graph
from retensor.planning.sweep import sweep
graph = read_graph(sys.argv[1])
print("ready", flush=True)
rows = sweep(graph, points=int(sys.argv[3]), parameters=(False, True), cache=sys.argv[2], jobs=int(sys.argv[4]),
             progress=lambda state: print(state.done, state.total, file=sys.stderr, flush=True))
print(json.dumps([[r.scratchpad_bytes, r.parameters, r.status, r.non_compulsory_bytes, r.bound_bytes, r.cached]
                  for r in rows]))
"""


def start(graph_file, folder, points, jobs=1):
    """A sweep in a process group of its own, as soon as it is about to plan."""
    process = subprocess.Popen(
        [sys.executable, "-c", SWEEP, str(graph_file), str(folder), str(points), str(jobs)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "ready\n"
    return process


def finished(process):
    out, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    return json.loads(out)


@pytest.fixture
def graph_file(tmp_path):
    """A ladder of skips that cross, with parameters: every budget takes a search of some milliseconds."""
    dice = random.Random(11)
    tensors, operators, made = [Tensor("in", 900, "input")], [], ["in"]
    for i in range(14):
        inputs = tuple(dict.fromkeys([made[-1], dice.choice(made[-5:])]))
        tensors += [Tensor(f"t{i}", dice.randint(300, 999)), Tensor(f"w{i}", dice.randint(10, 99), "parameter")]
        operators.append(Operator(f"op{i}", "Mix", (*inputs, f"w{i}"), (f"t{i}",)))
        made.append(f"t{i}")
    path = tmp_path / "ladder.json"
    write_graph(Graph("ladder", operators, tensors, made[-1:]), path)
    return path


def plan_files(folder):
    return {path for path in folder.rglob("*.json") if not path.name.startswith(".")}


def ladder(graph_file, points, **options):
    """What :data:`SWEEP` prints, planned here."""
    rows = sweep(read_graph(graph_file), points=points, parameters=(False, True), **options)
    return [[r.scratchpad_bytes, r.parameters, r.status, r.non_compulsory_bytes, r.bound_bytes, r.cached] for r in rows]


def whole_plans(graph, folder, rows):
    """Of the plans in ``rows`` those in ``folder`` that no search would improve; each is replayed."""
    store = PlanCache(folder)
    found = {}
    for size, parameters in {(row[0], row[1]) for row in rows}:
        task = PlanTask(graph, size, 1, parameters)
        kept = store.find(task)
        if kept and store.serves(task, kept, 60.0):
            verify(graph, kept.answer)
            found[size, parameters] = kept.answer.non_compulsory_bytes
    return found


@pytest.mark.parametrize(("jobs", "kills"), [(1, 7), (2, 4)])
def test_a_sweep_killed_at_random_moments_loses_no_finished_plan_and_leaves_no_broken_file(
    jobs, kills, graph_file, tmp_path
):
    graph, points = read_graph(graph_file), 40
    expected = ladder(graph_file, points)
    assert {row[2] for row in expected} == {"optimal"}
    folder = tmp_path / "killed"
    dice = random.Random(jobs)
    before = {}
    for _ in range(kills):
        process = start(graph_file, folder, points, jobs)
        # Anywhere from the first lookup to some plans later, told by reports of progress and not by a clock.
        for _ in range(dice.randint(0, 60)):
            process.stderr.readline()
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        # What bears the name of a plan is whole, and what was there is there still.
        for path in plan_files(folder):
            json.loads(path.read_bytes())
        now = whole_plans(graph, folder, expected)
        assert before.items() <= now.items()
        before = now
    assert before
    rubbish = {path for path in folder.rglob(".*") if path.is_file()}
    assert len(rubbish) <= kills * jobs
    for path in rubbish:
        os.utime(path, (0, 0))
    rows = ladder(graph_file, points, cache=folder)
    assert [row[:5] for row in rows] == [row[:5] for row in expected]
    # Each plan that was finished is used and not made again.
    assert {(row[0], row[1]) for row in rows if row[5]} == before.keys()
    # One file for each plan and for the bounds of either setting, and nothing else.
    assert len([path for path in folder.rglob("*") if path.is_file()]) == len(rows) + 2


def test_two_sweeps_at_once_share_the_cache_and_agree(graph_file, tmp_path):
    folder, points = tmp_path / "shared", 60
    both = [start(graph_file, folder, points) for _ in range(2)]
    rows = [finished(process) for process in both]
    assert [row[:5] for row in rows[0]] == [row[:5] for row in rows[1]]
    assert len([path for path in folder.rglob("*") if path.is_file()]) == len(rows[0]) + 2
    assert all(row[5] for row in ladder(graph_file, points, cache=folder))


@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_gives_the_rows_that_are_done_and_keeps_them(jobs, graph_file, tmp_path):
    folder, points = tmp_path / "plans", 60
    process = start(graph_file, folder, points, jobs)
    while not (line := process.stderr.readline()).startswith("3 "):
        assert line
    # A terminal sends it to all processes of the group.
    os.killpg(process.pid, signal.SIGINT)
    rows = finished(process)
    done = whole_plans(read_graph(graph_file), folder, rows)
    # All but those that were under way, which are kept as the best so far.
    assert len(rows) - jobs <= len(done) <= len(rows) < 2 * points
    again = ladder(graph_file, points, cache=folder)
    assert {(row[0], row[1]) for row in again if row[5]} == done.keys()


def test_a_second_ctrl_c_does_not_wait(tmp_path, graph_file):
    told = "print(state.done, state.total, file=sys.stderr, flush=True)"
    script = "import os, signal\n" + SWEEP.replace(told, "[os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]")
    done = subprocess.run(
        [sys.executable, "-c", script, str(graph_file), str(tmp_path / "plans"), "9", "1"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert "KeyboardInterrupt" in done.stderr
    assert done.stdout == "ready\n"


def test_a_stopped_clock_begins_nothing_more():
    clock = Clock(60.0)
    tasks = [PlanTask(graph, 1000) for graph in small_graphs().values()]
    answers = solve_all(tasks, How(10.0, 1), clock, lambda index: None)
    assert next(answers)[0] == 0
    clock.stop()
    assert list(answers) == []


def test_what_an_interrupted_search_found_serves_only_shorter_ones(tmp_path):
    graph = next(iter(small_graphs().values()))
    store = PlanCache(tmp_path)
    store.prepare()

    class Interrupted(PlanTask):
        def solve(self, time_limit, workers, progress):
            found = super().solve(time_limit, workers, progress)
            signal.raise_signal(signal.SIGINT)
            return found

        def proved(self, answer):
            return False

    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        begun = time.monotonic()
        task = Interrupted(graph, 1000)
        answer = many.solve(task, store, 60.0)
        spent = time.monotonic() - begun
    finally:
        signal.signal(signal.SIGINT, before)
    kept = store.find(task)
    assert kept.answer == answer.value
    assert 0 < kept.time_limit <= spent < 60.0
    assert not store.serves(task, kept, 60.0)
