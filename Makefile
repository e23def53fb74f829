# make book: execute what is out of date, render _build/html/index.html     make test: all tests
# The stamp's name carries the content of the lock file: another lock, another stamp, pip runs again.
STAMP := .venv/installed-$(shell cat requirements.lock pyproject.toml | cksum | cut -d' ' -f1)
BIN := .venv/bin
JOBS ?= 2
WORKERS ?= 2

.PHONY: book full test bench lint clean check-fresh setup

# Two processes of one thread each, here and in `test`: the models are small, and two threads hardly help one of them.
book: export OMP_NUM_THREADS = 1
book: $(STAMP)
	$(BIN)/sinkstudy run --jobs $(JOBS)
	$(BIN)/sinkstudy book

# The run from which verdicts come, into results/lab-llava-full: one to two hours on two free cores, 2 MB to commit.
# Killed, it goes on with the chapters that were not finished; ONLY="01 08" executes some.
full: export OMP_NUM_THREADS = 1
full: $(STAMP)
	$(BIN)/sinkstudy run --full --jobs $(JOBS) $(addprefix --only ,$(ONLY))
	$(BIN)/sinkstudy check-full

# Notebooks are executed once here, by nbval; the pages for the browser tests show the stored outputs it compares.
# A file of tests, or a notebook, stays in one process.
test: export OMP_NUM_THREADS = 1
test: $(STAMP)
	$(BIN)/sinkstudy book --stored
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --nbval notebooks

bench: $(STAMP)
	$(BIN)/python bench/run.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

check-fresh: $(STAMP)
	$(BIN)/sinkstudy check-fresh

# Keeps .venv, weights, committed results, and executed runs of models other than the lab's.
clean:
	rm -rf _build book/runs/lab-llava book/runs/.work .pytest_cache .ruff_cache .mypy_cache .import_linter_cache sinkstudy.egg-info
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

setup: $(STAMP)

$(STAMP):
	@PYTHON='$(PYTHON)' .ci/setup $@
