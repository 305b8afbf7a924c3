"""The scripts that launch_cluster.sh prints: `ray start` on bare metal, and an sbatch script for Slurm.

Pure text. Both give nodes the resource "rollout" or "train", by which launch_rollout.sh and launch_train.sh place the
drivers, ask for a token, and leave jobs time to stop.
"""

import argparse
import json
import shlex

ROLES = ("rollout", "train")
STOP_WAIT_S = "600"

_ENVIRONMENT = f"""\
export RAY_AUTH_MODE=token
# seconds that a job which is asked to stop has to finish its step and to save, before Ray kills it
export RAY_JOB_STOP_WAIT_TIME_S={STOP_WAIT_S}
# Optional: dead nodes are noticed after some 5 s instead of 30 (too eager for a network that stalls)
# export RAY_health_check_initial_delay_ms=5000 RAY_health_check_period_ms=1000
# export RAY_health_check_timeout_ms=3000 RAY_health_check_failure_threshold=4
"""


def commands(options: argparse.Namespace) -> str:
    """A script that starts Ray on the node that it runs on, as the head or as a node of a role."""
    head = ["--head", f"--node-ip-address={options.head}", f"--port={options.port}", "--dashboard-host=0.0.0.0"]
    head += [f"--dashboard-port={options.dashboard_port}"]
    here = _node(options.head_is, options.num_gpus, options) if options.head_is else ["--num-cpus=0", "--num-gpus=0"]
    others = [f"--address={options.head}:{options.port}"]
    starts = {"head": _start(head + here)}
    starts |= {role: _start(others + _node(role, options.num_gpus, options)) for role in ROLES}
    redis = (
        f"    export RAY_REDIS_ADDRESS={shlex.quote(options.redis)}\n"
        '    # where it has a password: --redis-password="$(cat FILE)" below; Ray shows it in `ps` here: use it '
        "for nothing else\n"
    )
    too = f", which is a {options.head_is} node, too" if options.head_is else ""
    return f"""\
#!/usr/bin/env bash
# A Ray cluster for slime in two jobs, on bare metal. On each node, in the environment that slime runs in:
#     bash THIS-FILE head       first, on {options.head}{too}
#     bash THIS-FILE rollout    on each node for rollouts
#     bash THIS-FILE train      on each node for training
# The head makes a token, ~/.ray/auth_token: copy it, readable for you alone, to the same place on all nodes, and to
# where the jobs are launched from, with
#     export RAY_API_SERVER_ADDRESS=http://{options.head}:{options.dashboard_port} RAY_AUTH_MODE=token
# Nothing is encrypted on its way: use a network that nobody else listens on. `ray stop` ends all your Ray on a node.
set -euo pipefail
{_ENVIRONMENT}
case ${{1:-}} in
head)
    if [ -z "${{RAY_AUTH_TOKEN:-}}" ] && [ ! -s "${{RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}}" ]; then
        (umask 077 && ray get-auth-token --generate >/dev/null)
    fi
{redis if options.redis else ""}\
    {starts["head"]}
    ;;
rollout)
    {starts["rollout"]}
    ;;
train)
    {starts["train"]}
    ;;
*)
    echo "error: say what this node is: head, rollout or train" >&2
    exit 2
    ;;
esac
"""


def slurm(options: argparse.Namespace) -> str:
    """An sbatch script: the first training node is the head, too."""
    image = f'{shlex.quote(f"--container-image={options.image}")} "--container-mounts=$SLURM_SUBMIT_DIR"'
    memory = [f"--object-store-memory={options.object_store_bytes}"] if options.object_store_bytes else []
    return f"""\
#!/usr/bin/env bash
#SBATCH --job-name=slime-cross-job
#SBATCH --nodes={options.nodes_train + options.nodes_rollout}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={options.gpus_per_node}
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time={options.time}
#SBATCH --no-kill
#SBATCH --output=%x-%j.log
# A Ray cluster for slime in two jobs: {options.nodes_train} nodes for training, the first of which is the head, too,
# and {options.nodes_rollout} for rollouts. Submit it from a folder that all nodes share.
#     sbatch THIS-FILE                      it stays until its time is over, or scancel; its log says how to reach it
#     sbatch THIS-FILE COMMAND ARGUMENTS    runs COMMAND on the head, once all nodes are there, and ends with it
set -euo pipefail

# Load modules or activate the environment that slime runs in here, unless it is in an image.

{_ENVIRONMENT}
port={options.port} dashboard_port={options.dashboard_port} nodes_train={options.nodes_train} start_s=300
image=({image if options.image else ""})
options=({shlex.join([f"--num-gpus={options.gpus_per_node}", *memory, "--disable-usage-stats"])})
{_SLURM}"""


_SLURM = r"""
on_node() { # on_node NODE COMMAND...
    srun --overlap --export=ALL --nodes=1 --ntasks=1 --nodelist="$1" --cpu-bind=none \
        ${image[@]+"${image[@]}"} "${@:2}"
}

within() { # within SECONDS WHAT COMMAND...: until the command succeeds, or end with an error
    local deadline=$((SECONDS + $1))
    until "${@:3}" 2>/dev/null; do
        kill -0 "$head_step" 2>/dev/null || { echo "error: Ray's head on $head_node ended" >&2 && exit 1; }
        ((SECONDS < deadline)) || { echo "error: not ready within $1 s: $2" >&2 && exit 1; }
        sleep 2
    done
}

listens() {
    : <>"/dev/tcp/$head_address/$dashboard_port"
}

all_there() {
    local alive
    alive=$(on_node "$head_node" timeout 60 \
        ray list nodes --address="$api" --filter=state=ALIVE --limit=10000 --format=json)
    [ "$(grep -o '"node_id"' <<<"$alive" | wc -l)" -ge "${#nodes[@]}" ]
}

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_node=${nodes[0]}
head_address=$(srun --overlap --nodes=1 --ntasks=1 --nodelist="$head_node" hostname --ip-address)
head_address=${head_address%% *} # a node may have several: put the right one here
api=http://$head_address:$dashboard_port

token=$SLURM_SUBMIT_DIR/ray-token-$SLURM_JOB_ID
trap 'rm -f "$token"' EXIT
(umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$token")
RAY_AUTH_TOKEN=$(cat "$token")
export RAY_AUTH_TOKEN

on_node "$head_node" ray start --block --head --node-ip-address="$head_address" --port="$port" \
    --dashboard-host=0.0.0.0 --dashboard-port="$dashboard_port" --resources='{"train": 1}' "${options[@]}" &
head_step=$!
within "$start_s" "Ray's head on $head_node" listens

for index in "${!nodes[@]}"; do
    role=train
    ((index < nodes_train)) || role=rollout
    ((index == 0)) || on_node "${nodes[index]}" ray start --block --address="$head_address:$port" \
        --resources="{\"$role\": 1}" "${options[@]}" &
done
within "$start_s" "all ${#nodes[@]} nodes in the cluster" all_there

echo "Ray runs on ${nodes[*]}. To launch jobs, where $head_address is reached:"
echo "    export RAY_API_SERVER_ADDRESS=$api RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token"
if [ $# -gt 0 ]; then
    on_node "$head_node" env RAY_API_SERVER_ADDRESS="$api" "$@"
else
    wait "$head_step"
fi
"""


def _start(options: list[str]) -> str:
    return shlex.join(["ray", "start", *options, "--disable-usage-stats"])


def _node(role: str, num_gpus: int | None, options: argparse.Namespace) -> list[str]:
    words = [f"--resources={json.dumps({role: 1})}"]
    words += [f"--num-gpus={num_gpus}"] if num_gpus is not None else []
    return words + ([f"--object-store-memory={options.object_store_bytes}"] if options.object_store_bytes else [])
