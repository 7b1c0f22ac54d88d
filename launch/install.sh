#!/usr/bin/env bash
# Sets this checkout up: system packages through apt-get where something is missing, then .venv with the package and the
# versions of launch/constraints.txt. Called by quickstart.sh and test.sh; where nothing is to do it is done at once.
#
#   bash launch/install.sh
#   PYTHON=/usr/bin/python3.12 bash launch/install.sh    another interpreter (3.11 or newer)
#   WITHOUT_FFCV=1 bash launch/install.sh                no FFCV and no system headers: works with data.reader=arrays
#   WITH_SLURM=1 bash launch/install.sh                  also Slurm, for tests/cluster.py; goes on where it cannot
#   WITH_CHROMIUM=1 bash launch/install.sh               also a browser, for tests/browser.py; the same
#
# Exit codes: 0 ready; 2 something is missing that this script cannot install (it is named, with the command); 1 a fault.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
venv=$root/.venv
stamp=$venv/ssl_dist-complete # written last; holds what the installation was made from
unfinished=$venv/ssl_dist-unfinished
extras=ffcv,timm,test,docs
[ -z "${WITHOUT_FFCV:-}" ] || extras=timm,test,docs

say() { printf 'install: %s\n' "$*"; }
stop() {
    printf 'install: %s\n' "$*" >&2
    exit 2
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
identity() { "$1" -c 'import sys; print(sys.base_prefix, sys.version)' 2>/dev/null; }

# A finished or hand-made environment that pip may go on with: it runs, was made here, and with the Python asked for.
is_usable() {
    [ ! -e "$unfinished" ] && is_new_enough "$venv/bin/python" || return 1
    head -n 3 "$venv/bin/pip" 2>/dev/null | grep -qF "$venv/bin/python" || return 1 # else the checkout was moved
    [ -z "${PYTHON:-}" ] || [ "$(identity "$PYTHON")" = "$(identity "$venv/bin/python")" ]
}

# A digest of everything that decides what is installed.
recipe() {
    {
        identity "$venv/bin/python"
        printf '%s\n' "$extras"
        cat setup.py launch/constraints.txt launch/install.sh
    } | sha256sum
}

find_python() {
    local name
    for name in "$venv/bin/python" python3 python3.14 python3.13 python3.12 python3.11; do
        if is_new_enough "$name"; then
            command -v "$name"
            return
        fi
    done
}

# Debian's names of what is not there, one a line, whoever may have installed the rest.
missing_packages() {
    local python=$1 version=3 headers=
    if [ -n "$python" ]; then
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    else
        echo python3
    fi
    "${python:-false}" -c 'import ensurepip, venv' 2>/dev/null || echo "python$version-venv"
    [ -z "${WITHOUT_FFCV:-}" ] || return 0
    # FFCV is compiled here, against these
    [ -f "$headers/Python.h" ] || echo "python$version-dev"
    command -v g++ >/dev/null || echo g++
    command -v pkg-config >/dev/null || echo pkg-config
    pkg-config --exists opencv4 2>/dev/null || echo libopencv-dev
    pkg-config --exists libturbojpeg 2>/dev/null || echo libturbojpeg0-dev
}

# What the tests' own cluster needs (tests/cluster.py); all of it when a part is not there.
missing_slurm() {
    local name packages="slurmctld slurmd slurm-client munge iproute2"
    for name in slurmctld slurmd sbatch munged ip; do
        (PATH=$PATH:/usr/sbin:/sbin && command -v "$name" >/dev/null) || { echo "$packages" && return; }
    done
}

# What tests/browser.py looks at pages with.
missing_chromium() {
    local name
    for name in chromium chromium-browser google-chrome google-chrome-stable; do
        ! command -v "$name" >/dev/null || return 0
    done
    echo chromium
}

# Returns 1 where it cannot, with the reason in $why, which ends with the first argument: what else to do.
install_packages() {
    local otherwise=$1 as_root=()
    shift
    local by_hand="apt-get update && apt-get install -y --no-install-recommends $*"
    if ! command -v apt-get >/dev/null; then
        why="missing: $* (the names of Debian, but there is no apt-get here): install them by hand, $otherwise"
        return 1
    fi
    if [ "$(id -u)" != 0 ]; then
        as_root=(sudo)
        [ -t 0 ] || as_root=(sudo -n) # nobody there to type a password
        if ! "${as_root[@]}" true 2>/dev/null; then
            why="missing: $*; have root run: $by_hand; $otherwise"
            return 1
        fi
    fi
    say "system packages, through apt-get${as_root[*]:+ and sudo}: $*"
    local apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=120)
    if ! { "${apt[@]}" update && "${apt[@]}" install -y --no-install-recommends "$@"; } >"$log" 2>&1 9<&-; then # a daemon that comes along must not get the lock
        tail -n 15 "$log" >&2
        why="missing: $*; apt-get failed (its last lines are above); have root run: $by_hand; $otherwise"
        return 1
    fi
}

pip_install() {
    local quiet=()
    [ -t 1 ] || quiet=(--quiet) # progress bars are for people
    # the warnings of build tools are for the packages' authors
    PYTHONWARNINGS=ignore "$venv/bin/python" -m pip --disable-pip-version-check install "${quiet[@]}" --constraint launch/constraints.txt "$@"
}

# Two set-ups of one checkout wait for each other; this lock goes with its owner, however that ends.
exec 9<launch/install.sh
if ! flock --nonblock 9; then
    say "waiting for another set-up of this checkout"
    flock 9
fi
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# Apart from the rest: neither the stamp nor the exit code knows of it, and nobody is asked for a password.
for_tests() {
    local skipped=$1
    shift
    [ $# -gt 0 ] || return 0
    install_packages "or go on without: the tests that start $skipped are skipped" "$@" </dev/null || say "$why"
}
if [ -n "${WITH_SLURM:-}" ]; then
    read -ra missing < <(missing_slurm) || true
    for_tests "a Slurm cluster" "${missing[@]}"
fi
if [ -n "${WITH_CHROMIUM:-}" ]; then
    read -ra missing < <(missing_chromium) || true
    for_tests "a browser" "${missing[@]}"
fi
if is_usable && [ "$(cat "$stamp" 2>/dev/null)" = "$(recipe)" ]; then
    say "nothing to do, .venv is complete"
    exit 0
fi

if [ -n "${PYTHON:-}" ]; then
    is_new_enough "$PYTHON" || stop "PYTHON=$PYTHON is not Python 3.11 or newer; name another one or unset it"
fi
if [ -e "$venv" ] && ! is_usable; then
    say "removing .venv: its set-up was interrupted, or it was made in another place or with another Python"
    rm -rf "$venv"
fi

python=${PYTHON:-$(find_python)}
if [ -z "$python" ] && command -v python3 >/dev/null; then
    stop "$(python3 --version) is too old: install Python 3.11 or newer and name it, as in PYTHON=/usr/bin/python3.11"
fi
mapfile -t missing < <(missing_packages "$python")
if [ ${#missing[@]} -gt 0 ]; then
    install_packages "or leave FFCV and its headers out: WITHOUT_FFCV=1, then data.reader=arrays" "${missing[@]}" ||
        stop "$why"
    python=${python:-$(find_python)}
    [ -n "$python" ] || stop "apt-get brought $(python3 --version); install Python 3.11 or newer and name it with PYTHON="
    mapfile -t missing < <(missing_packages "$python")
    [ ${#missing[@]} -eq 0 ] || stop "still missing after apt-get: ${missing[*]}"
fi

mkdir -p "$venv"
rm -f "$stamp"
: >"$unfinished"
if [ ! -x "$venv/bin/python" ]; then
    say "making .venv with $("$python" --version)"
    "$python" -m venv "$venv"
fi

say "Python packages: torch and torchvision with CUDA (6 GB on disk), the rest, FFCV compiled here; some minutes"
# The pinned pip and setuptools first: the builds below use them instead of fetching others, unpinned.
pip_install pip setuptools
pip_install --no-build-isolation --editable ".[$extras]"

say "trying what was installed"
case $extras in
ffcv,*) "$venv/bin/python" -c 'import torch, torchvision, numba, ffcv' ;;
*) "$venv/bin/python" -c 'import torch, torchvision, numba' ;;
esac

rm -f "$unfinished"
recipe >"$stamp"
say "done, .venv is complete"
