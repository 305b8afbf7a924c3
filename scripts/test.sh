#!/usr/bin/env bash
# Runs the tests: scripts/test.sh [unit|contract|integration|patches|cluster|slime|all] [TEST-FILE...] [pytest options].
# Makes the environments first: one, and for tests/slime another.
set -euo pipefail
suite=all
case ${1:-} in
unit | contract | integration | patches | cluster | slime | all)
    suite=$1
    shift
    ;;
-* | "") ;;
*)
    echo "error: unknown suite '$1': unit, contract, integration, patches, cluster, slime or all" >&2
    exit 2
    ;;
esac
here=$(dirname "${BASH_SOURCE[0]}")
python=${PYTHON:-python3}

run() { # run ENVIRONMENT "FOLDER OPTIONS" PYTEST-ARGUMENTS...: the folder, unless the arguments name files of it
    local ENVIRONMENT=$1 selected=$2 argument
    shift 2
    for argument in "$@"; do
        [ ! -e "${argument%%::*}" ] || selected=""
    done
    (
        . "$here/env.sh"
        cd "$ROOT"
        # shellcheck disable=SC2086 # words
        exec python -m pytest $selected "$@"
    )
}

case $suite in
slime) run slime tests/slime "$@" ;;
all)
    run "" "tests --ignore=tests/slime" "$@"
    if "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
        run slime tests/slime "$@"
    else
        echo "not run: tests/slime, which need Python 3.11 (SGLang's and megatron-core's wheels): set PYTHON"
    fi
    ;;
*) run "" "tests/$suite" "$@" ;;
esac
