# make venv     a virtual environment with everything, in .venv (made once; again when the requirements change)
# make demo     the main job: notebooks/00_quickstart.ipynb, executed; results in out/quickstart
# make test     all tests that need neither a GPU nor a browser
# make browser  the notebooks in JupyterLab in a headless Chromium
# make executors  a grid by a local Slurm (Debian's slurm-wlm and munge) and a local Ray
# make lint     ruff and the type checker
# make studies  the notebooks of the studies on this CPU; results in results/, tables and figures in out/
# make bench    benchmarks against other libraries, side by side in one run
# make gpu      what a machine with an NVIDIA GPU runs, with the Python that is there: make gpu PYTHON=python3

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
INSTALL := $(BIN)/uv pip install --python $(BIN)/python --compile-bytecode -c constraints.txt
export OMP_NUM_THREADS ?= 1

.PHONY: venv demo test suite signals browser executors lint studies bench gpu

venv: $(STAMP)

# pip fetches torch, for its settings say which build; uv installs all, in a quarter of the time.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("collie_lab needs Python 3.11 or newer, this is " + sys.version.split()[0] \
		+ ": make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip download --disable-pip-version-check -d .venv/wheels -c constraints.txt uv torch
	$(BIN)/python -m pip install --disable-pip-version-check --no-index --find-links .venv/wheels uv
	DS_BUILD_OPS=0 $(INSTALL) .venv/wheels/*.whl -e '.[dev,eval]'
	rm -r .venv/wheels
	@touch $@

# The demo is small: it runs on CPU cores wherever it is.
demo: $(STAMP)
	@mkdir -p out
	CUDA_VISIBLE_DEVICES= $(BIN)/papermill --cwd . notebooks/00_quickstart.ipynb out/00_quickstart.ipynb
	@echo && cat out/quickstart/table.md && echo && echo "notebook: out/00_quickstart.ipynb   results: out/quickstart"

test: suite
	@$(MAKE) --no-print-directory signals

suite: $(STAMP)
	$(BIN)/python -m pytest -m "not gpu and not signals and not browser and not executors" -n 3 --dist loadfile --no-loadscope-reorder

# Not beside the suite: one of them looks for what is left of all processes.
signals: $(STAMP)
	$(BIN)/python -m pytest -m signals

browser: $(STAMP)
	$(INSTALL) --quiet -e '.[browser]'
	$(BIN)/python -m pytest -m browser

executors: $(STAMP)
	$(INSTALL) --quiet -e '.[slurm,ray]'
	$(BIN)/python -m pytest -m executors tests/study

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

# The second measures times: it runs last.
studies: $(STAMP)
	@mkdir -p out
	for name in 01_memory_vs_model_size 03_optimizers_and_peft 04_pretraining 02_throughput; do \
		CUDA_VISIBLE_DEVICES= $(BIN)/papermill --cwd . notebooks/$$name.ipynb out/$$name.ipynb -p profile cpu || exit 1; done

bench: $(STAMP)
	$(BIN)/python benchmarks/cpu_training.py
	$(BIN)/python benchmarks/optimizers.py
	$(BIN)/python benchmarks/layouts.py
	$(BIN)/python benchmarks/launch.py

gpu:
	PYTHONPATH=. $(PYTHON) -m pytest tests/gpu
	PYTHONPATH=. $(PYTHON) benchmarks/optimizers.py
	PYTHONPATH=. $(PYTHON) benchmarks/gpu_training.py
	PYTHONPATH=. $(PYTHON) benchmarks/gpu_memory.py
