#!/usr/bin/env bash
# Measures cross-job against plain Ray and against slime's own ways, in one run. Options: see --help.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec python "$ROOT/scripts/bench.py" "$@"
