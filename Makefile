# `make demo` and `make test` need only python3 and make: each sets up what it needs in .venv.
.DEFAULT_GOAL := help
.PHONY: help demo demo-kto test test-newest lint types check clean

PYTHON ?= python3
VENV := .venv
RUN := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(VENV)/bin/python
PYTEST_ARGS ?=

help:
	@echo "make demo    align a small diffusion language model and see what changed (about five minutes)"
	@echo "make demo-kto  the same from thumbs instead of pairs, by ELBO-KTO"
	@echo "make test    run the tests"
	@echo "make test-newest  run a part of them with the newest versions that are allowed"
	@echo "make check   lint, types and tests, as CI does"

# torch first and pinned: a plain requirement would take the newest build, with gigabytes of CUDA, on a machine without GPU
$(VENV)/.installed: pyproject.toml requirements.txt
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (a few minutes the first time) ..."
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" -c requirements.txt
	@touch $@

# DeepSpeed builds on a machine without a compiler for GPUs if it is told to build no kernels, and with torch in reach.
# Tests alone need it: whoever trains on GPUs installs it for these.
$(VENV)/.tests: $(VENV)/.installed requirements-deepspeed.txt requirements-eval.txt
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check setuptools wheel
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-deepspeed.txt
	@DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		--no-build-isolation deepspeed==0.19.8
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-eval.txt
	@touch $@

demo: $(VENV)/.installed
	$(RUN) examples/demo.py

demo-kto: $(VENV)/.installed
	$(RUN) examples/demo_kto.py

test: $(VENV)/.tests
	$(RUN) -m pytest -n 2 $(PYTEST_ARGS)

# What the versions of other libraries can break first. An environment over .venv, with what is newer there
NEWEST_TESTS := tests/test_trl_contract.py tests/test_trainers.py tests/test_head.py tests/test_gradients.py \
	tests/test_qlora.py tests/test_decoders.py \
	"tests/test_matrix.py::test_two_steps_are_those_of_one_process_in_float32[one]"

$(VENV)-newest/.installed: $(VENV)/.tests requirements-newest.txt
	@$(VENV)/bin/python -m venv $(VENV)-newest
	@below=$$($(VENV)/bin/python -c "import site; print(site.getsitepackages()[0])") && \
		echo "import site; site.addsitedir('$$below')" > $$(echo $(VENV)-newest/lib/python*/site-packages)/below.pth
	@$(VENV)-newest/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-newest.txt
	@touch $@

test-newest: $(VENV)-newest/.installed
	$(RUN:$(VENV)/%=$(VENV)-newest/%) -m pytest -n 2 $(NEWEST_TESTS) $(PYTEST_ARGS)

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.installed
	$(VENV)/bin/mypy

check: lint types test

clean:
	rm -rf $(VENV) $(VENV)-newest runs build dist *.egg-info
