#!/usr/bin/env bash
# Trains, or evaluates, on NPROC ranks of this machine.
#
#   launch/torchrun_single.sh NPROC CONFIG [key=value ...]
#   launch/torchrun_single.sh 2 configs/digits/relational-conv4.yaml optim.lr=1e-3
#   launch/torchrun_single.sh 2 evaluate runs/digits-relational-conv4 probe finetune
#
# How to stop it, its exit codes and what it reads from the environment: launch/torchrun_multi.sh.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: launch/torchrun_single.sh NPROC CONFIG [key=value ...]" >&2
    exit 2
fi
export LOCAL_ADDR=${LOCAL_ADDR:-127.0.0.1} # works where the machine's own name does not resolve
exec "$(dirname "${BASH_SOURCE[0]}")/torchrun_multi.sh" 1 0 localhost:0 "$@" # port 0: a free one
