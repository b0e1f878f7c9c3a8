#!/usr/bin/env bash
# All set-up, then lint, types and the fast tests. Arguments go to pytest: scripts/test.sh -m slow
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
# What the service's tests start: a data base of their own, and (-m slow) a browser. Tests without them say so and are skipped.
if command -v apt-get > /dev/null && [ "$(id -u)" = 0 ]; then
  missing=()
  compgen -G "/usr/lib/postgresql/*/bin/initdb" > /dev/null || missing+=(postgresql)
  [ -x /usr/bin/chromium ] || missing+=(chromium)
  [ "${#missing[@]}" = 0 ] || { apt-get update -qq && apt-get install -y -qq "${missing[@]}"; } || echo "not installed: ${missing[*]}" >&2
fi
"$venv/bin/ruff" check rnn2bin tests scripts
"$venv/bin/mypy" rnn2bin
export OMP_NUM_THREADS=1  # two workers on two cores: more threads would only get in each other's way
"$venv/bin/python" -m pytest -n 2 "$@"
