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

relational=runs/digits-relational-conv4
random=runs/digits-random_weights-conv4
table=runs/digits-quickstart.txt
reader=()
[ -z "${WITHOUT_FFCV:-}" ] || reader=(data.reader=arrays)

step() { printf '\n== %s\n' "$*"; }

# Finished before, and nothing that the table depends on is newer than it.
sources=(configs/digits data/digits/dataset.json "$relational/checkpoints/LAST" "$random/checkpoints/LAST")
is_done() { [ -s "$table" ] && ! find "${sources[@]}" -newer "$table" 2>&1 | grep -q .; }

if is_done; then
    step "finished before; remove runs/digits-* to do it again"
    cat "$table"
    exit 0
fi

step "1 of 4: the digits as 32x32 images, one .beton file a split"
ssl-dist convert digits --out data/digits

ranks=$(python -c 'from ssl_dist.distributed.world import ranks_here; print(ranks_here(2))')
step "2 of 4: relational reasoning without labels under torchrun, ranks: $ranks"
launch/torchrun_single.sh "$ranks" configs/digits/relational-conv4.yaml "${reader[@]}"

step "3 of 4: random weights, to compare with"
ssl-dist train configs/digits/random_weights-conv4.yaml "${reader[@]}"

step "4 of 4: features of both, kNN and logistic regression on the test images; a page"
ssl-dist evaluate "$relational" knn logistic >/dev/null
ssl-dist evaluate "$random" knn logistic >/dev/null
ssl-dist report "$relational" >/dev/null

step "result"
python - "$relational" "$random" <<'PYTHON' | tee "$table"
import sys
from pathlib import Path

from ssl_dist import results

print(results.table([record for run in sys.argv[1:] for record in results.read(Path(run, "results.json"))]))
PYTHON

step "look at"
printf '%-42s %s\n' \
    "$relational/report.html" "its page, in a browser: health, results, curves, views, config" \
    "$relational/views.png" "the views of some digits, as the network sees them" \
    "$relational/loss.png" "loss and accuracies over the epochs" \
    "$table" "the table above; each run's own numbers are in its results.json" \
    ".venv/bin/tensorboard --logdir runs" "everything that was logged, in a browser"
