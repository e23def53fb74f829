# One rule: source notebook -> executed notebook in book/runs/<run>/ and its tables in results/<run>/.
#
# `snakemake --cores 2` brings the default run up to date, `snakemake -n` says what is out of date and why.
# `sinkstudy run` checks what it is given and calls the same with a plan, which it leaves in
# book/runs/.work/<run>.plan.json; Snakemake takes it by itself with --configfile, on a cluster with `--executor slurm`.
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

from filelock import FileLock, Timeout

from sinkstudy.book import engine

RUN = config.get("run", engine.DEFAULT_MODEL)
PLAN = config.get("notebooks") or {name: {} for name in engine.notebooks()}
STAMP = f".snakemake/executed/{RUN}/{{notebook}}"
ALONE = FileLock(engine.WORK / f"{RUN}.plan.lock")


def digest(kind):
    return lambda w: f"{kind} {engine.fingerprint(w.notebook, PLAN[w.notebook])[kind]}"


for notebook in PLAN:
    if not engine.is_whole(RUN, notebook):
        (engine.ROOT / STAMP.format(notebook=notebook)).unlink(missing_ok=True)

if started_by := os.environ.pop("SINKSTUDY_ENGINE", ""):
    engine.end_with(int(started_by))


onstart:
    try:
        ALONE.acquire(timeout=5)  # what a killed command has started takes two seconds to end
    except Timeout:
        busy = f"another process executes the run {RUN}: wait for it, or give this one another name (--name)"
        sys.exit(f"sinkstudy: {busy}")


rule all:
    input:
        expand(STAMP, notebook=PLAN),


rule notebook:
    input:
        # those whose results it reads: they come before it
        lambda w: [
            STAMP.format(notebook=other)
            for other in engine.read_by(w.notebook, RUN, PLAN[w.notebook])
            if other in PLAN
        ],
    output:
        touch(STAMP),
    params:
        parameters=lambda w: json.dumps(PLAN[w.notebook]),
        source=digest("source_sha256"),
        package=digest("package_sha256"),
        model=digest("model_sha256"),
        data=digest("data_sha256"),
    resources:
        gpu=lambda w: int(PLAN[w.notebook].get("device", "cpu") != "cpu"),
    shell:
        "exec {sys.executable:q} -m sinkstudy.book.engine {RUN} {wildcards.notebook} {params.parameters:q}"
