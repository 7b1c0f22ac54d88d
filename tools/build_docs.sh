#!/usr/bin/env bash
# Builds the manual, docs/ by mkdocs.yml, as pages that need no network and no server. A warning is an error.
#
#   bash tools/build_docs.sh            into site/: open site/index.html
#   bash tools/build_docs.sh FOLDER     into another folder, which is emptied
set -euo pipefail
out=$(realpath --canonicalize-missing "${1:-site}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH=$PWD/.venv/bin:$PATH
export NO_MKDOCS_2_WARNING=1 # advertisement on standard output
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# Without --quiet, which hides warnings from --strict, too.
python -m mkdocs build --strict --clean --site-dir "$out" >"$log" 2>&1 || { cat "$log" >&2 && exit 1; }
echo "$out/index.html"
