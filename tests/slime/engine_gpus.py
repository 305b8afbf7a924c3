"""Which GPU slime's own SGLangEngine would use, asked in actors that hold one each: engine_gpus.py, as a Ray job.

Says, for an ordinary job and for a rollout job, the base GPU id of each engine beside the GPU that Ray gave its actor.
"""

import json
from types import SimpleNamespace

import ray


@ray.remote(num_gpus=1, num_cpus=0.1)
def ask(rank: int, role: str | None) -> tuple[int, int]:
    from slime.backends.sglang_utils.sglang_engine import get_base_gpu_id

    sizes = {"rollout_num_gpus_per_node": 4, "rollout_num_gpus_per_engine": 1, "actor_num_gpus_per_node": 2}
    args = SimpleNamespace(**sizes, actor_num_nodes=1, colocate=False, cross_job_role=role)
    return get_base_gpu_id(args, rank), int(ray.get_gpu_ids()[0])


if __name__ == "__main__":
    ray.init(address="auto", log_to_driver=False)
    for role in (None, "rollout"):
        pairs = [ray.get(ask.remote(rank, role)) for rank in range(2)]
        print("SAID", json.dumps({"role": role, "pairs": pairs}), flush=True)
