#!/usr/bin/env bash
# Measures cross-job against plain Ray and against slime's own ways, in one run. Options: see --help.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
case ${1:-} in
--stores | --clusters)
    script=$ROOT/scripts/bench_${1#--}.py
    shift
    PYTHONPATH=$ROOT/slime_overlay exec python "$script" "$@"
    ;;
esac
exec python "$ROOT/scripts/bench.py" "$@"
