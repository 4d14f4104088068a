#!/usr/bin/env bash
# Build the documentation into site/: docs/*.md and one API page per module, from its docstrings.
#   bash scripts/docs.sh           # build; a broken link fails
#   bash scripts/docs.sh serve     # show it on 127.0.0.1:8000 and follow edits
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements-docs.txt
export NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true  # advice to move to other programs
exec .venv/bin/python -m mkdocs "${1:-build}"
