# make demo   installs what it needs, then makes a 4D scene from a prompt (minutes on a CPU)
# make test   installs what it needs, then runs the tests
# make docs   installs what it needs, then writes the documentation's site, build/site; warnings are errors
# All can be repeated. PYTHON chooses the interpreter, PROMPT the prompt, ARGS adds key=value overrides.
PYTHON ?= python3
VENV ?= .venv
PROMPT ?= a panda dancing
ARGS ?=

.PHONY: demo test docs lint install lock clean

install: $(VENV)/.installed

# Hashes verify all packages but PyTorch, which may come from an index for the CPU (README, "Install").
$(VENV)/.installed: requirements.txt requirements.lock setup.py
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --no-deps --require-hashes -r requirements.lock
	$(VENV)/bin/python -m pip install --quiet -r requirements.txt
	$(VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# Writes requirements*.lock anew, for all systems and Python versions; needs uv (pip install uv).
lock:
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate requirements.txt \
	| awk '/^[a-z]/ { file = /^(torch=|nvidia-|cuda-)/ ? "requirements-cuda.lock" : "requirements.lock" } { print > file }'

demo: install
	$(VENV)/bin/python launch.py --config configs/shapes.yaml --train --prompt "$(PROMPT)" $(ARGS)

test: install
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 2 --dist worksteal

# Without the variable, the theme advertises in the log.
docs: install
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) build outputs
