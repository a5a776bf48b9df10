# Every target installs what it needs first; .venv/installed is made anew when the lock or pyproject.toml changes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install llama data train evaluate infer report chat serve export test test-slow test-browser test-export test-faults \
  audit lint format lock wheel clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(VENV)/installed: requirements.lock pyproject.toml scripts/install.sh
	PYTHON=$(PYTHON) sh scripts/install.sh $(VENV)

install: $(VENV)/installed ## create .venv with everything in it

$(VENV)/share/llama.cpp/installed: $(VENV)/installed scripts/install_llama_cpp.sh
	PYTHON=$(PYTHON) sh scripts/install_llama_cpp.sh $(VENV)

llama: $(VENV)/share/llama.cpp/installed ## build llama.cpp into .venv, for GGUF and Ollama exports (minutes)

data: $(VENV)/installed ## report on the embedded preference set (ARGS="data.path=pairs.jsonl" on your own)
	$(BIN)/python -m fitness_dpo.inspect_data $(ARGS)

train: $(VENV)/installed ## train the quickstart recipe (ARGS="lora.r=32 ..." changes settings)
	$(BIN)/python -m fitness_dpo.train $(if $(findstring resume=,$(ARGS)),,experiment=quickstart) $(ARGS)

evaluate: $(VENV)/installed ## is the newest run better than its base? (ARGS="gate.enabled=true" fails where it is not)
	$(BIN)/python -m fitness_dpo.evaluate $(ARGS)

infer: $(VENV)/installed ## ask the newest run: make infer Q="How often should I train legs?"; without Q, talk with it
	@if [ -n "$$Q" ]; then printf '%s\n' "$$Q" | $(BIN)/python -m fitness_dpo.infer $(ARGS); \
	else $(BIN)/python -m fitness_dpo.infer $(ARGS); fi

chat: $(VENV)/installed ## open a web page to talk with the newest run, on this machine at port 7860
	$(BIN)/python -m fitness_dpo.chat $(ARGS)

serve: $(VENV)/installed ## serve the newest run over the OpenAI API, on this machine at port 8000, under /v1
	$(BIN)/python -m fitness_dpo.serve $(ARGS)

export: $(VENV)/installed ## turn the newest run into a model for other programs (ARGS="format=gguf"; gguf and ollama want make llama)
	$(BIN)/python -m fitness_dpo.export $(ARGS)

report: $(VENV)/installed ## write the newest run's report.html, print its path and open it where there is a desktop (ARGS="run=...")
	@page=$$($(BIN)/python -m fitness_dpo.report $(ARGS)) && echo "$$page" && \
	if [ -n "$$DISPLAY$$WAYLAND_DISPLAY" ] && command -v xdg-open >/dev/null; then xdg-open "$$page"; fi

test: $(VENV)/installed ## lint, type-check and run the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/installed ## the tests that install a wheel, run the notebook or need long (one in Chromium)
	$(BIN)/python -m pytest -m slow

test-browser: $(VENV)/installed ## the pages in Chromium (/usr/bin/chromium)
	$(BIN)/python -m pytest -m browser

test-export: $(VENV)/share/llama.cpp/installed ## GGUF and Ollama exports, asked through llama.cpp
	$(BIN)/python -m pytest -m slow tests/test_gguf.py

test-faults: $(VENV)/installed ## kill, damage, fill and cut off real runs (docs/reliability.md)
	$(BIN)/python -m pytest -m faults -s

audit: $(VENV)/installed ## look for known vulnerabilities in the pinned packages, and for secrets in the files
	$(BIN)/pip-audit --strict --requirement requirements.lock --no-deps --disable-pip
	$(BIN)/detect-secrets-hook $$(git ls-files)

format: $(VENV)/installed ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: ## pin every dependency anew (wants uv)
	uv pip compile pyproject.toml $(foreach extra,chat dev judge optuna serve tensorboard,--extra $(extra)) --overrides requirements/overrides.txt --excludes requirements/excludes.txt \
	  --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-emit-package torch --no-annotate --upgrade \
	  --custom-compile-command 'make lock' -o requirements.lock

wheel: $(VENV)/installed ## build dist/*.whl, settings and data inside
	$(BIN)/python -m build --wheel --no-isolation

clean: ## remove the environment and build outputs (runs in outputs/ stay)
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
