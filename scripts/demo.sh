#!/usr/bin/env bash
# The main job on this machine: a rollout job and a train job, two separate Ray jobs on a private local cluster, train a
# small language model together. Makes its environment first. Options: see --help.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
case " $* " in *" --help "* | *" -h "*) exec "${PYTHON:-python3}" "$here/usage.py" "$here/demo.py" ;; esac
python=$(. "$here/env.sh" && echo "$VENV/bin/python") # apart: with --address, the caller's token counts
exec "$python" "$here/demo.py" "$@"
