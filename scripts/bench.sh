#!/usr/bin/env bash
# Measures cross-job against plain Ray and against slime's own ways, in one run. Options: see --help. Parts that are run
# by themselves: --stores, --lifecycle, --machines, --metrics, --views, --restart, --slime, each with a --help.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
case " $* " in
*" --help "* | *" -h "*)
    case ${1:-} in
    --slime) file=$here/../tests/slime/bench_split.py ;;
    --lifecycle | --machines | --metrics | --views | --restart) file=$here/bench_${1#--}.py ;;
    *) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && file=$here/bench.py ;;
    esac
    exec "${PYTHON:-python3}" "$here/usage.py" "$file"
    ;;
esac
[ "${1:-}" != --slime ] || ENVIRONMENT=slime
. "$here/env.sh"
case ${1:-} in
--slime)
    shift
    cd "$ROOT"
    PYTHONPATH=$ROOT:$ROOT/scripts:$ROOT/slime_overlay exec python -m tests.slime.bench_split "$@"
    ;;
--stores | --lifecycle | --machines | --metrics | --views | --restart)
    part=${1#--}
    shift
    PYTHONPATH=$ROOT/slime_overlay exec python "$ROOT/scripts/bench_$part.py" "$@"
    ;;
esac
exec python "$ROOT/scripts/bench.py" "$@"
