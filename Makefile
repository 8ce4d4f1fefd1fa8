PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
INSTALLED := $(VENV)/.installed
RUN := $(VENV)/bin/python
SAMSEG ?= .venv-samseg
SAMSEG_PYTHON ?= $(PYTHON)

COMPILE := uv pip compile --quiet --universal --python-version 3.10 --no-annotate --no-header pyproject.toml

.PHONY: help sample example-data perceptual-weights samseg tracking test test-slow lint docs lock clean
.DEFAULT_GOAL := help

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 21

$(INSTALLED): requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --requirement requirements.lock
	@touch $@

sample: $(INSTALLED) ## Sample one brain with the small model of this repository, into output/
	$(RUN) -m scripts sample --with demo --gender 1.0 --age 0.7 --ventricular_vol 0.7 --brain_vol 0.5

example-data: $(INSTALLED) ## Fetch openly licensed scans of real heads and prepare them, into dataset/
	$(RUN) -m scripts.tools.example_data

perceptual-weights: $(INSTALLED) ## Fetch the weights of the perceptual loss, into models/
	$(RUN) -m scripts.tools.perceptual_weights

tracking: $(INSTALLED) ## Add MLflow to the environment, for --tracking mlflow
	$(RUN) -m pip install --quiet --requirement requirements-tracking.lock

samseg: $(SAMSEG)/.installed ## Install samseg for --segment_with samseg, into .venv-samseg/ (Python 3.8 to 3.11)

$(SAMSEG)/.installed:
	@$(SAMSEG_PYTHON) -c "import sys; sys.exit(not (3, 8) <= sys.version_info < (3, 12))" \
	    || (echo "samseg needs Python 3.8 to 3.11: make samseg SAMSEG_PYTHON=python3.11" >&2; exit 1)
	$(SAMSEG_PYTHON) -m venv $(SAMSEG)
	$(SAMSEG)/bin/python -m pip install --quiet samseg==0.4a0 surfa==0.6.3 "numpy<2"
	@touch $@

test: $(INSTALLED) ## Run the tests that need no GPU, no network and little time
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal

test-slow: $(INSTALLED) ## Run the tests that take minutes of computing, but no GPU and no network
	$(RUN) -m pytest -m "slow and not gpu and not network"

lint: $(INSTALLED) ## Check style and types
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

docs: $(INSTALLED) ## Build the documents as a site to browse, into site/
	$(RUN) -m pip install --quiet --requirement requirements-docs.lock
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet --strict

lock: ## Write the lock files anew from pyproject.toml (needs uv)
	sed '/^[^#]/d' requirements.lock > requirements.new
	echo torch==2.13.0 | $(COMPILE) --extra preparation --extra download --extra export --extra page --extra collection --extra test --extra dev --constraint - > resolved.txt
	grep -vE '^(cuda|nvidia|triton)' resolved.txt >> requirements.new
	$(COMPILE) --extra tracking --constraint resolved.txt | grep -vxFf resolved.txt > tracking.txt
	sed '/^[^#]/d' requirements-tracking.lock > tracking.new
	cat tracking.txt >> tracking.new
	$(COMPILE) --extra docs --constraint resolved.txt | grep -vxFf resolved.txt > docs.txt
	sed '/^[^#]/d' requirements-docs.lock > docs.new
	cat docs.txt >> docs.new
	@rm resolved.txt tracking.txt docs.txt
	mv requirements.new requirements.lock
	mv tracking.new requirements-tracking.lock
	mv docs.new requirements-docs.lock

clean: ## Remove the environments and the caches; data, models and output stay
	rm -rf $(VENV) $(SAMSEG) .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
