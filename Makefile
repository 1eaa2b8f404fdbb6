# make demo    set up .venv, train on toy faces, say where to look
# make test    set up .venv, run the suite but its long tests, a process of one thread for each core, at most 8
# make soak    every fault many times, with a table of what was lost, and whatever else takes too long for every change
# make lint    ruff over everything
# make docs    write docs/flags.md from the flags

PYTHON ?= python3
PY = .venv/bin/python

.PHONY: demo test soak lint docs clean

demo: .venv/ready
	$(PY) main.py --dataset toy --imsize 32 --preset cpu --version demo --total_step 5000 --sample_step 250

test: .venv/ready-for-tests
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

soak: .venv/ready-for-tests
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal -m "soak or faults"

lint: .venv/ready-for-tests
	$(PY) -m ruff check .

docs: .venv/bin/python
	$(PY) docs/write_flags.py

clean:
	rm -rf .venv

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; name one: make demo PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/ready: requirements.txt .venv/bin/python
	$(PY) -m pip install --quiet -r requirements.txt
	@touch $@

.venv/ready-for-tests: tests/requirements.txt .venv/ready
	$(PY) -m pip install --quiet -r tests/requirements.txt
	@touch $@
