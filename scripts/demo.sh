#!/usr/bin/env bash
# The main job on this machine: a rollout job and a train job, two separate Ray jobs on a private local cluster, train a
# small language model together. Makes its environment first. Options: see --help.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec python "$ROOT/scripts/demo.py" "$@"
