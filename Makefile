# Everything runs in .venv, which is made on first use. Stamps in it remember what is done, so that a second
# `make` starts at once. Constraints pin the tested versions; where pip is offered a CPU build of torch it is
# taken, elsewhere the default (CUDA) build of the same version is.

VENV := .venv
BIN := $(VENV)/bin
SMOKE := .wheel-smoke
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
NATIVE := $(wildcard setup.py quant/kernels/cpp/*)

# The first of these that is Python 3.11 or later; `make PYTHON=/path/to/python` overrides.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.PHONY: help demo test lint types wheel-smoke check clean

help:
	@echo "make demo         install into $(VENV) and run the whole path on the embedded model"
	@echo "make test         run all tests (ARGS='-k name' to choose)"
	@echo "make lint types   ruff and the layers (import-linter), mypy --strict"
	@echo "make wheel-smoke  build the wheel and try it in a clean environment, from another folder"
	@echo "make check        all of the above but the demo"

demo: $(VENV)/.installed
	$(BIN)/coldstream demo

# Two test processes with two threads each: a thread that waits must leave its core to the others.
test: $(VENV)/.installed-test
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q --durations=5 -n 2 --dist worksteal $(ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: $(VENV)/.installed-test
	$(BIN)/mypy

check: test lint types wheel-smoke

# The wheel is built from the sdist, so a file missing from either shows. The clean environment sees the big
# dependencies through a .pth line, which does not follow the editable install in there: coldstream itself
# comes from the wheel alone.
wheel-smoke: $(VENV)/.installed-test
	rm -rf $(SMOKE) && mkdir $(SMOKE)
	$(BIN)/python -m build --outdir $(SMOKE)/dist . >$(SMOKE)/log 2>&1 || { cat $(SMOKE)/log; exit 1; }
	$(BIN)/python -m venv --without-pip $(SMOKE)/venv
	$(BIN)/python -m pip --python $(SMOKE)/venv/bin/python --disable-pip-version-check install -q \
		--no-index --no-deps $(SMOKE)/dist/*.whl
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(SMOKE)/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
	cd / && "$(CURDIR)/$(SMOKE)/venv/bin/python" -I "$(CURDIR)/tests/packaging/smoke.py"
	rm -rf $(SMOKE)

clean:
	rm -rf $(VENV) $(SMOKE) build dist *.egg-info

define NO_PYTHON
coldstream needs Python 3.11 or later, found $(or $(shell $(or $(PYTHON),python3) --version 2>&1),none): \
install one, or point to it with 'make PYTHON=/path/to/python3.11'
endef
define NO_COMPILER
coldstream needs a C++ compiler, found no '$(CXX)': install one (Debian, Ubuntu: apt install g++; \
Fedora: dnf install gcc-c++), or name yours with 'make CXX=clang++'
endef
define NO_HEADERS
coldstream builds a native module, and $(PYTHON) has no Python.h: install its headers \
(Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel)
endef
define NO_VENV
$(PYTHON) cannot make a virtual environment: install that part of it (Debian, Ubuntu: apt install python3-venv)
endef

$(VENV)/.python:
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "$(strip $(NO_PYTHON))" >&2; exit 1; }
	@command -v $(firstword $(CXX)) >/dev/null || { echo "$(strip $(NO_COMPILER))" >&2; exit 1; }
	@test -f "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" \
		|| { echo "$(strip $(NO_HEADERS))" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "$(strip $(NO_VENV))" >&2; exit 1; }
	@touch $@

$(VENV)/.torch: $(VENV)/.python constraints.txt
	@echo "1/2 installing PyTorch into $(VENV): a few minutes, 1 to 5 GB …"
	@$(PIP) install -c constraints.txt torch==2.13.0
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml constraints.txt $(NATIVE)
	@echo "2/2 installing Coldstream and compiling its kernels: a minute or two …"
	@$(PIP) install -c constraints.txt -e .
	@touch $@

# Not after .installed: the native module would be built twice.
$(VENV)/.installed-test: $(VENV)/.torch pyproject.toml constraints.txt $(NATIVE)
	@echo "2/2 installing Coldstream with its test tools and compiling its kernels: a minute or two …"
	@$(PIP) install -c constraints.txt -e '.[test]'
	@touch $(VENV)/.installed $@
