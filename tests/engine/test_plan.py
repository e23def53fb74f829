"""Planning many runs reads what they share once."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tests.engine.conftest import Commands

# Snakemake's own dry run; on the last line, how often each file of the project and of the models was opened
COUNTED = """
import collections, json, sys
opened = collections.Counter()
def hook(event, arguments):
    if event == "open":
        opened[str(arguments[0])] += 1
sys.addaudithook(hook)
from snakemake.cli import main
try:
    main(["--configfile", sys.argv[1], "-n", "--quiet", "all"])
except SystemExit as ended:
    assert not ended.code, ended.code
print()
print(json.dumps({name: n for name, n in opened.items() if name.startswith(tuple(sys.argv[2:]))}))
"""


def planned(checkout: Commands, models: Path, n: int) -> tuple[int, Counter]:
    """How many jobs a plan for n models has, and how often each file is opened to make it."""
    notebooks = sorted(path.stem for path in (checkout.root / "notebooks").glob("[0-9]*.ipynb"))
    runs = {}
    for i in range(n):
        folder = models / f"model-{i}"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"number": i}))
        (folder / "model.safetensors").write_bytes(bytes([i]) * 100)
        runs[folder.name] = {notebook: {"model": str(folder)} for notebook in notebooks}
    plan = models / f"{n}.json"
    plan.write_text(json.dumps({"runs": runs}))
    command = [sys.executable, "-c", COUNTED, str(plan), *(f"{root}/" for root in (checkout.root, models))]
    environment = os.environ | {"PYTHONPATH": str(checkout.root), "PYTHONDONTWRITEBYTECODE": "1"} | checkout.environment
    ended = subprocess.run(command, cwd=checkout.root, env=environment, capture_output=True, text=True, check=True)
    said = (ended.stdout + ended.stderr).splitlines()
    jobs = int(next(line.split()[1] for line in said if line.startswith("notebook ")))
    return jobs, Counter(json.loads(ended.stdout.splitlines()[-1]))


def test_what_runs_share_is_read_once(checkout: Commands, tmp_path: Path):
    """Notebooks and modules as often for a hundred models as for one, and each model's files once."""
    (one_jobs, one), (many_jobs, many) = (planned(checkout, tmp_path, n) for n in (1, 100))
    assert many_jobs == 100 * one_jobs == 100 * len(list((checkout.root / "notebooks").glob("[0-9]*.ipynb")))
    shared = {name for name in many if name.startswith(f"{checkout.root}/") and name.endswith((".ipynb", ".py"))}
    assert len(shared) > 60  # fourteen notebooks, and the modules that they import
    assert {name: many[name] for name in shared} == {name: one[name] for name in shared}
    assert {many[name] for name in shared if name.endswith(".ipynb")} == {1}
    own = {name: count for name, count in many.items() if name.startswith(f"{tmp_path}/model-")}
    assert len(own) == 200 and set(own.values()) == {1}
