# Sourced by the other scripts: finds or makes the virtual environment and puts it first on PATH.
#
# It lives in ${XDG_CACHE_HOME:-~/.cache}/slime-cross-job, keyed by the hash of the requirements and of the interpreter,
# so that checkouts share it. PYTHON names the interpreter to make it with (default: python3, 3.10 to 3.12).
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

die() {
    echo "error: $*" >&2
    exit 2
}

_make_environment() {
    local python=${PYTHON:-python3} version key lock
    command -v "$python" >/dev/null || die "no $python here: install Python 3.11, or set PYTHON to an interpreter"
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    case $version in
    3.10 | 3.11 | 3.12) ;;
    *) die "$python is Python $version; 3.10, 3.11 or 3.12 is needed: set PYTHON to such an interpreter" ;;
    esac
    lock=()
    [ "$version" = 3.11 ] && lock=(-c "$ROOT/requirements.lock")
    key=$( (cat "$ROOT/requirements.txt" "$ROOT/requirements.lock" && "$python" -VV) | sha256sum | cut -c1-16)
    VENV=${XDG_CACHE_HOME:-$HOME/.cache}/slime-cross-job/venv-$key
    mkdir -p "$(dirname "$VENV")" || die "cannot make $(dirname "$VENV"): set XDG_CACHE_HOME to a folder that is writable"
    exec 9>"$VENV.lock"
    flock 9 # one set-up at a time; the others wait for it
    if [ ! -e "$VENV/.ready" ]; then
        echo "making the Python environment $VENV (once; some minutes)" >&2
        rm -rf "$VENV"
        "$python" -m venv "$VENV" || die "$python -m venv failed: on Debian install python3-venv"
        "$VENV/bin/pip" install -q --disable-pip-version-check -r "$ROOT/requirements.txt" "${lock[@]}" 9>&- ||
            die "pip could not install requirements.txt: check the network to the package registry, and the free space"
        touch "$VENV/.ready"
    fi
    exec 9>&-
}

_make_environment
PATH=$VENV/bin:$PATH
export PATH RAY_AUTH_MODE=disabled
