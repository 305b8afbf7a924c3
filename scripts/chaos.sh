#!/usr/bin/env bash
# Trains with rollout and train job on a private cluster while an injector kills, stops and breaks everything in it, then
# audits that every rollout and prompt took effect exactly once. Options: see --help.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
case " $* " in *" --help "* | *" -h "*) exec "${PYTHON:-python3}" "$here/usage.py" "$here/../tests/chaos/chaos.py" ;; esac
. "$here/env.sh"
exec python "$ROOT/tests/chaos/chaos.py" "$@"
