#!/usr/bin/env bash
# Runs the tests: scripts/test.sh [unit|contract|patches|integration|cluster|slime|all] [TEST-FILE...] [pytest options].
# Alone: unit, contract and patches on up to four cores, then the integration tests that matter most (marker `core`).
# With TEST-FILEs: those only. Makes the environments first: one, and for tests/slime another.
set -euo pipefail
case " $* " in *" --help "* | *" -h "*) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit ;; esac
suite=""
case ${1:-} in
unit | contract | patches | integration | cluster | slime | all)
    suite=$1
    shift
    ;;
-* | "") ;;
*)
    if [ ! -e "${1%%::*}" ]; then
        echo "error: '$1' is neither a suite (unit, contract, patches, integration, cluster, slime, all) nor a file" >&2
        exit 2
    fi
    ;;
esac
files=()
while [ $# -gt 0 ] && [ -e "${1%%::*}" ]; do
    files+=("$(realpath "${1%%::*}")${1#"${1%%::*}"}")
    shift
done
here=$(dirname "${BASH_SOURCE[0]}")
python=${PYTHON:-python3}
code=0
none=5 # pytest's, where nothing was selected
some=""
ran=()
trap 'exit 143' TERM # after pytest has ended, which gets the signal, too
trap 'exit 130' INT

run() { # run TITLE ENVIRONMENT PYTEST-ARGUMENTS...
    local title=$1 environment=$2 began=$SECONDS result=passed status=0
    shift 2
    # a shell of its own, because `set -e` holds nowhere in a list with ||
    # shellcheck disable=SC2016
    ENVIRONMENT=$environment bash -euc '. "$0/env.sh"; cd "$ROOT"; exec python -m pytest "$@"' "$here" "$@" || status=$?
    case $status in
    0) some=yes ;;
    "$none") result="nothing selected" ;;
    *) code=$status result="FAILED ($status)" ;;
    esac
    ran+=("$(printf '%-34s %3d min %02d s  %s' "$title" $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60)) "$result")")
}

quick() {
    run "unit, contract, patches" "" tests/unit tests/contract tests/patches -n auto --maxprocesses 4 --dist worksteal "$@"
}

if [ ${#files[@]} -gt 0 ]; then
    environment=""
    case ${files[*]} in */tests/slime*) environment=slime ;; esac
    run "${#files[@]} files" "$environment" "${files[@]}" "$@"
else
    case $suite in
    "")
        quick "$@"
        run "integration (core)" "" tests/integration -m core "$@"
        ;;
    all)
        quick "$@"
        run "integration, cluster" "" tests/integration tests/cluster "$@"
        if "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
            run slime slime tests/slime "$@"
        else
            echo "not run: tests/slime, which need Python 3.11 (SGLang's and megatron-core's wheels): set PYTHON"
        fi
        ;;
    slime) run slime slime tests/slime "$@" ;;
    *) run "$suite" "" "tests/$suite" "$@" ;;
    esac
fi

[ "$code" != 0 ] || [ -n "$some" ] || code=$none
echo "== what ran"
printf '%s\n' "${ran[@]}"
[ -n "$suite" ] || [ ${#files[@]} -gt 0 ] || cat <<'END'
== what else there is, in minutes on 2 cores (estimated)
scripts/test.sh integration          25   all tests on a local Ray cluster
scripts/test.sh cluster              12   several machines: containers (Docker), else network namespaces (root)
scripts/test.sh slime               150   real slime at its pins, on CPUs; SGLang and megatron-core (4 GB to install)
scripts/test.sh all                 195   all of it
END
exit "$code"
