"""launch_cluster.sh: what it prints for bare metal and Slurm is sound, and does what it says; how it calls docker."""

import contextlib
import itertools
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import launch_cluster
from local_cluster import free_ports
from tests.support.patience import patient

SCRIPTS = Path(launch_cluster.__file__).parent
COMMANDS = "commands --head 10.0.0.1 "
SLURM = "slurm --nodes-rollout 1 --nodes-train 2 "


def printed(capsys, words: str) -> str:
    assert launch_cluster.main(shlex.split(words)) == 0
    return capsys.readouterr().out


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    "words",
    [
        COMMANDS,
        COMMANDS + "--head-is train --redis r:6379 --num-gpus 8 --object-store-bytes 9 --port 1",
        SLURM,
        SLURM + "--image registry#image:1 --time 1:00:00 --gpus-per-node 4 --object-store-bytes 9",
        SLURM + "--image 'an image'",
    ],
)
def test_printed_scripts_are_sound(words, capsys, tmp_path):
    script = tmp_path / "script.sh"
    script.write_text(printed(capsys, words))
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    checked = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("node", "options", "started"),
    [
        ("head", "", "--head --node-ip-address=10.0.0.1 --port=6379 --dashboard-host=0.0.0.0 --dashboard-port=8265"),
        ("rollout", "--num-gpus 8", '--address=10.0.0.1:6379 --resources={"rollout": 1} --num-gpus=8'),
        (
            "train",
            "--object-store-bytes 9",
            '--address=10.0.0.1:6379 --resources={"train": 1} --object-store-memory=9',
        ),
    ],
)
def test_commands_start_ray_on_each_kind_of_node(node, options, started, capsys, tmp_path):
    program(tmp_path, "ray", 'echo "$RAY_AUTH_MODE $RAY_JOB_STOP_WAIT_TIME_S ${RAY_REDIS_ADDRESS:-}: $*"')
    text = printed(capsys, COMMANDS + "--redis r:1 " + options)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "RAY_AUTH_TOKEN": "t"}
    done = subprocess.run(["bash", "-s", node], input=text, env=env, capture_output=True, text=True, check=True)
    redis, alone = ("r:1", "--num-cpus=0 --num-gpus=0 ") if node == "head" else ("", "")
    assert done.stdout == f"token 600 {redis}: start {started} {alone}--disable-usage-stats\n"


def test_the_head_makes_a_token_once(capsys, tmp_path):
    program(tmp_path, "ray", '[ "$1" = start ] || { echo "$*" && mkdir -p ~/.ray && echo t >~/.ray/auth_token; } >&2')
    text = printed(capsys, COMMANDS)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    said = [
        subprocess.run(["bash", "-s", "head"], input=text, env=env, capture_output=True, text=True, check=True).stderr
        for _ in range(2)
    ]
    assert said == ["get-auth-token --generate\n", ""]
    assert (tmp_path / ".ray/auth_token").stat().st_mode & 0o777 == 0o600


SLURM_STUBS = {
    "scontrol": "printf '%s\\n' n0 n1 n2",
    "hostname": "echo 127.0.0.1 10.0.0.9",
    "sleep": "exec /bin/sleep 0.05",
    "srun": 'echo "srun $*" >>"$LOG"; while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "ray": """
        [ ${#RAY_AUTH_TOKEN} = 64 ] && [ "$RAY_AUTH_MODE" = token ] || exit 1
        case "$*" in
        *"start --block --head"*) [ -z "$BROKEN" ] && exec "$PYTHON" -c "$LISTEN" ;;
        start*) exec /bin/sleep 20 ;;
        list*) grep -c 'ray start' "$LOG" | xargs seq | sed 's/.*/{"node_id": &}/' | tr '\\n' , ;;
        esac""",
}
LISTEN = """
import os, socket, time
s = socket.create_server(("127.0.0.1", int(os.environ["DASHBOARD"])))
time.sleep(20)
"""


def run_slurm(capsys, tmp_path: Path, port: int, *command: str, broken: str = "") -> subprocess.CompletedProcess[str]:
    for name, text in SLURM_STUBS.items():
        program(tmp_path, name, text)
    script = printed(capsys, SLURM + f"--dashboard-port {port} --image slime:1")
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable, "LISTEN": LISTEN, "BROKEN": broken}
    env |= {"LOG": str(tmp_path / "log"), "DASHBOARD": str(port), "SLURM_JOB_NODELIST": "n[0-2]", "SLURM_JOB_ID": "7"}
    env |= {"SLURM_SUBMIT_DIR": str(tmp_path)}
    out = {"stdout": (tmp_path / "out").open("w"), "stderr": subprocess.STDOUT}  # not waiting for what is left behind
    words = ["bash", "-s", "--", *command]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, env=env, start_new_session=True, text=True, **out)
    try:
        process.communicate(script, timeout=patient(60))
    finally:
        with contextlib.suppress(ProcessLookupError):  # not the program `kill`: of -12345 procps 4.0.2 reads -1, all
            os.killpg(process.pid, signal.SIGKILL)  # as Slurm would
    return subprocess.CompletedProcess(words, process.returncode, (tmp_path / "out").read_text())


def test_the_slurm_script_starts_head_then_nodes_then_the_command(capsys, tmp_path, free_port):
    done = run_slurm(capsys, tmp_path, free_port, "bash", "-c", "echo at $RAY_API_SERVER_ADDRESS; exit 3")
    assert done.returncode == 3, done.stdout
    assert f"at http://127.0.0.1:{free_port}\n" in done.stdout
    assert "Ray runs on n0 n1 n2." in done.stdout
    assert not (tmp_path / "ray-token-7").exists()
    log = (tmp_path / "log").read_text().splitlines()
    starts = [line for line in log if "ray start" in line]
    assert all(f"--container-image=slime:1 --container-mounts={tmp_path} ray start" in line for line in starts)
    assert "--nodelist=n0" in starts[0]
    assert "--head --node-ip-address=127.0.0.1 --port=6379" in starts[0]
    assert '--resources={"train": 1} --num-gpus=8' in starts[0]
    others = sorted(line.partition("--nodelist=")[2] for line in starts[1:])
    for line, (node, role) in itertools.zip_longest(others, (("n1", "train"), ("n2", "rollout"))):
        assert line.startswith(node)
        assert f'--address=127.0.0.1:6379 --resources={{"{role}": 1}} --num-gpus=8' in line


def test_the_slurm_script_ends_when_the_head_does(capsys, tmp_path, free_port):
    done = run_slurm(capsys, tmp_path, free_port, broken="yes")
    assert done.returncode == 1
    assert done.stdout == "error: Ray's head on n0 ended\n"


@pytest.fixture
def free_port() -> int:
    return free_ports(1)[0]


@pytest.mark.parametrize(("plugin", "program_words"), [(True, ["docker", "compose"]), (False, ["docker-compose"])])
def test_compose_calls_what_docker_there_is(plugin, program_words, monkeypatch, tmp_path):
    program(tmp_path, "docker", f'[ "$*" = "compose version" ] && exit {0 if plugin else 1}')
    program(tmp_path, "docker-compose", "exit 1")
    called = []
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(launch_cluster, "COMPOSE_FILE", tmp_path)
    monkeypatch.setattr(os, "execvp", lambda name, words: called.append(words))
    launch_cluster.main(["compose", "up", "--build", "--rollout", "2", "-d"])
    launch_cluster.main(["compose", "ps"])
    begin = [*program_words, "-f", str(tmp_path)]
    assert called == [[*begin, "up", "--scale=rollout=2", "--build", "-d"], [*begin, "ps"]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("compose down --train 1", "--train goes with up"),
        ("local --stop", "no cluster was started here with launch_cluster.sh local"),
        ("commands", "required: --head"),
        ("slurm --nodes-rollout 1", "required: --nodes-train"),
        ("slurm --nodes-rollout 1 --nodes-train 0", "--nodes-train: 0: at least 1"),
        ("local --image x", "local takes no --image"),
    ],
)
def test_what_does_not_work_is_said(words, said, tmp_path):
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    program(tmp_path, "docker", "true")
    command = [SCRIPTS / "launch_cluster.sh", *words.split()]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in done.stderr
