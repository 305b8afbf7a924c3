# Sourced by the other scripts: finds or makes the virtual environment and puts it first on PATH.
#
# Environments live in ${XDG_CACHE_HOME:-~/.cache}/slime-cross-job, keyed by the hash of their requirements and of the
# interpreter, so that checkouts share them. PYTHON names the interpreter (default: python3, 3.10 to 3.12).
# MAKE=no: exit code 3 where there is none.
# ENVIRONMENT=slime chooses the one that also holds what slime, SGLang and megatron-core need on a CPU (Python 3.11).
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/slime-cross-job

die() {
    echo "error: $*" >&2
    exit 2
}

_find_python() {
    PYTHON=${PYTHON:-python3}
    command -v "$PYTHON" >/dev/null || die "no $PYTHON here: install Python 3.11, or set PYTHON to an interpreter"
    PYTHON_VERSION=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    case $PYTHON_VERSION in
    3.10 | 3.11 | 3.12) ;;
    *) die "$PYTHON is Python $PYTHON_VERSION; 3.10, 3.11 or 3.12 is needed: set PYTHON to such an interpreter" ;;
    esac
}

_fill_venv() {
    local lock=()
    [ "$PYTHON_VERSION" = 3.11 ] && lock=(-c "$ROOT/requirements.lock")
    _pip -r "$ROOT/requirements.txt" "${lock[@]}"
}

_fill_slime() {
    [ "$PYTHON_VERSION" = 3.11 ] || die "the tests with real slime need Python 3.11: set PYTHON to such an interpreter"
    _pip torch==2.13.0
    _pip --no-deps -r "$ROOT/tests/slime/requirements.lock"
    # slime up to v0.1 registers engines with an endpoint that later routers do not have
    _pip --no-deps --target "$VENV/router-0.1.9" sglang-router==0.1.9
}

_pip() {
    "$VENV/bin/pip" install -q --disable-pip-version-check "$@" 9>&- ||
        die "pip could not install $*: check the network to the package registry, and the free space"
}

# _make_environment NAME FILE...: the environment of the requirements in FILE..., filled by _fill_NAME
_make_environment() {
    local name=$1 key
    shift
    _find_python
    key=$( (cat "$@" && "$PYTHON" -VV) | sha256sum | cut -c1-16)
    VENV=$CACHE/$name-$key
    mkdir -p "$CACHE" || die "cannot make $CACHE: set XDG_CACHE_HOME to a folder that is writable"
    exec 9>"$VENV.lock"
    flock 9 # one set-up at a time; the others wait for it
    if [ ! -e "$VENV/.ready" ]; then
        [ "${MAKE:-}" != no ] || exit 3
        echo "making the Python environment $VENV (once; some minutes)" >&2
        rm -rf "$VENV"
        "$PYTHON" -m venv "$VENV" || die "$PYTHON -m venv failed: on Debian install python3-venv"
        "_fill_$name"
        touch "$VENV/.ready"
    fi
    exec 9>&-
}

case ${ENVIRONMENT:-} in
slime) _make_environment slime "$ROOT/tests/slime/requirements.lock" ;;
*) _make_environment venv "$ROOT/requirements.txt" "$ROOT/requirements.lock" ;;
esac
PATH=$VENV/bin:$PATH
export PATH VENV RAY_AUTH_MODE=disabled
