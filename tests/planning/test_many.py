"""Many plans at once: in processes, on a cluster, killed and started again, two at once; always the same plans."""

import functools
import json
import os
import random
import re
import select
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
from retensor.planning import many, peak, verify
from retensor.planning.cache import PlanCache
from retensor.planning.many import How, solve_all
from retensor.planning.planfile import plan_from_json
from retensor.planning.progress import Clock
from retensor.planning.solver import cp_model
from retensor.planning.sweep import sweep
from retensor.planning.tasks import BOUNDS_SCHEMA, BoundsTask, PlanTask

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


def test_each_of_many_jobs_searches_on_one_thread(monkeypatch):
    expected, threads = alone(), []

    def solve(solver, *arguments):
        threads.append(solver.parameters.num_workers)
        return real(solver, *arguments)

    real = cp_model.CpSolver.solve
    monkeypatch.setattr(cp_model.CpSolver, "solve", solve)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    # So that bounds ask CP-SAT too, and not plans alone.
    monkeypatch.setattr(peak, "SET_LIMITS", ())
    tasks = [BoundsTask(graph) for graph in small_graphs().values()]
    with joblib.parallel_config(backend="threading"):
        assert len(list(solve_all(tasks, How(10.0, 2), Clock(60.0), lambda index: None))) == len(tasks)
        assert threads
        assert figures(together(jobs=2)) == expected
    assert set(threads) == {1}


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
import json, os, sys
from retensor.graph.json import read_graph
from retensor.planning.sweep import sweep
graph = read_graph(sys.argv[1])
def told():
    return json.loads(sys.stdin.readline() or "[0, null]")
def stand(what):
    global goal, place
    sys.stderr.write(f"{done} {what}\\n")
    sys.stderr.flush()
    while what == place and done >= goal:
        goal, place = told()
def tell(state):
    global done
    done = state.done
    stand(state.stage)
def write(handle, real=os.fsync):
    real(handle)
    stand("writing")
os.fsync = write
print("ready", flush=True)
goal, place = told()
rows = sweep(graph, cache=sys.argv[2], progress=tell, **json.loads(sys.argv[3]))
print(json.dumps([[r.scratchpad_bytes, r.parameters, r.status, r.non_compulsory_bytes, r.bound_bytes, r.cached]
                  for r in rows]))
"""


class Sweep:
    """A sweep in a process group of its own, which stands still where it was told to and says how far it is."""

    def __init__(self, graph_file, folder, **options):
        self.said, self.reports = [], []
        # Unbuffered: what was not read yet is still there for whoever reads next.
        self.process = subprocess.Popen(
            [sys.executable, "-c", SWEEP, str(graph_file), str(folder), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def go(self, plans=0, place=None):
        """Let it go on until so many plans are done, those from the cache among them; or to the end.

        There it stands still: ``"planning"`` before the next is begun, ``"writing"`` with the next half on disk.
        """
        self.process.stdin.write(json.dumps([plans, place]).encode() + b"\n")

    def hear(self):
        """The next line it says; that is a report where nothing went wrong."""
        line = self.process.stderr.readline()
        self._note(line)
        assert line, "".join(self.said)

    def hear_of(self, plans, place="planning"):
        """Wait until it is at a place, or not at all where the plans are fewer than none."""
        while plans >= 0 and (plans, place) not in self.reports:
            self.hear()

    def wait_a_little(self, dice):
        """For some part of a plan, or until the next report: nothing rests on how long."""
        select.select([self.process.stderr], [], [], dice.uniform(0, 0.02))

    def kill(self):
        """Kill all its processes; how many bounds and how many plans it had reported as done."""
        os.killpg(self.process.pid, signal.SIGKILL)
        # The end of the pipe comes when the last of them is gone.
        for line in self.process.stderr.read().splitlines(keepends=True):
            self._note(line)
        assert self.process.wait() == -signal.SIGKILL
        return [max([0, *(done for done, what in self.reports if what == stage)]) for stage in ("bounds", "planning")]

    def rows(self):
        """The rows, once it has finished."""
        out, errors = self.process.communicate(timeout=PATIENCE)
        assert self.process.returncode == 0, errors.decode()
        return json.loads(out)

    def _note(self, line):
        self.said.append(line.decode())
        if report := re.fullmatch(r"(\d+) (.+)\n", self.said[-1]):
            self.reports.append((int(report[1]), report[2]))


@pytest.fixture
def start(graph_file):
    """Starts sweeps of the ladder, each as soon as it is about to plan; none outlives the test."""
    started = []

    def start(folder, **options):
        started.append(Sweep(graph_file, folder, **options))
        assert started[-1].process.stdout.readline() == b"ready\n"
        return started[-1]

    yield start
    for each in started:
        with each.process as process:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


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


BOTH = {"parameters": [False, True]}


def ladder(graph_file, **options):
    """What :data:`SWEEP` prints, planned here."""
    rows = sweep(read_graph(graph_file), **options)
    return [[r.scratchpad_bytes, r.parameters, r.status, r.non_compulsory_bytes, r.bound_bytes, r.cached] for r in rows]


def results(rows):
    """All but whether they came from the cache."""
    return [row[:5] for row in rows]


def names(rows):
    """What tells the plans of one graph from each other."""
    return {(row[0], row[1]) for row in rows}


def files(folder):
    return {path for path in folder.rglob("*") if path.is_file()}


def rubbish(folder):
    return {path for path in files(folder) if path.name.startswith(".")}


def whole_plans(graph, folder, rows):
    """Of the plans in ``rows`` those in ``folder`` that no search would improve; each is replayed."""
    store = PlanCache(folder)
    found = {}
    for size, parameters in names(rows):
        task = PlanTask(graph, size, 1, parameters)
        kept = store.find(task)
        if kept and store.serves(task, kept, 60.0):
            verify(graph, kept.answer)
            found[size, parameters] = kept.answer.non_compulsory_bytes
    return found


def whole_bounds(graph, folder):
    """How many of the bounds without and with parameters are in ``folder``; their schedules are replayed."""
    return sum(PlanCache(folder).find(BoundsTask(graph, 1, parameters)) is not None for parameters in (False, True))


def assert_none_is_broken(graph, folder):
    """Whatever bears the name of an answer holds a whole one."""
    for path in files(folder) - rubbish(folder):
        form = json.loads(path.read_bytes())
        if form["schema"] != BOUNDS_SCHEMA:
            verify(graph, plan_from_json(form))


@pytest.mark.parametrize(("jobs", "kills"), [(1, 8), (2, 4)])
def test_a_sweep_killed_at_random_moments_loses_no_finished_plan_and_leaves_no_broken_file(
    jobs, kills, graph_file, start, tmp_path
):
    graph, options = read_graph(graph_file), {"points": 40, **BOTH}
    expected = ladder(graph_file, **options)
    assert {row[2] for row in expected} == {"optimal"}
    folder = tmp_path / "killed"
    dice = random.Random(jobs)
    before = {}
    for kill in range(kills):
        process = start(folder, jobs=jobs, **options)
        goal = min(len(before) + dice.randint(1, 8), len(expected) - 1)
        # It has just told of a plan, so that nothing could be kept later; or writes one, where that is its own process;
        # or is anywhere from before the bounds to some plans later.
        place = ("planning", None, "writing" if jobs == 1 else None)[kill % 3]
        process.go(goal, place or "planning")
        if place:
            process.hear_of(goal, place)
        else:
            process.hear_of(dice.randint(len(before) - 1, goal))
            process.wait_a_little(dice)
        bounded, planned = process.kill()
        # What bears the name of a plan is whole, what was there is there still, and so is all that was said to be done.
        assert_none_is_broken(graph, folder)
        now = whole_plans(graph, folder, expected)
        assert before.items() <= now.items()
        assert len(now) >= planned
        assert whole_bounds(graph, folder) >= bounded
        before = now
    assert len(before) >= kills // 3
    assert kills // 3 * (jobs == 1) <= len(rubbish(folder)) <= kills * jobs
    for path in rubbish(folder):
        os.utime(path, (0, 0))
    rows = ladder(graph_file, cache=folder, **options)
    assert results(rows) == results(expected)
    # Each plan that was finished is used and not made again.
    assert names(row for row in rows if row[5]) == before.keys()
    # One file for each plan and for the bounds of either setting, and nothing else.
    assert len(files(folder)) == len(rows) + 2


def test_two_sweeps_that_meet_use_what_the_other_found(graph_file, start, tmp_path):
    folder, ahead = tmp_path / "shared", 6
    expected = ladder(graph_file, points=40)
    assert len(expected) > 2 * ahead
    # One goes down from the largest scratchpad, the other up from the smallest.
    both = [start(folder, points=40), start(folder, accelerators=[row[0] for row in expected[::-1]])]
    for process in both:
        process.go(ahead, "planning")
    for process in both:
        process.hear_of(ahead)
    # Both have begun and neither has finished.
    for process in both:
        process.go()
    down, up = [process.rows() for process in both]
    assert results(down) == results(up[::-1]) == results(expected)
    for rows in (down, up):
        assert not any(row[5] for row in rows[:ahead])
        assert all(row[5] for row in rows[-ahead:])
    assert len(files(folder)) == len(expected) + 1


def test_two_sweeps_that_plan_the_same_at_the_same_time_agree(graph_file, start, tmp_path):
    folder, options = tmp_path / "shared", {"points": 16, **BOTH}
    expected = ladder(graph_file, **options)
    both = [start(folder, **options) for _ in range(2)]
    # They begin together, bounds too, and neither goes on to the next plan without the other.
    for done in range(len(expected)):
        for process in both:
            process.go(done, "planning")
        for process in both:
            process.hear_of(done)
    for process in both:
        process.go()
    for process in both:
        assert results(process.rows()) == results(expected)
    assert len(files(folder)) == len(expected) + 2
    assert all(row[5] for row in ladder(graph_file, cache=folder, **options))


def test_a_sweep_is_not_harmed_where_another_beside_it_is_killed(graph_file, start, tmp_path):
    graph, options, kills = read_graph(graph_file), {"points": 40, **BOTH}, 6
    expected = ladder(graph_file, **options)
    folder = tmp_path / "shared"
    dice = random.Random(5)
    before = {}
    living = start(folder, **options)
    for _ in range(kills):
        both = [living, start(folder, **options)]
        for process in both:
            process.go(len(before), "planning")
        for process in both:
            process.hear_of(len(before))
        # From here they search for the same plans at the same time, until one of them is killed. The next then begins
        # where the other has just planned, or has a plan half on disk.
        goal, place = len(before) + dice.randint(2, 8), dice.choice(["planning", "writing"])
        assert goal < len(expected)
        killed, living = dice.sample(both, 2)
        killed.go(goal, "planning")
        living.go(goal, place)
        killed.hear_of(dice.randint(len(before), goal))
        killed.wait_a_little(dice)
        _, planned = killed.kill()
        assert planned <= goal
        living.hear_of(goal, place)
        assert_none_is_broken(graph, folder)
        now = whole_plans(graph, folder, expected)
        assert before.items() <= now.items()
        # All that either said to be done, and they do it in order.
        assert now.keys() == names(expected[:goal])
        before = now
    living.go()
    assert results(living.rows()) == results(expected)
    assert_none_is_broken(graph, folder)
    assert len(rubbish(folder)) <= kills
    # One that was killed may have left what was there beside what it put in its place.
    assert 0 <= len(files(folder) - rubbish(folder)) - len(expected) - 2 <= kills
    again = ladder(graph_file, cache=folder, **options)
    assert results(again) == results(expected)
    assert all(row[5] for row in again)


@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_gives_the_rows_that_are_done_and_keeps_them(jobs, graph_file, start, tmp_path):
    folder, options = tmp_path / "plans", {"points": 60, **BOTH}
    process = start(folder, jobs=jobs, **options)
    process.go()
    process.hear_of(3)
    # A terminal sends it to all processes of the group.
    os.killpg(process.process.pid, signal.SIGINT)
    rows = process.rows()
    done = whole_plans(read_graph(graph_file), folder, rows)
    # All but those that were under way, which are kept as the best so far.
    assert len(rows) - jobs <= len(done) <= len(rows) < 2 * options["points"]
    again = ladder(graph_file, cache=folder, **options)
    assert names(row for row in again if row[5]) == done.keys()


def test_a_second_ctrl_c_does_not_wait(tmp_path, graph_file):
    interrupt = "progress=lambda state: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]"
    script = "import os, signal\n" + SWEEP.replace("progress=tell", interrupt)
    done = subprocess.run(
        [sys.executable, "-c", script, str(graph_file), str(tmp_path / "plans"), '{"points": 9}'],
        input="",
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
