#!/usr/bin/env bash
# Builds the documentation's site with --strict into build/site (or the directory given); `serve` shows it at http://127.0.0.1:8000.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
"$venv/bin/python" -c "import mkdocs, material, mkdocstrings" 2>/dev/null ||
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "mkdocs-material>=9.6,<10" "mkdocstrings[python]>=0.29"
export NO_MKDOCS_2_WARNING=1
if [ "${1:-}" = serve ]; then
  exec "$venv/bin/python" -m mkdocs serve --dev-addr 127.0.0.1:8000
fi
"$venv/bin/python" -m mkdocs build --strict --site-dir "$(realpath -m "${1:-build/site}")"
