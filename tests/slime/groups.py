"""A train job's process group with a real SGLang server, thrice: groups.py MODEL PORT. gloo stands for NCCL.

Says what the server answers to a second group of the same name, before and after cross-job has ended the first.
"""

import json
import socket
import sys
import threading
from datetime import timedelta

import ray
import requests
import torch.distributed as dist

GROUP = "slime-pp_0"


@ray.remote(num_cpus=0.1)
class Engine:
    """Stands for slime's SGLangEngine up to v0.1: the one method that is called, on a server that it starts."""

    def __init__(self, model: str, port: int):
        import sgl_server

        self.url = f"http://127.0.0.1:{port}"
        self.process = sgl_server.start(model, "127.0.0.1", port)

    def _make_request(self, endpoint: str, payload: dict) -> dict:
        response = requests.post(f"{self.url}/{endpoint}", json=payload, timeout=60)
        response.raise_for_status()
        return response.json()


def join(port: int) -> dict:
    """Make the group from a train job's side; the server's answer."""
    from sglang.srt.utils.common import init_custom_process_group

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        master = free.getsockname()[1]
    answer: dict = {}

    def ask() -> None:
        body = {"master_address": "127.0.0.1", "master_port": master, "rank_offset": 1, "world_size": 2}
        body |= {"group_name": GROUP, "backend": "gloo"}
        answer.update(
            requests.post(f"http://127.0.0.1:{port}/init_weights_update_group", json=body, timeout=60).json()
        )

    server = threading.Thread(target=ask)
    server.start()
    try:
        address = f"tcp://127.0.0.1:{master}"
        group = init_custom_process_group(
            "gloo", address, timeout=timedelta(seconds=10), world_size=2, rank=0, group_name=GROUP
        )
        dist.destroy_process_group(group)  # here only: a train job that is killed leaves its end in the engine
    except Exception as error:
        answer["error"] = repr(error)
    server.join()
    return answer


if __name__ == "__main__":
    from slime.cross_job.adapter import update_groups

    model, port = sys.argv[1], int(sys.argv[2])
    ray.init(address="auto", log_to_driver=False)
    engine = Engine.remote(model, port)
    update_groups.end([engine], [GROUP])  # there is none yet
    print("SAID", json.dumps(join(port)), flush=True)
    print("SAID", json.dumps(join(port)), flush=True)
    update_groups.end([engine], [GROUP])
    print("SAID", json.dumps(join(port)), flush=True)
