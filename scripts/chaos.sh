#!/usr/bin/env bash
# Trains with rollout and train job on a private cluster while an injector kills, stops and breaks everything in it, then
# audits that every rollout and prompt took effect exactly once. Options: see --help.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec python "$ROOT/tests/chaos/chaos.py" "$@"
