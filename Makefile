# make demo   sample the bundled model with MAR, LazyMAR and the presets, compare them
# make test   the tests that need minutes on a CPU at most
# make lint   ruff and mypy
# Each creates the virtual environment it needs. PYTHON names the interpreter, 3.10 or newer.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.installed
DEMO := demo
IMAGES := 50
DRAW = $(PY) eval.py --model mar_tiny --num_images $(IMAGES) --eval_bsz 50 --threads 2 --output_dir $(DEMO)

.PHONY: demo test test-slow test-gpu test-browser lint

$(READY): requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $(PYTHON) is older than Python 3.10; say make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

demo: $(READY)
	$(DRAW)
	$(DRAW) --lazy_mar
	$(DRAW) --preset balanced
	$(DRAW) --preset fast
	$(PY) -m util.report $(DEMO)/mar_tiny-mar-* $(DEMO)/mar_tiny-lazy_mar-* $(DEMO)/mar_tiny-balanced-* $(DEMO)/mar_tiny-fast-* \
		--sheet $(DEMO)/sheet.png --table $(DEMO)/table.md

test: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile  # one thread each: the models are tiny

test-slow: $(READY)
	$(PY) -m pytest -q -m slow

test-gpu: $(READY)
	$(PY) -m pytest -q -m gpu -p tests.support.gpu_table  # under 8 minutes; a table of what passed

test-browser: $(READY)  # Chromium comes from the system, such as apt-get install chromium
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[demo,browser]'
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -m browser

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
