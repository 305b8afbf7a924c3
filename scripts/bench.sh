#!/usr/bin/env bash
# Measures cross-job against plain Ray and against slime's own ways, in one run. Options: see --help.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
case ${1:-} in
--stores | --lifecycle | --clusters | --machines | --metrics | --views | --restart)
    part=${1#--}
    shift
    PYTHONPATH=$ROOT/slime_overlay exec python "$ROOT/scripts/bench_$part.py" "$@"
    ;;
esac
exec python "$ROOT/scripts/bench.py" "$@"
