"""Stands for slime's SGLangEngine at 079dbcf and v0.1.0: starts a server of its own on the CPU and registers it.

slime's own class builds a ServerArgs dataclass, which SGLang 0.5.23 no longer is. Needs sglang-router 0.1.9, which
still has /add_worker, as those pins call it. Which server: sgl_server.
"""

import time

import requests
import sgl_server
from slime.ray.ray_actor import RayActor
from slime.utils.http_utils import get_host_info


class SGLangEngine(RayActor):
    def __init__(self, args, rank):
        self.args, self.rank = args, rank
        if getattr(args, "cross_job_role", None) is not None:  # as the patch inserts it into slime's own class
            from slime.cross_job.adapter import hooks

            hooks.engine_ports()

    def init(self, dist_init_addr, port, nccl_port):
        host = get_host_info()[1]
        self.url = f"http://{host}:{port}"
        self.process = sgl_server.start(
            self.args.hf_checkpoint, host, port, getattr(self.args, "sglang_weight_version", None)
        )
        self.router = f"http://{self.args.sglang_router_ip}:{self.args.sglang_router_port}"
        requests.post(f"{self.router}/add_worker?url={self.url}", timeout=60).raise_for_status()

    def get_url(self):
        return self.url

    def _make_request(self, endpoint, payload=None):
        response = requests.post(f"{self.url}/{endpoint}", json=payload or {}, timeout=300)
        response.raise_for_status()
        return response.json()

    def flush_cache(self, timeout_s=60):
        """A server with requests running refuses: ask again, as slime does."""
        deadline = time.monotonic() + timeout_s
        while requests.get(f"{self.url}/flush_cache", timeout=60).status_code != 200:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.url} still has requests after {timeout_s} s")
            time.sleep(0.1)

    def update_weights_from_disk(self, model_path, weight_version=None):
        answer = self._make_request(
            "update_weights_from_disk", {"model_path": model_path, "weight_version": weight_version}
        )
        if not answer.get("success"):
            raise RuntimeError(f"{self.url} did not load {model_path}: {answer}")

    def pause_generation(self):
        self._make_request("pause_generation")

    def continue_generation(self):
        self._make_request("continue_generation")

    def release_memory_occupation(self):
        self.flush_cache()
        return self._make_request("release_memory_occupation")

    def resume_memory_occupation(self, tags=None):
        return self._make_request("resume_memory_occupation", {"tags": tags})

    def shutdown(self):
        requests.post(f"{self.router}/remove_worker?url={self.url}", timeout=60)
        self.process.kill()
        self.process.wait()
