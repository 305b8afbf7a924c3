#!/usr/bin/env bash
# Runs the tests: scripts/test.sh [unit|integration|all] [pytest options]. Makes its environment first.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
suite=all
case ${1:-} in
unit | integration | all)
    suite=$1
    shift
    ;;
-* | "") ;;
*) die "unknown suite '$1': unit, integration or all" ;;
esac
cd "$ROOT"
case $suite in
all) folders=(tests) ;;
*) folders=("tests/$suite") ;;
esac
exec python -m pytest "${folders[@]}" "$@"
