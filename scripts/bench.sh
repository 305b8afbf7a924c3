#!/usr/bin/env bash
# Measures cross-job against plain Ray and against slime's own ways, in one run. Options: see --help.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
if [ "${1:-}" = --stores ]; then
    shift
    PYTHONPATH=$ROOT/slime_overlay exec python "$ROOT/scripts/bench_stores.py" "$@"
fi
exec python "$ROOT/scripts/bench.py" "$@"
