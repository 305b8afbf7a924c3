"""GRPO and PPO on the CPU for the training actors of all pins: stands for slime's Megatron losses, optimizer, saving.

Takes what slime's own process_rollout_data gives to a data-parallel rank. The loss is slime's default: the clipped
policy-gradient loss, a mean over each response's tokens, then over the global batch; the old log-probs are the
model's own before the first step (those of the rollout with --use-rollout-logprobs); the advantage of every token is
the reward that slime has normalised, or what PPO's critic makes of it (critic.py). Sums have one order (one thread,
micro-batches in turn, one all-reduce over the ranks), so equal inputs give equal bits.

--use-tis weighs tokens as slime's vanilla TIS does.
Not here, and refused: KL terms, entropy bonus, learning-rate schedules; before v0.3.1 also model parallelism
(layout.py), and dynamic batch sizes, which slime makes on the training side there.
"""

import hashlib
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import critic
import gpt
import layout
import probe
import torch
import torch.distributed as dist
import weights

REFUSED = (
    "kl_coef",
    "use_kl_loss",
    "entropy_coef",
    "custom_tis_function_path",
    "normalize_advantages",
    "keep_old_actor",
)
MORE = (  # not trained on here, but hashed
    *("multimodal_train_inputs", "rollout_routed_experts"),
    *("rollout_top_p_token_ids", "rollout_top_p_token_offsets"),
)
TRACKER = "latest_checkpointed_iteration.txt"


def iteration_folder(root: str, rollout_id: int) -> Path:
    return Path(root) / f"iter_{rollout_id:07d}"


def log(event: str, **fields: object) -> None:
    """One JSON line to the file that SLIME_CPU_TRAIN_LOG names, by rank 0. Floats are exact: json writes repr."""
    if dist.get_rank() == 0 and (path := os.environ.get("SLIME_CPU_TRAIN_LOG")):
        with Path(path).open("a") as file:
            file.write(json.dumps({"event": event, "at": time.time(), **fields}) + "\n")


class Trainer:
    """One rank (layout.py) of the actor or of PPO's critic; the default process group must be there."""

    def __init__(self, args, role: str = "actor") -> None:
        if wrong := [name for name in REFUSED if getattr(args, name, None)]:
            raise ValueError(f"the stand-in does not do {wrong}")
        self.args, self.role, self.rank, self.world = args, role, dist.get_rank(), dist.get_world_size()
        gpt.use_cpu()
        layout.join_parallel_groups(*layout.sizes(args))
        if max(layout.sizes(args)) > 1 and (role == "critic" or os.environ.get("SLIME_CPU_PROBE") == "1"):
            raise ValueError("the stand-in's critic and its probe of engines need the whole model in one rank")
        torch.manual_seed(args.seed)
        self.model = gpt.build(weights.read_config(args.hf_checkpoint))
        if role == "critic":
            self.model.output_layer = critic.ValueHead(self.model.config.hidden_size)
        self.params = [param for _, param in sorted(self.model.named_parameters())]
        self.adam = torch.optim.Adam(
            self.params, args.lr, (args.adam_beta1, args.adam_beta2), args.adam_eps, args.weight_decay, foreach=False
        )

    def load(self) -> int:
        """Load the checkpoint of --load where it holds one, else the Hugging Face weights; gives start_rollout_id."""
        tracker = Path(self.args.load or "") / TRACKER
        if self.args.load is None or not tracker.exists():
            tensors = weights.load_folder(self.args.hf_checkpoint)
            gpt.load_named(self.model, critic.with_head(tensors, self.model) if self.role == "critic" else tensors)
            self.log("init", start_rollout_id=0)
            return 0
        rollout_id = self.args.ckpt_step if self.args.ckpt_step is not None else int(tracker.read_text())
        state = torch.load(iteration_folder(self.args.load, rollout_id) / "state.pt", weights_only=False)
        gpt.load_named(self.model, state["model"])
        if not self.args.no_load_optim:
            if state["layout"] != layout.sizes(self.args)[:2]:
                raise ValueError(f"the stand-in's optimizer state is of tensor, pipeline size {state['layout']}")
            self.adam.load_state_dict(state["adam"][layout.shard()])
        if not self.args.no_load_rng:
            torch.set_rng_state(state["torch_rng"])
            random.setstate(state["python_rng"])
        self.log("init", start_rollout_id=rollout_id + 1)
        return rollout_id + 1

    def save(self, rollout_id: int) -> None:
        """Write model, optimizer and generators; a reader of the tracker file finds a complete checkpoint."""
        model, adam = gpt.to_named(self.model), layout.shards(self.adam.state_dict())
        if self.rank == 0:
            state = {
                "model": model,
                "layout": layout.sizes(self.args)[:2],
                "adam": adam,
                "torch_rng": torch.get_rng_state(),
                "python_rng": random.getstate(),
            }
            folder = iteration_folder(self.args.save, rollout_id)
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(state, folder / "state.pt.partial")
            (folder / "state.pt.partial").replace(folder / "state.pt")
            tracker = Path(self.args.save) / TRACKER
            partial = tracker.with_suffix(".partial")
            partial.write_text(str(rollout_id))
            partial.replace(tracker)
        self.log("save", rollout_id=rollout_id)
        dist.barrier()

    def log(self, event: str, **fields: object) -> None:
        """Every rank must call it, for the checksum."""
        log(event, role=self.role, checksum=self.checksum(), **fields)

    def checksum(self) -> str:
        return weights.checksum(gpt.to_named(self.model))

    def export(self, folder: str | Path) -> None:
        """Rank 0 writes the weights as a Hugging Face folder; every rank returns when it is there."""
        model = gpt.to_named(self.model)
        if self.rank == 0:
            weights.save_folder(folder, model, like=self.args.hf_checkpoint)
        dist.barrier()

    def probe(self, urls: list[str], **fields: object) -> None:
        """With SLIME_CPU_PROBE=1, log how far each server's log-probs are from the model's, and the checksums."""
        if self.rank == 0 and os.environ.get("SLIME_CPU_PROBE") == "1":
            servers = [probe.score(self.model, url) for url in urls]
            log("probe", trainer_checksum=self.checksum(), servers=servers, **fields)
        dist.barrier()

    def train(self, rollout_id: int, data: dict, values: list | None = None) -> list | None:
        """Optimizer steps over one rollout's data of this rank.

        Args:
            values: those of the critic, of each response token of each sample, for the actor's advantages.

        Returns those values from the critic, as they were before its first step.
        """
        batch = Batch(self.args, data)
        tokens_digest = self._digest(batch, [data[name] for name in MORE if name in data])
        if self.role == "critic":
            values = critic.values(self.model, batch)
            loss_of = critic.loss(self.args, self.model, batch, values)
        else:
            if values is not None:
                batch.advantages, _ = critic.advantages_and_returns(self.args, batch, values)
            with torch.no_grad():
                for micro in batch.micros():
                    computed = gpt.response_log_probs(self.model, *batch.inputs(micro))
                    if layout.is_last_stage():
                        batch.set_old_log_probs(micro, computed)
            loss_of = partial(self._policy_loss, batch)
        gap = None if batch.gap is None else layout.of_last_stage(batch.gap)
        raw = [float(reward) for reward in data["raw_reward"]]
        for index, step in enumerate(batch.steps):
            loss, norm = self._step(step, loss_of)
            log(
                "train" if self.role == "actor" else "train_critic",
                rollout_id=rollout_id,
                step=index,
                loss=loss,
                grad_norm=norm,
                raw_reward=math.fsum(raw) / len(raw),
                checksum=self.checksum(),
                samples=batch.global_batch,
                micro_batches=[len(micro) for micro in step],
                tokens=tokens_digest,
                columns=sorted(data),
                rollout_logprob_gap=gap,
            )
        return values if self.role == "critic" else None

    def _policy_loss(self, batch: "Batch", micro: list[int]) -> torch.Tensor:
        computed = gpt.response_log_probs(self.model, *batch.inputs(micro))
        return batch.loss(micro, computed) if layout.is_last_stage() else computed

    def _step(self, step: list[list[int]], loss_of: Callable[[list[int]], torch.Tensor]) -> tuple[float, float]:
        self.adam.zero_grad(set_to_none=False)
        total = torch.zeros(1, dtype=torch.float64)
        for micro in step:
            loss = loss_of(micro)
            loss.backward()
            total += loss.detach()
        layout.sum_over_data(total)
        flat = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in self.params])
        layout.sum_over_data(flat)  # losses are divided by the global batch already
        grads = flat.split([p.numel() for p in self.params])
        norm = layout.norm(self.params, grads)
        if self.args.clip_grad > 0:
            flat *= min(1.0, self.args.clip_grad / (norm + 1e-6))
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad.view_as(param)
        self.adam.step()
        return layout.of_last_stage(total.item()), norm

    def _digest(self, batch: "Batch", more: list) -> str:
        """SHA-256 of every rank's tokens, rewards, and columns of MORE: equal in two runs when the ranks got equal
        data."""
        parts: list = [None] * self.world
        mine = hashlib.sha256(repr([(t.tolist(), a) for t, a in zip(batch.tokens, batch.rewards)]).encode())
        mine.update(repr(plain(more)).encode() if more else b"")
        dist.all_gather_object(parts, mine.hexdigest())
        return hashlib.sha256("".join(parts).encode()).hexdigest()


def plain(value: object) -> object:
    """Tensors as their type and their values, also inside of lists and dicts."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list) else value


class Batch:
    """One rank's samples of a rollout, and the micro-batches (lists of positions) of each optimizer step."""

    def __init__(self, args, data: dict) -> None:
        self.args = args
        self.tokens = [torch.as_tensor(t, dtype=torch.long) for t in data["tokens"]]
        self.lengths = [int(length) for length in data["response_lengths"]]
        self.masks = [torch.as_tensor(m, dtype=torch.float32) for m in data["loss_masks"]]
        self.rewards = [float(reward) for reward in data["rewards"]]
        self.advantages: list = self.rewards  # of a sample, or one a response token
        self.old: list = [None] * len(self.tokens)
        self.rollout_log_probs = data.get("rollout_log_probs")
        self.gap = 0.0 if self.rollout_log_probs is not None else None
        self.global_batch = args.global_batch_size
        if "micro_batch_indices" in data:  # v0.3.1 plans the steps on the rollout side
            micros = iter(data["micro_batch_indices"])
            self.steps = [[next(micros) for _ in range(count)] for count in data["num_microbatches"]]
        elif getattr(args, "use_dynamic_batch_size", False):
            raise ValueError("the stand-in does not do --use-dynamic-batch-size before v0.3.1")
        else:
            size, per_step = args.micro_batch_size, args.global_batch_size // layout.data_parallel()[1]
            starts = range(0, len(self.tokens), per_step)
            self.steps = [
                [list(range(at, min(at + size, start + per_step))) for at in range(start, start + per_step, size)]
                for start in starts
            ]

    def micros(self) -> Iterator[list[int]]:
        """Every micro-batch of the rollout."""
        return (micro for step in self.steps for micro in step)

    def inputs(self, micro: list[int]) -> tuple[list[torch.Tensor], list[int]]:
        return [self.tokens[i] for i in micro], [self.lengths[i] for i in micro]

    def set_old_log_probs(self, micro: list[int], computed: list[torch.Tensor]) -> None:
        for i, log_probs in zip(micro, computed, strict=True):
            self.old[i] = log_probs
            if self.rollout_log_probs is not None:
                theirs = torch.as_tensor(self.rollout_log_probs[i], dtype=torch.float32)
                self.gap = max(self.gap, (theirs - log_probs).abs().max().item())
                if getattr(self.args, "use_rollout_logprobs", False):
                    self.old[i] = theirs

    def loss(self, micro: list[int], log_probs: list[torch.Tensor]) -> torch.Tensor:
        """This rank's part of the mean over the global batch; its context-parallel ranks have the same samples."""
        total = torch.zeros(())
        low, high = 1 - self.args.eps_clip, 1 + self.args.eps_clip_high
        for i, new in zip(micro, log_probs, strict=True):
            ratio = (new - self.old[i]).exp()
            worse = torch.maximum(-ratio * self.advantages[i], -ratio.clamp(low, high) * self.advantages[i])
            if getattr(self.args, "use_tis", False):
                theirs = torch.as_tensor(self.rollout_log_probs[i], dtype=torch.float32)
                worse = worse * (self.old[i] - theirs).exp().clamp(self.args.tis_clip_low, self.args.tis_clip)
            total = total + self.mean(i, worse)
        return total / (self.global_batch * layout.parallel_config()["cp_size"])

    def mean(self, i: int, of_tokens: torch.Tensor) -> torch.Tensor:
        """Over those tokens of a sample's response that are trained on."""
        return (of_tokens * self.masks[i]).sum() / self.masks[i].sum().clamp(min=1)
