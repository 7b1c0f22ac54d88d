#!/usr/bin/env bash
# Sets the checkout up where needed, then checks style and runs the tests, quick ones first. Ends with pytest's summary.
#
#   bash launch/test.sh                     everything
#   bash launch/test.sh --quick             without the tests marked slow, and without installing Slurm for them
#   bash launch/test.sh [--quick] tests/test_config.py -k hints       what follows goes to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

selection=()
with_slurm=1 # tests/cluster.py starts one of its own
if [ "${1:-}" = --quick ]; then
    selection=(-m "not slow")
    with_slurm=
    shift
fi

WITH_SLURM=${WITH_SLURM-$with_slurm} bash launch/install.sh
PATH=$PWD/.venv/bin:$PATH

printf '\n== style: ruff%s\n' "$(command -v shellcheck >/dev/null && echo ' and shellcheck')"
ruff check --quiet .
ruff format --quiet --check .
if command -v shellcheck >/dev/null; then shellcheck launch/*.sh .ci/run; fi

printf '\n== tests: pytest, each test under a time limit\n'
python -m pytest -q "${selection[@]}" "$@"
