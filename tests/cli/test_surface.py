"""``import retensor`` is light, and the public names are there when asked for."""

import subprocess
import sys

import pytest

import retensor as rt

HEAVY = ("torch", "torchvision", "timm", "onnx", "onnxruntime", "ortools", "matplotlib", "numba", "joblib")


def modules_after(code):
    """Which of the heavy packages are loaded after ``code`` ran in a fresh interpreter."""
    script = f"{code}\nimport sys\nprint(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import retensor",
        "import retensor; retensor.__version__; retensor.errors.PlanError; retensor.InfeasibleError",
        "import retensor.cli.app",
        "from retensor.cli import run; run(['-h']); run(['plan', '-h'])",
        "from retensor.cli import run; run(['plan', 'm.onnx', '--scratchpad', 'M_R', '-o', '/no/such/folder/p.json'])",
    ],
)
def test_nothing_heavy_is_loaded_before_it_is_needed(code):
    assert modules_after(code) == set()


@pytest.mark.parametrize(
    "code", ["import retensor.graph", "import retensor.planning", "import retensor as rt; rt.plan"]
)
def test_graph_and_planning_load_no_torch(code):
    assert not modules_after(code) & {"torch", "torchvision", "timm"}


def test_planning_an_onnx_model_loads_no_torch():
    code = "from retensor.cli import run; assert run(['bounds', 'onnx:squeezenet', '--time-limit', '5']) == 0"
    assert not modules_after(code) & {"torch", "torchvision", "timm"}


def test_every_public_name_resolves_and_no_other():
    for name in rt.__all__:
        assert getattr(rt, name) is not None
        assert name in dir(rt)
    assert rt.plan is rt.planning.plan
    assert rt.Accelerator is rt.planning.Accelerator
    assert callable(rt.plan)
    assert callable(rt.graph.load)
    with pytest.raises(AttributeError, match="nonsense"):
        rt.nonsense  # noqa: B018


@pytest.mark.parametrize(
    "name",
    [
        "bounds",
        "plan",
        "baseline",
        "verify",
        "execute",
        "sweep",
        "write_plan",
        "read_plan",
        "write_report",
        "plot_plan",
    ],
)
def test_planning_offers_each_verb_as_a_function(name):
    assert callable(getattr(rt.planning, name))


def test_errors_share_one_base():
    for name in ("GraphError", "PlanError", "InfeasibleError", "MissingExtraError"):
        assert issubclass(getattr(rt, name), rt.RetensorError)
