# Everything runs where FEniCSx is: in the current Python if it has it, otherwise in the private environment (container/run).
# FENICSX=0.11 make ... uses the second environment.

RUN := container/run
PYTEST := python3 -P -m pytest
MPI = $(RUN) timeout --kill-after=10 1800 mpirun -n

.PHONY: help demo test test-long test-1 test-2 test-3 test-demos lint bench doctor shell

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*##/ { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo:  ## the aquifer: an unknown field, 60 wells, a posterior (a minute)
	@$(RUN) python3 -P demos/demo_aquifer.py

test: lint test-2 test-3 test-demos test-1  ## lint, tests on 1, 2 and 3 ranks, demos on 1 and 2

lint:  ## ruff and mypy
	@$(RUN) bash -c 'ruff check && ruff format --check && mypy'

test-1:
	@echo "Tests on 1 rank"
	@$(RUN) timeout --kill-after=10 1800 $(PYTEST) -n auto --maxprocesses=4 --ignore=tests/test_demos.py

# Three ranks are there for ranks that own nothing and ranks that are no neighbours: a third of the rows of each table show that.
test-3: SAMPLE = --sample-rows
test-2 test-3: test-%:
	@echo "Tests on $* ranks"
	@$(MPI) $* $(PYTEST) -m "mpi and not long" $(SAMPLE)

test-demos:
	@echo "Demos on 1 and 2 ranks"
	@$(RUN) timeout --kill-after=10 1800 $(PYTEST) -n 2 tests/test_demos.py -k "not two_ranks"
	@$(RUN) timeout --kill-after=10 1800 $(PYTEST) tests/test_demos.py -k two_ranks

test-long:  ## the tests that take minutes, all rows on 3 ranks
	@$(RUN) timeout --kill-after=10 7200 $(PYTEST) -m long
	@$(MPI) 2 $(PYTEST) -m "mpi and long"
	@$(MPI) 3 $(PYTEST) -m "mpi"

# Three ranks on two cores: one that waits lets another work. (Sleeping while it waits takes nearly twice as long where cores are free.)
test-3 test-long: export OMPI_MCA_mpi_yield_when_idle = 1

bench:  ## benchmarks, against floors and other packages; for a quiet machine
	@for each in tests/benchmarks/bench_*.py; do $(RUN) python3 -m tests.benchmarks.$$(basename $$each .py) || exit 1; done
	@$(MPI) 2 python3 -m tests.benchmarks.bench_scaling
	@$(RUN) python3 -m tests.benchmarks.peers

doctor:  ## what this machine has, and what will hurt
	@$(RUN) fem-vi doctor

shell:  ## a shell in the environment
	@$(RUN) bash
