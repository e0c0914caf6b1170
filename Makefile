PYTHON ?= python3
BIN := .venv/bin

.PHONY: study test
study: .venv/installed
	$(BIN)/wikichurches_study

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile tests

.venv/installed: settings.ini setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@
