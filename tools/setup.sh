#!/bin/sh
# Makes .venv: finds a Python, creates the environment, installs the pinned dependencies and this package (editable).
# `make` runs this when .venv/.ready is missing or older than the files that decide what .venv holds.
#   PYTHON=/path/to/python     the Python to use; otherwise the first of the list below that is new enough
#   PIP_INDEX_URL, PIP_PROXY   pip's own settings, for a mirror or a proxy
set -eu
cd "$(dirname "$0")/.."
choose="choose another one with: make test PYTHON=/path/to/python"

say() { echo "setting up: $*"; }

fail() {
    echo "setting up: $*" >&2
    exit 1
}

# Prints the version of a Python; fails when it does not run or is too old.
version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2]); sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    seen=""
    for python; do
        if version=$(version_of "$python"); then return; fi
        [ -z "$version" ] || seen="${seen:+$seen, }$python is $version"
    done
    fail "Python 3.11 or newer is needed, but ${seen:-$* could not be run}; $choose"
}

if [ -n "${PYTHON:-}" ]; then
    find_python "$PYTHON"
else
    find_python python3 python3.13 python3.12 python3.11
fi
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python ($version) lacks the modules venv and ensurepip; install them" \
        "(on Debian and Ubuntu they are the package python$version-venv), or $choose"

if [ -e .venv/.ready ] && .venv/bin/python -c '' 2>/dev/null; then
    say "bringing .venv up to date"
else
    say "creating .venv with $python ($version)"
    "$python" -m venv --clear .venv
fi
rm -f .venv/.ready # until the end: what is killed half-way is made afresh next time

if [ -t 1 ]; then progress=""; else progress="--quiet"; fi # pip draws its progress bars on a terminal only

pip_install() {
    if .venv/bin/python -m pip install $progress --disable-pip-version-check --only-binary=:all: "$@" 2>.venv/pip.log
    then return; fi
    echo "setting up: pip could not download or install the packages; if no package index can be reached from here," \
        "set a mirror with PIP_INDEX_URL or a proxy with PIP_PROXY. pip's last lines:" >&2
    tail -n 5 .venv/pip.log >&2
    exit 1
}

say "installing the packages pinned in constraints.txt (some minutes the first time; PyTorch is the largest)"
pip_install --requirement constraints.txt
pip_install --no-build-isolation --constraint constraints.txt --editable '.[dev]' # the build tools are among the pins
pip_install --no-deps --requirement tools/no-deps.txt
.venv/bin/python -m pip uninstall --quiet --yes torchvision 2>/dev/null # of an earlier set-up
touch .venv/.ready
say "done"
