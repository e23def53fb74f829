# One rule: source notebook -> executed notebook (and, beside it, the tables under results/).
#
# Times of files play no part: what makes an executed notebook out of date is its fingerprint, digests of the notebook's
# text, its parameters, the modules it imports and the model, data and result files its parameters name. Input files are
# there for the order alone: a notebook that reads the results of others comes after them (and ends at once if they did
# not change).
# `sinkstudy run` passes the run's name and parameters; plain `snakemake --cores 1` brings the default run up to date.
# On a cluster: the same file with Snakemake's executor plugins, for example `--executor slurm`.
import json
import sys

from sinkstudy import engine

RUN = config.get("run", engine.DEFAULT_MODEL)
PLAN = config.get("notebooks") or {name: {} for name in engine.notebooks()}


rule all:
    input:
        [f"book/runs/{RUN}/{notebook}.ipynb" for notebook in PLAN],


rule notebook:
    input:
        lambda w: [
            f"book/runs/{w.run}/{other}.ipynb"
            for other in engine.read_by(w.notebook, w.run, PLAN[w.notebook])
            if other in PLAN
        ],
    output:
        # kept until the new one is whole
        update("book/runs/{run}/{notebook}.ipynb"),
    params:
        fingerprint=lambda w: engine.fingerprint(w.notebook, PLAN[w.notebook]),
        parameters=lambda w: json.dumps(PLAN[w.notebook]),
    resources:
        gpu=lambda w: int(PLAN[w.notebook].get("device", "cpu") != "cpu"),
    shell:
        "{sys.executable} -m sinkstudy.book.engine {wildcards.run} {wildcards.notebook} {params.parameters:q}"
