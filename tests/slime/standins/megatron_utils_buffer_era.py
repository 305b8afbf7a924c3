"""Stands for slime.backends.megatron_utils at 079dbcf and v0.1.0: arguments, and an actor that learns on the CPU.

The weight update keeps the order of slime's UpdateWeightFromDistributed (pause, flush, lock, send, unlock, continue,
with the barriers between); what is sent is a folder under SLIME_CPU_WEIGHT_DIR instead of an NCCL broadcast.
"""

import os
import shutil
import time
from datetime import timedelta
from pathlib import Path

import ray
import torch.distributed as dist
from hold import held
from megatron_cli import build_parser

try:
    from slime.ray.train_actor import TrainRayActor  # v0.1.0
except ModuleNotFoundError:
    from slime.ray.ppo_actor import TrainRayActor  # 079dbcf

# SGLang 0.5.23 names these options' destinations differently from the releases of slime's time.
RENAMED = (
    ("data_parallel_size", "dp_size"),
    ("pipeline_parallel_size", "pp_size"),
    ("expert_parallel_size", "ep_size"),
)


def parse_args(extra_args_provider):
    args = extra_args_provider(build_parser()).parse_args()
    for old, new in RENAMED:
        if not hasattr(args, f"sglang_{old}"):
            setattr(args, f"sglang_{old}", getattr(args, f"sglang_{new}", 1))
    return args


def validate_args(args):
    return args


def set_default_megatron_args(args):
    return args


class MegatronTrainRayActor(TrainRayActor):
    def init(self, args, role, wandb_run_id, with_ref=False):
        self.args = args
        if args.debug_rollout_only:
            return 0
        import layout
        from trainer import Trainer  # needs torch, megatron: not in the processes that only name this class

        if max(layout.sizes(args)) > 1:
            raise ValueError("the stand-in trains with model parallelism only at v0.3.1")
        dist.init_process_group("gloo", timeout=timedelta(minutes=args.distributed_timeout_minutes))
        args.rank, args.world_size = dist.get_rank(), dist.get_world_size()
        self.rollout_engines, self.data_buffer, self.weight_version = None, None, 0
        self.trainer = Trainer(args)
        return self.trainer.load()

    def train(self, rollout_id, rollout_data_ref):
        if self.args.debug_rollout_only:
            return
        from slime.backends.utils.data import process_rollout_data

        data = process_rollout_data(self.args, rollout_data_ref, dist.get_rank(), dist.get_world_size())
        self.trainer.train(rollout_id, data)

    def save_model(self, iteration, with_optimizer=True):
        if not self.args.debug_rollout_only:
            self.trainer.save(iteration)

    def set_data_buffer(self, data_buffer):
        self.data_buffer = data_buffer

    def connect_rollout_engines(self, rollout_engines, rollout_engine_lock):
        """May be called again with other engines: the new ones replace the old."""
        self.rollout_engines, self.rollout_engine_lock = rollout_engines, rollout_engine_lock
        if not (self.args.debug_train_only or self.args.debug_rollout_only):
            dist.barrier()

    def update_weights(self):
        if self.args.debug_train_only or self.args.debug_rollout_only:
            return
        self.weight_version += 1
        if dist.get_rank() == 0:
            ray.get([engine.pause_generation.remote() for engine in self.rollout_engines])
            ray.get([engine.flush_cache.remote() for engine in self.rollout_engines])
        dist.barrier()
        folder = Path(os.environ["SLIME_CPU_WEIGHT_DIR"]) / f"weight_v{self.weight_version:06d}"
        self.trainer.export(folder)
        if dist.get_rank() == 0:
            self._send(str(folder))
            shutil.rmtree(folder)
        dist.barrier()
        if dist.get_rank() == 0:
            ray.get([engine.continue_generation.remote() for engine in self.rollout_engines])
        dist.barrier()
        urls = ray.get([engine.get_url.remote() for engine in self.rollout_engines])
        self.trainer.probe(urls, version=self.weight_version)

    def _send(self, folder):
        while not ray.get(self.rollout_engine_lock.acquire.remote()):
            time.sleep(0.1)
        while held("SLIME_CPU_HOLD_UPDATE", self.weight_version):
            time.sleep(0.1)
        version = str(self.weight_version)
        ray.get([engine.update_weights_from_disk.remote(folder, version) for engine in self.rollout_engines])
        ray.get(self.rollout_engine_lock.release.remote())

    def sleep(self, tags): ...
    def wake_up(self, tags): ...
    def eval(self, rollout_id, rollout_data_ref): ...
