"""Two jobs' scripts: the same dumped rollouts through slime's own classes, from another job and within one.

    equal.py SLIME-ARGUMENTS --cross-job-role rollout   publishes each case from slime's Buffer or RolloutManager
    equal.py SLIME-ARGUMENTS --cross-job-role train     reads each case on every data-parallel rank, as published
                                                        and through a single job's box, and compares

The cases are all combinations of balanced data, GRPO normalisation and rollout log-probs, each twice.
"""

import itertools
import json
import random
from argparse import Namespace
from pathlib import Path

import numpy as np
import ray
import torch

RANKS = 2
CASES = list(itertools.product(("balance", ""), ("normalise", ""), ("log-probs", ""), ("first", "second")))


def case_arguments(args: Namespace, case: tuple[str, ...], cross_job: bool) -> Namespace:
    """slime's arguments with what the case says."""
    changed = {"balance_data": bool(case[0]), "rewards_normalization": bool(case[1]), "grpo_std_normalization": True}
    if not cross_job:
        changed |= {"enable_cross_job_communication": False, "cross_job_role": None}
    return Namespace(**{**vars(args), **changed})


def dump(args: Namespace, number: int) -> None:
    """Write the dumped rollout of a case as slime's --save-debug-rollout-data does; random, the same every time."""
    from slime.utils.types import Sample

    draw = random.Random(number)
    samples = []
    for index in range(args.rollout_batch_size * args.n_samples_per_prompt):
        prompt, length = draw.randrange(1, 40), draw.randrange(1, 60)
        sample = Sample(
            index=1000 * number + index,
            tokens=[draw.randrange(150_000) for _ in range(prompt + length)],
            response_length=length,
            reward=draw.choice([draw.random(), 0.1, 1 / 3, 1.0]),
            loss_mask=draw.choice([None, [draw.randrange(2) for _ in range(length)]]),
            status=draw.choice([Sample.Status.COMPLETED, Sample.Status.TRUNCATED]),
            metadata={"round_number": draw.randrange(5)} if CASES[number][3] == "second" else {},
        )
        if CASES[number][2] and hasattr(sample, "rollout_log_probs"):
            sample.rollout_log_probs = [-draw.expovariate(0.3) for _ in range(length)]
        samples.append(sample.to_dict())
    if CASES[number][3] == "second":
        samples[0]["metadata"]["raw_reward"] = 0.25
        for sample in samples:
            sample["metadata"].setdefault("raw_reward", draw.random())
    path = Path(args.load_debug_rollout_data.format(rollout_id=number))
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"rollout_id": number, "samples": samples}, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)


def make_manager(args: Namespace) -> ray.actor.ActorHandle:
    """slime's actor that generates, at this pin."""
    try:
        import slime.ray.buffer
    except ModuleNotFoundError:
        from slime.ray.rollout import RolloutManager

        manager = RolloutManager.remote(args, (None, [], []))
        config = {"dp_size": RANKS, "cp_size": 1, "vpp_size": 1, "microbatch_group_size_per_vp_stage": 1}
        ray.get(manager.set_train_parallel_config.remote(config))
        return manager
    actor = getattr(slime.ray.buffer, "RolloutController", None) or slime.ray.buffer.Buffer
    return actor.remote(args, None)


def set_arguments(manager: object, args: Namespace) -> None:
    """In the actor's process: its next rollout follows these arguments."""
    manager.args = args


@ray.remote(num_cpus=1)
class Rank:
    """One data-parallel rank: reads as slime's training actor does."""

    def join(self, rank: int, address: str) -> None:
        import gpt
        import layout
        import torch.distributed as dist

        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
        gpt.use_cpu()
        layout.join_parallel_groups()
        self.rank = rank

    def compare(
        self, args: Namespace, case: tuple[str, ...], single: object, published: object
    ) -> tuple[list[str], list[str]]:
        """(keys of slime's rollout data, differences). Any process may get what a box holds."""
        try:
            from slime.backends.utils.data import process_rollout_data
        except ModuleNotFoundError:
            from slime.utils.data import process_rollout_data

        for box in published if isinstance(published, list) else [published]:
            assert len(ray.get(box.inner)["tokens"]) > 0
            assert box.job_id == args.job_id
            assert (CASES[box.rollout_id], box.version) == (case, 1)
        theirs = process_rollout_data(args, single, self.rank, RANKS)
        ours = process_rollout_data(args, published, self.rank, RANKS)
        if list(theirs) != list(ours):
            return [*theirs], [f"keys {[*theirs]} {[*ours]}"]
        return [*theirs], [diff for key in theirs for diff in differences(key, theirs[key], ours[key])]


def differences(where: str, theirs: object, ours: object) -> list[str]:
    """Where two values differ in type, shape, or any bit."""
    if type(theirs) is not type(ours):
        return [f"{where}: {type(theirs)} {type(ours)}"]
    if isinstance(theirs, np.ndarray):
        theirs, ours = torch.from_numpy(theirs), torch.from_numpy(ours)
    if isinstance(theirs, torch.Tensor):
        same = (theirs.dtype, theirs.device, theirs.shape) == (ours.dtype, ours.device, ours.shape)
        bits = [one.contiguous().flatten().view(torch.uint8) for one in (theirs, ours)]
        equal = same and bits[0].equal(bits[1])
        return [] if equal else [f"{where}: {theirs} {ours}"]
    if isinstance(theirs, dict):
        return differences(where, [*theirs.items()], [*ours.items()])
    if isinstance(theirs, (list, tuple)):
        if len(theirs) != len(ours):
            return [f"{where}: {len(theirs)} and {len(ours)} items"]
        return [d for i, pair in enumerate(zip(theirs, ours)) for d in differences(f"{where}[{i}]", *pair)]
    return [] if repr(theirs) == repr(ours) else [f"{where}: {theirs!r} {ours!r}"]


def rollout(args: Namespace) -> None:
    from slime.cross_job import Producer

    with Producer(args.job_id) as producer:
        manager = make_manager(args)
        for number, case in enumerate(CASES):
            dump(args, number)
            ray.get(manager.__ray_call__.remote(set_arguments, case_arguments(args, case, cross_job=True)))
            parts = RANKS if hasattr(manager, "set_train_parallel_config") else 1
            producer.publish_from(number, manager, "generate", rollout_id=number, parts=parts)


def train(args: Namespace) -> None:
    from slime.cross_job import Consumer
    from slime.cross_job.adapter.boxes import boxes_of

    ranks = [Rank.remote() for _ in range(RANKS)]
    address = f"file://{args.load_debug_rollout_data}.join"
    ray.get([rank.join.remote(i, address) for i, rank in enumerate(ranks)])
    manager = make_manager(case_arguments(args, CASES[0], cross_job=False))
    with Consumer(args.job_id) as consumer:
        for number, case in enumerate(CASES):
            claimed = consumer.claim(number, timeout_s=120)
            boxes = boxes_of(claimed)
            alone = case_arguments(args, case, cross_job=False)
            ray.get(manager.__ray_call__.remote(set_arguments, alone))
            single = ray.get(manager.generate.remote(number))
            published = boxes if isinstance(single, list) else boxes[0]
            seen = ray.get([rank.compare.remote(alone, case, single, published) for rank in ranks])
            told = {"case": case, "keys": seen[0][0], "differences": [d for _, diffs in seen for d in diffs][:5]}
            print("SAID", json.dumps(told), flush=True)
            claimed.ack()


if __name__ == "__main__":
    from slime.utils.arguments import parse_args

    arguments = parse_args()
    ray.init(address="auto", log_to_driver=False)
    {"rollout": rollout, "train": train}[arguments.cross_job_role](arguments)
