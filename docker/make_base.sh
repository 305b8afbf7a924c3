#!/usr/bin/env bash
# Makes what `docker build` cannot fetch where no image registry can be reached, but Debian's packages and Python's can:
# the image slime-cross-job-base (Debian bookworm with Python 3.11 and a Redis server; serves as the compose file's redis,
# too), and docker/wheelhouse with the wheels of docker/Dockerfile.cpu. Then:
#
#     docker build -f docker/Dockerfile.cpu -t slime-cross-job:cpu \
#         --build-arg BASE_IMAGE=slime-cross-job-base:TAG --build-arg PIP_NO_INDEX=1 .
#
# Needs root, debootstrap, and Python 3.11 (PYTHON). What it made it does not make again. Prints the image's name.
set -euo pipefail
case " $* " in *" --help "* | *" -h "*) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit ;; esac
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/slime-cross-job
python=${PYTHON:-python3}
packages=ca-certificates,python3,python3-venv,redis-server,procps,iproute2
folder=

die() {
    echo "error: $*" >&2
    exit 2
}

clean() {
    [ -z "$folder" ] || rm -rf --one-file-system "$folder"
}
trap clean EXIT

base_image() {
    local mirror
    docker image inspect "$base" >/dev/null 2>&1 && return
    [ "$(id -u)" = 0 ] || die "debootstrap needs root: run this as root, or pull python:3.11-slim-bookworm instead"
    command -v debootstrap >/dev/null || die "no debootstrap here: apt-get install debootstrap"
    # shellcheck disable=SC2016 # apt-get knows REPO_URI
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | head -n 1)
    [ -n "$mirror" ] || die "apt names no mirror here: write one into its sources"
    folder=$(mktemp -d)
    echo "making $base from Debian's packages (some two minutes)" >&2
    debootstrap --variant=minbase "--include=$packages" bookworm "$folder/root" "$mirror" >"$folder/log" 2>&1 ||
        die "debootstrap failed: $(tail -n 5 "$folder/log")"
    tar -C "$folder/root" --numeric-owner -c \
        --exclude=./var/cache/apt --exclude=./var/lib/apt/lists --exclude=./usr/share/doc --exclude=./usr/share/man \
        --exclude=./usr/share/locale --exclude=./dev --exclude=./proc --exclude=./sys . |
        docker import --change 'CMD ["bash"]' \
            --change 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' - "$base" >/dev/null
}

wheelhouse() {
    local key wheels
    key=$(cat "$here/requirements.cpu.txt" "$here/../requirements.lock" | sha256sum | cut -c1-16)
    wheels=$cache/wheels-$key
    if [ ! -e "$wheels/.ready" ]; then
        "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' ||
            die "wheels for the image's Python 3.11 are fetched by a Python 3.11: set PYTHON to one"
        echo "fetching the wheels of Dockerfile.cpu" >&2
        rm -rf "$wheels"
        mkdir -p "$wheels"
        sed 's/;.*//' "$here/requirements.cpu.txt" >"$wheels/requirements.txt" # a marker means the image's Python
        "$python" -m pip wheel -q --disable-pip-version-check -w "$wheels" -r "$wheels/requirements.txt" \
            -c "$here/../requirements.lock" >"$wheels/log" 2>&1 ||
            die "pip could not fetch the wheels, check the package registry: $(tail -n 5 "$wheels/log")"
        touch "$wheels/.ready"
    fi
    find "$here/wheelhouse" -name '*.whl' -delete
    cp "$wheels"/*.whl "$here/wheelhouse/"
}

docker version >/dev/null 2>&1 || die "no Docker daemon answers: start dockerd, or set DOCKER_HOST"
base=slime-cross-job-base:$(echo "bookworm $packages" | sha256sum | cut -c1-12)
base_image
wheelhouse
echo "$base"
