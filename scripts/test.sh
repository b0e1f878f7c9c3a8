#!/usr/bin/env bash
# All set-up, then lint, types and the fast tests. Arguments go to pytest: scripts/test.sh -m slow
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
"$venv/bin/ruff" check rnn2bin tests scripts
"$venv/bin/mypy" rnn2bin
export OMP_NUM_THREADS=1  # two workers on two cores: more threads would only get in each other's way
"$venv/bin/python" -m pytest -n 2 "$@"
