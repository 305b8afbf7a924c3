#!/usr/bin/env bash
# Static checks; changes nothing: ruff (rules and format), mypy, shellcheck, hadolint.
set -euo pipefail
case " $* " in *" --help "* | *" -h "*) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit ;; esac
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$ROOT"
ruff check .
ruff format --check .
mypy
shellcheck -x -P SCRIPTDIR scripts/*.sh docker/*.sh tests/gpu/*.sh .ci/run
hadolint docker/Dockerfile docker/Dockerfile.cpu
