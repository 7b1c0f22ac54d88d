#!/usr/bin/env bash
# Sets the checkout up where needed, then checks style and types and runs the tests. Ends with pytest's summary.
#
#   bash launch/test.sh                     everything; the tests that take longest are begun first
#   bash launch/test.sh --quick             without the tests marked slow, and without Slurm and Chromium for them
#   COVERAGE=1 bash launch/test.sh          also the share of the package's lines that the tests run in their own process
#   bash launch/test.sh [--quick] tests/test_config.py -k hints       what follows goes to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

slow_too=1
if [ "${1:-}" = --quick ]; then
    slow_too=
    shift
fi

WITH_SLURM=${WITH_SLURM-$slow_too} WITH_CHROMIUM=${WITH_CHROMIUM-$slow_too} bash launch/install.sh
PATH=$PWD/.venv/bin:$PATH

unset PYTHONDONTWRITEBYTECODE # else each of many hundred processes compiles the package again

python -m tests.compile_kernels & # meanwhile
kernels=$!
printf '\n== style: ruff%s\n' "$(command -v shellcheck >/dev/null && echo ' and shellcheck')"
ruff check --quiet .
ruff format --quiet --check .
if command -v shellcheck >/dev/null; then shellcheck launch/*.sh .ci/run; fi

printf '\n== types: mypy\n'
mypy
wait $kernels

workers=$(($(nproc) + 2)) # half of all tests wait, for ranks, clocks and Slurm; tests/conftest.py says which share one

printf '\n== tests: pytest, each test under a time limit\n'
chosen=()
[ -n "$slow_too" ] || chosen=(-m "not slow")
python -m pytest -q -rfEs -n "$workers" --dist loadgroup --no-loadscope-reorder \
    "${chosen[@]}" ${COVERAGE:+--cov --cov-report=} "$@"
[ -z "${COVERAGE:-}" ] || printf 'lines that the tests run: %s%%\n' "$(coverage report --format=total)"
