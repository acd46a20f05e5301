"""Draws the pictures of the README into ``docs/images`` (or a folder named): ``python docs/make_pictures.py [folder]``.

Each is what the command beneath it gives: ``retensor plan densenet121 --scratchpad M_H --picture``, ``--report`` of the
same plan as a headless chromium shows it, and ``retensor sweep densenet121 --picture``. The growth curve is drawn from
the results of ``retensor claims large``. The dark ones differ in ink.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import retensor as rt
from benchmarks import claim_large
from retensor.cli import run
from retensor.planning import plot_plan, plot_sweep, read_plan, sweep

MODEL, SCRATCHPAD = "densenet121", "M_H"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def draw(folder: Path) -> None:
    """Write all pictures into ``folder``."""
    graph = rt.graph.load(MODEL)
    with tempfile.TemporaryDirectory() as scratch:
        plan_file, page = Path(scratch) / "plan.json", Path(scratch) / "report.html"
        command = ["plan", MODEL, "--scratchpad", SCRATCHPAD, "-o", str(plan_file), "--report", str(page)]
        if run([*command, "--picture", str(folder / f"plan-{MODEL}.svg")]):
            raise SystemExit("the plan of the pictures failed")
        plot_plan(folder / f"plan-{MODEL}-dark.svg", graph, read_plan(plan_file), dark=True)
        if run(["sweep", MODEL, "--picture", str(folder / f"sweep-{MODEL}.svg")]):
            raise SystemExit("the sweep of the pictures failed")
        title = f"{graph.name}: off-chip traffic by scratchpad"
        plot_sweep(folder / f"sweep-{MODEL}-dark.svg", sweep(graph), title=title, dark=True)
        photograph(page, folder)
    claim_large.draw(claim_large.measured(), folder)


def photograph(page: Path, folder: Path) -> None:
    """Show the report in a headless browser, light and dark."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print("no chromium here: report-light.png and report-dark.png are left as they are", file=sys.stderr)
        return
    for theme in ("light", "dark"):
        subprocess.run(
            [
                browser,
                *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
                *("--disable-dev-shm-usage", "--hide-scrollbars", f"--user-data-dir={page.parent / 'profile'}"),
                *("--force-device-scale-factor=1", "--window-size=1280,1440", "--virtual-time-budget=3000"),
                f"--screenshot={folder / f'report-{theme}.png'}",
                f"{page.as_uri()}#{theme}",
            ],
            check=True,
            capture_output=True,
            timeout=120,
        )


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "images"
    target.mkdir(parents=True, exist_ok=True)
    draw(target)
