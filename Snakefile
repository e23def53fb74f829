# One rule: source notebook -> executed notebook (and, beside it, the tables under results/).
#
# No input files and no times of files: what makes an executed notebook out of date is its fingerprint, digests of the
# notebook's text, its parameters, the modules it imports and the model and data files its parameters name.
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
    output:
        # kept until the new one is whole
        update("book/runs/{run}/{notebook}.ipynb"),
    params:
        fingerprint=lambda w: engine.fingerprint(w.notebook, PLAN[w.notebook]),
        parameters=lambda w: json.dumps(PLAN[w.notebook]),
    resources:
        gpu=lambda w: int(PLAN[w.notebook].get("device", "cpu") != "cpu"),
    shell:
        "{sys.executable} -m sinkstudy.engine {wildcards.run} {wildcards.notebook} {params.parameters:q}"
