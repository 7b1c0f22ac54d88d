#!/usr/bin/env bash
# Trains, or evaluates, on NPROC ranks of each of NNODES machines. Start it once on every machine, with the same arguments but for
# NODE_RANK (0 .. NNODES-1); machine 0 shows the progress. ENDPOINT is host:port of machine 0, the port free there and
# reachable from the others.
#
#   launch/torchrun_multi.sh NNODES NODE_RANK ENDPOINT NPROC CONFIG [key=value ...]
#   launch/torchrun_multi.sh 2 0 gpu-a:29400 8 configs/cifar10/relational-conv4.yaml      on gpu-a
#   launch/torchrun_multi.sh 2 1 gpu-a:29400 8 configs/cifar10/relational-conv4.yaml      on gpu-b
#   launch/torchrun_multi.sh NNODES NODE_RANK ENDPOINT NPROC evaluate RUN EVALUATOR ... | extract RUN ...
#
# Stop it with SIGTERM, SIGINT (Ctrl-C) or SIGUSR2: the ranks finish their step, save and end; the same command resumes.
# Signal the script on every machine: torchrun waits minutes for machines that do not leave with the others.
#
# Exit codes: 0 done; 2 a mistake in the arguments or the config; 75 stopped on request after a checkpoint; else a fault.
#
# Environment, all optional:
#   RESTARTS=0          how often torchrun starts the ranks again after a fault; they resume from the last checkpoint
#   OMP_NUM_THREADS     threads of a rank; default: the cores that this script may use, divided by NPROC
#   TORCH_CPP_LOG_LEVEL=ERROR   least level of the messages of torch's C++ that are shown
#   LOCAL_ADDR          address of this machine, where the others cannot resolve its name
#   RDZV_ID=ssl_dist    name of the run, where several share an endpoint
#   PYTHON              interpreter; default: .venv/bin/python of this checkout, else python3
set -euo pipefail

stop() {
    printf '%s\n' "$*" >&2
    exit 2
}

[ $# -ge 5 ] || stop "usage: launch/torchrun_multi.sh NNODES NODE_RANK ENDPOINT NPROC CONFIG [key=value ...]"
nnodes=$1 node_rank=$2 endpoint=$3 ranks=$4
shift 4
case $1 in
evaluate | extract) command=("$@") ;;
*) command=(train "$@") ;;
esac
[[ $nnodes =~ ^[1-9][0-9]*$ ]] || stop "NNODES=$nnodes: give the number of machines, 1 or more"
[[ $ranks =~ ^[1-9][0-9]*$ ]] || stop "NPROC=$ranks: give the number of ranks on a machine, 1 or more"
[[ $node_rank =~ ^[0-9]+$ && $node_rank -lt $nnodes ]] ||
    stop "NODE_RANK=$node_rank: give the number of this machine, 0 .. $((nnodes - 1))"
[[ $endpoint =~ ^.+:[0-9]+$ ]] || stop "ENDPOINT=$endpoint: give host:port of machine 0, as in gpu-a:29400"

here=$(dirname "${BASH_SOURCE[0]}")
python=${PYTHON:-$here/../.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3

is_host=false
[ "$node_rank" != 0 ] || is_host=true
if [ "${command[0]}" = train ]; then # a mistake costs less before torchrun starts
    what_will_run=$("$python" -m ssl_dist explain "$@" --world $((nnodes * ranks)) --ranks-per-node "$ranks")
    [ $is_host = false ] || printf '%s\n' "$what_will_run" || true # also where nobody reads it
fi

if [ -z "${OMP_NUM_THREADS:-}" ]; then # torchrun would set 1
    cores=$(($(nproc) / ranks))
    export OMP_NUM_THREADS=$((cores > 0 ? cores : 1))
fi
# DDP's C++ warns that no parameter was unused; distributed/world.py says why it was asked to look.
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
# After a restart torchrun's shared store still holds the addresses of dead ranks, and gloo would call them.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export SSL_DIST_NODE_RANK=$node_rank # the ranks of machine 0 come first, and the first of them shows the progress

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export SSL_DIST_EXIT_FILE=$scratch/exit-code # the first rank of this machine writes its exit code here

# A signal is passed on once: torchrun then tells the ranks, waits for their save, and ends what is left after 10 s; a
# second one would cut that short. INT, HUP and QUIT become TERM, because a background process of a script is deaf to
# INT and QUIT until torchrun listens.
signal='' interrupted='' torchrun_pid=''
# shellcheck disable=SC2317,SC2329 # the traps call it
pass_on() {
    interrupted=yes
    [ -z "$signal" ] || return 0
    signal=$1
    [ -z "$torchrun_pid" ] || kill -s "$signal" "$torchrun_pid" 2>/dev/null || true
}
trap 'pass_on TERM' TERM INT HUP QUIT
trap 'pass_on USR2' USR2

# setsid: a Ctrl-C in the terminal reaches this script alone, not torchrun beside it.
# setpriv: torchrun gets SIGTERM when this script is killed, instead of training on unseen.
setsid setpriv --pdeathsig TERM "$python" "$here/torchrun.py" \
    --nnodes "$nnodes" --nproc-per-node "$ranks" --max-restarts "${RESTARTS:-0}" \
    --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-conf "is_host=$is_host" --rdzv-id "${RDZV_ID:-ssl_dist}" \
    ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"} \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2 --shutdown-timeout 10 --log-dir "$scratch/torchrun" \
    -m ssl_dist "${command[@]}" &
torchrun_pid=$!
[ -z "$signal" ] || kill -s "$signal" "$torchrun_pid" 2>/dev/null || true # one that came before torchrun was there

interrupted=yes
while [ -n "$interrupted" ]; do # a signal ends the wait, not torchrun
    interrupted='' code=0
    wait "$torchrun_pid" || code=$?
done

# Ranks that were stopped or met a mistake tell torchrun 0, which would start them again else.
case $(cat "$SSL_DIST_EXIT_FILE" 2>/dev/null) in
75)
    echo "stopped on request; the same command goes on from the last checkpoint (exit code 75)" >&2 || true
    exit 75
    ;;
2) exit 2 ;;
141) exit 141 ;; # nobody reads what an evaluation prints
0) [ -z "$signal" ] || exit 0 ;; # torchrun reports 1 after any signal, also when the ranks were done
esac
exit "$code"
