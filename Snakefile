# One rule: source notebook -> executed notebook in book/runs/<run>/ and its tables in results/<run>/.
#
# `snakemake --cores 2` brings the default run up to date, `snakemake -n` says what is out of date and why.
# `sinkstudy run` checks what it is given and calls the same with a plan, which it leaves in book/runs/.work; Snakemake
# takes it by itself with --configfile: {"runs": {run: {notebook: parameters}}}. On a cluster: --workflow-profile
# profiles/slurm, see book/cluster.md.
#
# A notebook is out of date if its params are others than when it was executed: digests of its text, of the modules
# that it imports, and of the model, data and result files that its parameters name. Times of files play no part.
#
# To Snakemake the output is an empty stamp, for three reasons. It deletes the outputs of a job before it starts and
# after it fails, where old pages have to stay until new ones are whole. It takes an output of which it has no record
# for up to date, so the stamps lie beside its records and go with them. And it does not look into outputs, so the stamp
# of a page that is damaged, or whose tables are not those it made, is removed here. A job whose page follows from what
# is there all the same (what it reads was made again and did not change, say) ends at once, under --forceall too:
# delete a page to have it made again.
#
# profiles/default turns Snakemake's locks off: they outlive a killed process, and of two runs the first to end removes
# those of both. The system frees the lock taken here when its process ends, however that happens.
import json
import os
import sys
from functools import cache

from sinkstudy.book import engine

PLAN = config.get("runs") or {engine.DEFAULT_MODEL: {name: {} for name in engine.notebooks()}}
STAMP = ".snakemake/executed/{run}/{notebook}"
TAKEN = []


def given(w):
    return PLAN[w.run][w.notebook]


def digest(kind):
    return lambda w: f"{kind} {engine.KINDS[kind](w.notebook, given(w))}"


@cache
def asks(run, notebook):
    of = PLAN[run][notebook]
    return engine.asks(notebook, of, config.get("memory_mb", {}).get(of.get("model"), 0))


def asked(what):
    return lambda w: asks(w.run, w.notebook)[what]


if workflow.is_main_process:  # not in a job of its own, on a cluster
    for run, notebooks in PLAN.items():
        for notebook in notebooks:
            stamp = engine.ROOT / STAMP.format(run=run, notebook=notebook)
            if stamp.exists() and not engine.is_whole(run, notebook):
                stamp.unlink(missing_ok=True)

if started_by := os.environ.pop("SINKSTUDY_ENGINE", ""):
    engine.end_with(int(started_by))


onstart:
    try:
        TAKEN.extend(map(engine.taken, PLAN))
    except engine.UserError as problem:
        sys.exit(f"sinkstudy: {problem}")


rule all:
    input:
        [STAMP.format(run=run, notebook=notebook) for run, notebooks in PLAN.items() for notebook in notebooks],


rule notebook:
    input:
        # those whose results it reads: they come before it
        lambda w: [
            STAMP.format(run=w.run, notebook=other)
            for other in engine.read_by(w.notebook, w.run, given(w))
            if other in PLAN[w.run]
        ],
    output:
        touch(STAMP),
    params:
        parameters=lambda w: json.dumps(given(w)),
        source=digest("source_sha256"),
        package=digest("package_sha256"),
        model=digest("model_sha256"),
        data=digest("data_sha256"),
    resources:
        mem_mb=asked("mem_mb"),
        runtime=asked("runtime"),
        gpu=asked("gpu"),
    shell:
        "exec {sys.executable:q} -m sinkstudy.book.engine {wildcards.run} {wildcards.notebook} {params.parameters:q}"
