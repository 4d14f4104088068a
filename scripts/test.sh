#!/usr/bin/env bash
# Install what the tests need into .venv, lint, check types and run the tests.
# --slow includes the long ones; other arguments go to pytest:
#   bash scripts/test.sh tests/test_model.py -k chunked
# A file of tests runs in one process, several files side by side (-n 0: one after another).
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements.txt requirements-eval.txt requirements-test.txt

chosen=(-m "not slow")
[ "${1:-}" = --slow ] && { chosen=(); shift; }
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
.venv/bin/python -m pyright
exec .venv/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile \
    --no-loadscope-reorder "${chosen[@]}" "$@"
