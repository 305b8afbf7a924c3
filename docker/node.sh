#!/usr/bin/env bash
# What a container of the cluster runs: slime-cross-job-node head | worker ROLE | token | healthy head|worker | COMMAND...
#
#     head          the head, on port 6379, with the dashboard on 8265 and no CPUs for others; its GCS keeps its tables in
#                   the Redis REDIS_ADDRESS, if that is set, and then survives its own death
#     worker ROLE   a node with one unit of the resource ROLE (rollout, train), of the cluster HEAD (head:6379)
#     token         makes the cluster's token, and the password of its Redis, once
#
# Variables: REDIS_PASSWORD_FILE (no password), CPUS (4), GPUS (what Ray finds), OBJECT_STORE_BYTES (half of /dev/shm).
set -euo pipefail
[ "${1:-}" != --help ] || exec sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
token=${RAY_AUTH_TOKEN_PATH:-}

main() {
    case ${1:-} in
    token)
        make_secret "$token"
        make_secret "${REDIS_PASSWORD_FILE:-}"
        ;;
    healthy) healthy "$2" ;;
    head) start_head ;;
    worker) start_worker "$2" ;;
    *) exec "$@" ;;
    esac
}

make_secret() {
    if [ -z "$1" ] || [ -s "$1" ]; then return; fi
    umask 222 # the images' users differ; the volume it lies in is mounted by those containers alone that need it
    python3 -c 'import secrets; print(secrets.token_hex(32), end="")' >"$1.new"
    mv "$1.new" "$1"
}

healthy() {
    if [ "$1" = head ]; then
        answers 8265 /api/gcs_healthz
    else
        answers 52365 /api/local_raylet_healthz
    fi
}

answers() {
    exec 3<>"/dev/tcp/127.0.0.1/$1"
    printf 'GET %s HTTP/1.0\r\n\r\n' "$2" >&3
    head -n 1 <&3 | grep -q ' 200 '
}

start_head() {
    local more=()
    if [ -n "${REDIS_ADDRESS:-}" ]; then
        export RAY_REDIS_ADDRESS=$REDIS_ADDRESS
        # Ray knows no other way, and hands it on in the arguments of gcs_server and raylet (README.md, "Secrets")
        [ -z "${REDIS_PASSWORD_FILE:-}" ] || more+=("--redis-password=$(cat "$REDIS_PASSWORD_FILE")")
    fi
    start_node --head --port=6379 --dashboard-host=0.0.0.0 --num-cpus=0 --num-gpus=0 "${more[@]}"
}

start_worker() {
    local more=()
    [ -z "${GPUS:-}" ] || more+=("--num-gpus=$GPUS")
    start_node "--address=${HEAD:-head:6379}" "--num-cpus=${CPUS:-4}" "--resources={\"$1\": 1}" "${more[@]}"
}

start_node() {
    local room
    room=$(df --output=size -B1 /dev/shm | tail -n 1)
    exec ray start --block --disable-usage-stats --log-color=false --metrics-export-port=8080 \
        "--node-ip-address=$(hostname -I | cut -d" " -f1)" "--object-store-memory=${OBJECT_STORE_BYTES:-$((room / 2))}" "$@"
}

main "$@"
