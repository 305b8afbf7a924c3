"""Starts an engine's server for both eras: real SGLang on the CPU, or the toy engine with SLIME_CPU_ENGINE=toy.

The server is a child that the kernel kills when the engine's Ray actor dies, so it belongs to the job that started it.
Its output goes to the folder SLIME_CPU_LOG_DIR where that is set.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import requests

HERE = Path(__file__).resolve().parent
CPU_FLAGS = [
    *("--device", "cpu", "--attention-backend", "torch_native", "--disable-radix-cache", "--dtype", "float32"),
    *("--max-total-tokens", "8192", "--max-running-requests", "64", "--mem-fraction-static", "0.1"),
    *("--skip-server-warmup", "--sleep-on-idle", "--random-seed", "1234"),
]
CPU_ENVIRONMENT = {"SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def start(
    model_path: str, host: str, port: int, weight_version: str | None = None, timeout_s: float = 300
) -> subprocess.Popen:
    """Start the server and wait until it answers.

    Raises RuntimeError when it ends or stays silent for timeout_s.
    """
    if os.environ.get("SLIME_CPU_ENGINE") == "toy":
        command = [sys.executable, str(HERE / "toy_engine.py")]
    else:
        command = [sys.executable, "-m", "sglang.launch_server", *CPU_FLAGS]
    command += ["--model-path", model_path, "--host", host, "--port", str(port)]
    command += ["--weight-version", weight_version] if weight_version else []
    wrapper = [sys.executable, str(HERE / "die_with_parent.py"), str(os.getpid())]
    folder = os.environ.get("SLIME_CPU_LOG_DIR")
    with Path(folder, f"engine-{port}.log").open("w") if folder else Path(os.devnull).open("w") as output:
        process = subprocess.Popen(
            wrapper + command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **CPU_ENVIRONMENT}
        )
    deadline = time.monotonic() + timeout_s
    while not healthy(f"http://{host}:{port}"):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise RuntimeError(f"no server on port {port}: set SLIME_CPU_LOG_DIR and see engine-{port}.log there")
        time.sleep(0.2)
    return process


def healthy(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=5).status_code == 200
    except requests.RequestException:
        return False
