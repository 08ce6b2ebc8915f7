# Set-up is done once, in .venv, and again when pyproject.toml, constraints.txt or
# requirements.lock change.
# `make help` lists the targets; ARGS goes to train.py: make demo ARGS="env=toy seed=3".

# The first that runs: a version manager may leave the name of a Python that is switched off.
PYTHON ?= $(shell for name in python3.11 python3.12 python3; do \
	$$name -c '' 2>/dev/null && command -v $$name && break; done)
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.set-up-done
PORT ?= 5000
ARGS ?=
WORKERS ?= 2
# Films of vlm-check: the parts of the picture move in all directions.
SCENES := toy/disc_anywhere,dmc/cartpole_swingup,dmc/reacher_easy,dmc/finger_spin,metaworld/drawer-close
# The agent that comes with the package: narrower than size=tiny, so that it has less than 4 MB.
SHIPPED := world_model.lower.hidden=64 world_model.upper.hidden=64 world_model.head_units=64 \
	world_model.ensemble.members=3 world_model.ensemble.hidden=64 finetune.agent_steps=3000
GL_PACKAGES := libegl1 libgl1 libgl1-mesa-dri

export MLFLOW_DISABLE_TELEMETRY := true

.DEFAULT_GOAL := help
.PHONY: help setup gl demo vlm-check lint test-fast test test-hard ui report play shipped doctor gpu-check format clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: setup ## set up, then train the demo (ARGS="env=toy seed=3" goes to train.py)
	$(PY) train.py $(ARGS)

vlm-check: setup ## measure a describer on 50 windows (ARGS="vlm=openai_server vlm.server.base_url=...")
	$(PY) -m mapo_lightning.quality data=demo data.root=data/vlm_check 'demo.scenes=[$(SCENES)]' \
		demo.clips_per_scene=5 demo.size=256 callbacks.quality=50 run_dir=runs/vlm_check $(ARGS)

lint: setup ## style and types: what pre-commit runs
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

test-fast: lint ## before a commit: lint, types and the quick tests (two minutes on two cores)
	$(PY) -m pytest -n $(WORKERS) -m 'not slow and not learning and not hard' \
		--ignore=tests/integration

test: lint ## before a pull request: lint, types and all tests, as CI runs them
	$(PY) -m pytest -n $(WORKERS) --dist loadgroup

test-hard: setup ## hours: trainings of five seeds that must learn, kills, memory, servers
	$(PY) -m pytest -n $(WORKERS) -m 'learning or hard' tests/learning tests/hard

ui: setup ## open the MLflow pages of the runs on 127.0.0.1 (PORT=5000)
	@test -f runs/mlflow.db || { echo "There are no runs yet: make demo" >&2; exit 1; }
	@$(PY) -c 'from mapo_lightning.tracking.mlflow_client import runs_page as page; \
		found = page("sqlite:///$(CURDIR)/runs/mlflow.db", "mapo", $(PORT)); \
		print("Open", found or "http://127.0.0.1:$(PORT)", "and stop with Ctrl-C.")'
	@$(VENV)/bin/mlflow ui --host 127.0.0.1 --port $(PORT) --workers 1 \
		--backend-store-uri "sqlite:///$(CURDIR)/runs/mlflow.db" \
		--default-artifact-root "$(CURDIR)/runs/artifacts"

report: setup ## tables and figures of runs, as a page (ARGS="runs/NAME ... out=DIR")
	@$(PY) -m mapo_lightning.report $(ARGS)

play: setup ## play with a model's dream in a browser (ARGS="checkpoint=runs/NAME/finetune/last.ckpt")
	@$(PY) -m mapo_lightning.play $(ARGS)

shipped: setup ## train and export the agent that is played where no checkpoint= is given (minutes)
	$(PY) train.py env=toy seed=0 run_dir=runs/shipped tracking.enabled=false $(SHIPPED)
	rm -rf mapo_lightning/playing/shipped
	$(PY) -m mapo_lightning.export checkpoint=runs/shipped/finetune/last.ckpt \
		out=mapo_lightning/playing/shipped

doctor: $(STAMP) ## check this machine; add the answer to a bug report
	@$(PY) -m mapo_lightning.doctor

gpu-check: $(STAMP) ## have a CUDA GPU prove itself, in eight minutes (ARGS="--quick"); writes gpu-check.md
	@$(PY) -m mapo_lightning.gpu_check $(ARGS)

format: $(STAMP) ## fix what ruff can fix
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean: ## remove caches and build folders; runs, data and .venv stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

setup: gl $(STAMP) ## virtual environment and system packages, where missing

$(STAMP): pyproject.toml constraints.txt requirements.lock
	@test -n "$(PYTHON)" || { echo "There is no python3: install Python 3.11 or 3.12." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is older than 3.11: give another, make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info >= (3, 13))' || { \
		echo "$(PYTHON) is newer than 3.12, and labmaze, which dm_control needs, has no wheel for it:" \
			"give another, make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments. Type this, then try again:" >&2; \
		echo "  sudo apt-get install -y $$(basename "$(PYTHON)")-venv" >&2; exit 1; }
	@test -x $(PY) || { echo "Making $(VENV) with $(PYTHON)"; "$(PYTHON)" -m venv $(VENV); }
	@echo "Installing the pinned set (a few minutes the first time)"
	@if [ "$$(uname -sm)" = "Linux x86_64" ]; then \
		$(PY) -m pip install --disable-pip-version-check --quiet --require-hashes --no-deps \
			--only-binary :all: -r requirements.lock; \
	else \
		echo "requirements.lock has hashes for Linux on x86-64 only: installing without hashes"; \
	fi
	$(PY) -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	@touch $@

# Rendering without a display needs EGL and GL, which are system libraries. GL=skip leaves them alone.
gl:
	@if [ "$(GL)" = skip ] || [ "$$(uname -s)" != Linux ]; then exit 0; fi; \
	if "$(PYTHON)" -c 'import ctypes; [ctypes.CDLL(n) for n in ("libEGL.so.1", "libGL.so.1")]' \
		2>/dev/null; then exit 0; fi; \
	if ! command -v apt-get >/dev/null; then \
		echo "libEGL.so.1 and libGL.so.1 are missing: install your system's EGL and Mesa packages" >&2; \
		echo "(or go without rendering: make GL=skip ...)." >&2; exit 1; \
	fi; \
	if [ "$$(id -u)" = 0 ]; then as_root=; \
	elif sudo -n true 2>/dev/null; then as_root="sudo -n"; \
	else \
		echo "Rendering needs system packages. Type this, then try again:" >&2; \
		echo "  sudo apt-get update && sudo apt-get install -y $(GL_PACKAGES)" >&2; exit 1; \
	fi; \
	echo "Installing $(GL_PACKAGES)"; \
	$$as_root apt-get update -qq && \
	$$as_root env DEBIAN_FRONTEND=noninteractive \
		apt-get install -y -qq --no-install-recommends $(GL_PACKAGES)
