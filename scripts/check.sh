#!/usr/bin/env bash
# Static checks; changes nothing: ruff (rules and format), mypy, shellcheck, hadolint.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$ROOT"
ruff check .
ruff format --check .
mypy
shellcheck -x -P SCRIPTDIR scripts/*.sh docker/*.sh .ci/run
hadolint docker/Dockerfile docker/Dockerfile.cpu
