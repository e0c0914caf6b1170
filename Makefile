PYTHON ?= python3
BIN := .venv/bin
QUICK := house data reader splits atomic metrics iou_stats

.PHONY: study test check site outputs
study: .venv/installed
	@echo 'Where the truth is known (drawn worlds, two tiny backbones, five or ten seeds; kept in results/calibration):'
	$(BIN)/wikichurches_calibrate results/calibration
	@echo 'The demonstration, trained here:'
	$(BIN)/wikichurches_study

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile tests

# stored outputs, as `make outputs NB=nbs/index.ipynb`: executed in a fresh kernel, figures as SVG or JPEG
outputs: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/jupyter nbconvert --to notebook --execute --inplace $(NB) \
	  --ExecutePreprocessor.extra_arguments="--IPKernelApp.exec_lines=from ssl_wikichurches.attention.plots import sharp_figures; sharp_figures()"
	$(BIN)/nbdev_clean

# the site, in _docs/, with explorer and report of the demonstration; Quarto has to be installed
site: study
	$(BIN)/wikichurches_explore runs/demo --folder --out nbs/demo
	cp runs/demo/report.html nbs/demo/report.html
	$(BIN)/nbdev_docs

# the daily loop, about a minute: modules as the notebooks say, rules of the house, quick tests, and the notebooks that differ from the last commit
check: .venv/installed
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile $(QUICK:%=tests/test_%.py)
	for n in $$(git diff --name-only --diff-filter=d HEAD -- 'nbs/*.ipynb'; git ls-files -o --exclude-standard -- 'nbs/*.ipynb'); do \
	  OMP_NUM_THREADS=1 $(BIN)/nbdev_test --path $$n || exit 1; done

.venv/installed: settings.ini setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@
