#!/usr/bin/env bash
# Writes the patches of a pin anew from an edited checkout: scripts/export_patches.sh SLIME_DIR PIN
# Needs git and Python 3.10 or newer (PYTHON names another than python3), no virtual environment.
set -euo pipefail
command -v "${PYTHON:-python3}" >/dev/null || {
    echo "error: no ${PYTHON:-python3} here: install Python 3.10 or newer, or set PYTHON to an interpreter" >&2
    exit 2
}
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/patchset" export "$@"
