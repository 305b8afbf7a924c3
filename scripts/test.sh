#!/usr/bin/env bash
# Runs the tests: scripts/test.sh [unit|integration|patches|slime|all] [pytest options]. Makes its environment first.
set -euo pipefail
suite=all
case ${1:-} in
unit | integration | patches | slime | all)
    suite=$1
    shift
    ;;
-* | "") ;;
*)
    echo "error: unknown suite '$1': unit, integration, patches, slime or all" >&2
    exit 2
    ;;
esac
here=$(dirname "${BASH_SOURCE[0]}")
python=${PYTHON:-python3}

run() { # run ENVIRONMENT FOLDER... -- PYTEST-OPTIONS
    local environment=$1 folders=()
    shift
    while [ "$1" != -- ]; do
        folders+=("$1")
        shift
    done
    shift
    (
        ENVIRONMENT=$environment
        . "$here/env.sh"
        cd "$ROOT"
        exec python -m pytest "${folders[@]}" "$@"
    )
}

case $suite in
slime) run slime tests/slime -- "$@" ;;
all)
    run "" tests --ignore=tests/slime -- "$@"
    if "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
        run slime tests/slime -- "$@"
    else
        echo "not run: tests/slime, which need Python 3.11 (SGLang's and megatron-core's wheels): set PYTHON"
    fi
    ;;
*) run "" "tests/$suite" -- "$@" ;;
esac
