# What one would otherwise type. Every target works on a fresh machine with make and Python 3.11, 3.12 or
# 3.13; it makes its own virtual environment the first time and leaves the system alone.
#
#   make plan     plan a real network with the base install (no torch): table, plan.json, report.html
#   make test     lint, types, and every test, in an environment with torch
#   make claims   the paper's claims, measured here; writes benchmarks/results/ and CLAIMS.md
#   make pictures the pictures of the README, drawn anew from the commands beneath them
#   make lint     ruff and mypy alone
#   make format   let ruff rewrite what it can
#   make clean    remove what these targets made

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
BASE := .venv-plan
MODEL ?= densenet121
SCRATCHPAD ?= M_H
JOBS ?= 2

# An interpreter that is new enough, may be named from outside: make test PYTHON=/opt/python3.12/bin/python3
PYTHON ?=

# Finds such an interpreter, one that can make an environment first, and makes the environment in $(1).
define make_venv
	@say() { echo "make: $$*" >&2; }; \
	new_enough='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; \
	found=; bare=; \
	for python in $(or $(PYTHON),python3.11 python3.12 python3.13 python3); do \
	  "$$python" -c "$$new_enough" 2>/dev/null || continue; \
	  if "$$python" -c 'import ensurepip, venv' 2>/dev/null; then found="$$python"; break; fi; \
	  bare="$${bare:-$$python}"; \
	done; \
	if [ -n "$$found" ]; then say "making $(1) with $$found"; "$$found" -m venv $(1); \
	elif [ -n "$$bare" ] && "$$bare" -c 'import virtualenv' 2>/dev/null; then \
	  say "making $(1) with virtualenv of $$bare"; "$$bare" -m virtualenv --quiet $(1); \
	elif [ -n "$$bare" ]; then \
	  say "$$bare cannot make virtual environments; run 'apt install python3-venv' or 'pip install --user virtualenv', then make again"; \
	  exit 1; \
	else \
	  say "no Python 3.11, 3.12 or 3.13 found; run 'apt install python3 python3-venv', or give PYTHON=..., then make again"; \
	  exit 1; \
	fi; \
	touch $(1)/.made-by-make; echo '*' > $(1)/.gitignore
endef

PIP := -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: help
help:
	@sed -n 's/^#   //p' Makefile

$(VENV)/bin/python:
	$(call make_venv,$(VENV))

$(BASE)/bin/python:
	$(call make_venv,$(BASE))

# The stamps are newer than what was installed from; an environment that is already there is kept.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "make: installing retensor[all,dev] into $(VENV)" >&2
	$(VENV)/bin/python $(PIP) --editable '.[all,dev]'
	@touch $@

$(BASE)/.installed: pyproject.toml constraints.txt | $(BASE)/bin/python
	@echo "make: installing retensor into $(BASE)" >&2
	$(BASE)/bin/python $(PIP) --editable .
	@touch $@

.PHONY: plan
plan: $(BASE)/.installed
	$(BASE)/bin/retensor plan $(MODEL) --scratchpad '$(SCRATCHPAD)' -o plan.json --report report.html
	$(BASE)/bin/retensor verify plan.json $(MODEL)
	$(BASE)/bin/retensor run plan.json $(MODEL)

.PHONY: lint
lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

.PHONY: format
format: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# The base environment is tested from the other one: it has no pytest, and no torch. Each worker has one core, so that
# torch's threads do not wait for each other.
.PHONY: test
test: $(VENV)/.installed $(BASE)/.installed lint
	OMP_NUM_THREADS=1 RETENSOR_BASE_PYTHON='$(CURDIR)/$(BASE)/bin/python' $(VENV)/bin/python -m pytest -n $(JOBS) --timeout 900

.PHONY: claims
claims: $(VENV)/.installed
	$(VENV)/bin/retensor claims

.PHONY: pictures
pictures: $(VENV)/.installed
	$(VENV)/bin/python docs/make_pictures.py

# An environment that something else made is not ours to remove.
.PHONY: clean
clean:
	for venv in $(VENV) $(BASE); do if [ -e $$venv/.made-by-make ]; then rm -rf $$venv; fi; done
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis src/*.egg-info plan.json report.html plan.svg
	find src tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +
