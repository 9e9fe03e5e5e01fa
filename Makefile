# make test    lint, then all tests; those of the lab need root (two hosts as namespaces, nothing is installed on the machine's own)
# make demo    a migration between two hosts, to watch
# make lab     a shell on host a, with host b beside it (ssh b)
# make bench   times and sizes, ckpt against podman alone (make bench BENCH_ARGS=--help)
# make fuzz    every parser of what comes from outside, FUZZ_SECONDS (15) each, coverage-guided
# make lint

SHELL := /bin/bash
.ONESHELL:
.SHELLFLAGS := -euo pipefail -c
.SILENT:
.DEFAULT_GOAL := test
.PHONY: test lint demo lab bench fuzz

# The Python with all dependencies, made on first use outside the checkout.
PYTHON = python=$$(python3 .ci/venv)
PYTEST_ARGS ?=
# Tests of the lab wait more than they work, so more of them than there are processors.
PYTEST_WORKERS ?= $(shell echo $$(( $$(nproc) + 1 )))
BENCH_ARGS ?=
FUZZ_TARGETS ?=

lint:
	$(PYTHON)
	"$$python" -m ruff check .
	"$$python" -m mypy
	"$$python" -m mypy --strict --explicit-package-bases tests/lab/harness tests/lab/demo.py tests/bench tests/vm

# The man pages and the completions are tried with the programs that read them.
SHELLS = for program in man zsh fish; do command -v "$$program" >/dev/null || missing=1; done; [ -z "$${missing:-}" ] || [ "$$(id -u)" != 0 ] || \
	{ apt-get update -q; DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends man-db zsh fish; } </dev/null >&2

test: lint
	$(PYTHON)
	$(SHELLS)
	"$$python" -m tests.lab.harness prepare
	"$$python" -m tests.vm.harness prepare
	"$$python" -m pytest -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder --durations=40 tests/vm tests/lab tests/contract tests/unit tests/meta $(PYTEST_ARGS)

demo:
	$(PYTHON)
	"$$python" -m tests.lab.harness prepare
	"$$python" -m tests.lab.demo

lab:
	$(PYTHON)
	"$$python" -m tests.lab.harness prepare
	"$$python" -m tests.lab.harness shell

bench:
	python=$$(python3 .ci/venv bench)
	"$$python" -m tests.lab.harness prepare
	"$$python" -m tests.bench $(BENCH_ARGS)

fuzz:
	python=$$(python3 .ci/venv fuzz)
	"$$python" -m tests.lab.harness prepare
	"$$python" -m tests.fuzz $(FUZZ_TARGETS)
