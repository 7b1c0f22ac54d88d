#!/usr/bin/env bash
# From a bare machine to an accuracy: sets this checkout up, trains on scikit-learn's handwritten digits on two ranks
# (one where there is one GPU), and compares the result with random weights. A few minutes on 2 cores after the
# installation.
#
#   bash launch/quickstart.sh
#
# Run again it does only what is left to do: finished trainings and fresh features stay. What it writes: data/digits and
# runs/. WITHOUT_FFCV=1 does without FFCV and its system headers.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/install.sh
PATH=$PWD/.venv/bin:$PATH

reader=()
[ -z "${WITHOUT_FFCV:-}" ] || reader=(data.reader=arrays)
exec ssl-dist quickstart "${reader[@]}"
