# `make demo` and `make test` need only Python (>= 3.11), make and a package index: both build .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PEERS ?= .venv-peers
# Compiled programs are kept between runs and clones: the second run of anything starts faster.
export JAX_COMPILATION_CACHE_DIR ?= $(HOME)/.cache/sparse_jax/jax

.PHONY: demo test test-fast test-long test-matrix test-peers bench-peers bench-quality bench-extraction bench-sparse-coding lint bench-env clean

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,viz]"
	touch $@

# PyTorch, transformers' models and the peers: for the live comparisons only (the CPU build of torch where the index has one).
$(VENV)/.bench-ready: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch scikit-learn
	touch $@

demo: $(VENV)/.ready
	$(BIN)/python -m experiments.train_sae --out runs/demo --overwrite topk

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not long and not torch and not matrix" --durations 10

# The live comparison with PyTorch implementations, and what takes minutes of both cores.
test-long: $(VENV)/.bench-ready
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "long or torch" --durations 10

test-fast: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not long and not torch and not matrix and not browser"

# Every kind of dictionary on every mesh of eight fake devices, and runs that are killed at random instants.
test-matrix: $(VENV)/.ready
	$(BIN)/python -m pytest -m matrix --durations 10

bench-env: $(VENV)/.bench-ready

# The peers' own classes, in an environment of their own: they pin much. torchvision, which one of them asks for, does not
# fit the CPU build of torch, and then nothing of theirs can be imported.
$(PEERS)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]" torch sae-lens dictionary-learning scikit-learn spams-bin
	$(PEERS)/bin/python -m pip uninstall --quiet --yes torchvision
	touch $@

test-peers: $(PEERS)/.ready
	$(PEERS)/bin/python -m pytest -m torch tests/formats/test_peers.py tests/benchmarks/test_quality_peers.py tests/benchmarks/test_sparse_coding.py tests/connectors/test_linear_path_peers.py tests/connectors/test_clusters.py

# One training step against the peers' own: ratios, a minute or two each. Large pages for every contestant.
bench-peers: export GLIBC_TUNABLES = glibc.malloc.hugetlb=1
bench-peers: $(PEERS)/.ready
	$(PEERS)/bin/python -W ignore -m benchmarks.step_speed --architecture l1
	$(PEERS)/bin/python -W ignore -m benchmarks.step_speed --architecture l1 --width 256 --batch 1024
	$(PEERS)/bin/python -W ignore -m benchmarks.step_speed --architecture topk --width 256 --batch 1024
	$(PEERS)/bin/python -W ignore -m benchmarks.step_speed --architecture topk --features 16384 --repeats 3

# Quality of three libraries' trainers on the same activations: hours; what is done is in benchmarks/quality_results.
bench-quality: export GLIBC_TUNABLES = glibc.malloc.hugetlb=1
bench-quality: $(PEERS)/.ready
	$(PEERS)/bin/python -W ignore -m benchmarks.quality

# Activations at one layer against transformers cut off there and TransformerLens: ten minutes or so.
bench-extraction: export GLIBC_TUNABLES = glibc.malloc.hugetlb=1
bench-extraction: $(PEERS)/.ready
	$(PEERS)/bin/python -W ignore -m benchmarks.extraction

# The lasso against scikit-learn, SPAMS and FISTA in PyTorch: an hour or two; a cell that is run replaces its earlier figures.
bench-sparse-coding: export GLIBC_TUNABLES = glibc.malloc.hugetlb=1
bench-sparse-coding: $(PEERS)/.ready
	$(PEERS)/bin/python -W ignore -m benchmarks.sparse_coding

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV)
