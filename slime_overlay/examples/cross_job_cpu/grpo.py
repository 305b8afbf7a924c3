from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slime_overlay.examples.cross_job_cpu.model import TinyDecoder, response_log_probs, sample
from slime_overlay.examples.cross_job_cpu.task import EOS, PAD, VOCABULARY, SumTask, decode


@dataclass(frozen=True)
class Recipe:
    max_digits: int = 1
    width: int = 64
    layers: int = 2
    heads: int = 4
    n_prompts: int = 64
    n_samples: int = 32
    max_new_tokens: int = 4
    learning_rate: float = 2e-3
    epochs: int = 1
    minibatches: int = 4
    clip_low: float = 0.2
    clip_high: float = 0.3
    entropy_coefficient: float = 0.0
    max_grad_norm: float = 1.0
    beta2: float = 0.95
    split: str = "prompt"
    warmup: int = 0
    std_norm: bool = True
    n_rollouts: int = 120


def build_model(recipe, seed):
    torch.manual_seed(seed)
    task = SumTask(recipe.max_digits)
    return TinyDecoder(len(VOCABULARY), recipe.width, recipe.layers, recipe.heads, 16)


def generate(model, task, rollout_id, seed, n_prompts, n_samples, max_new_tokens=4):
    prompts = task.prompts(seed, rollout_id, n_prompts)
    digest = hashlib.sha256(f"{seed}/{rollout_id}".encode()).digest()
    g = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    samples = sample(model, [p.tokens for p in prompts], n_samples, max_new_tokens, EOS, g)
    rewards, meta = [], []
    cols = dict(tokens=[], response_lengths=[], truncated=[], rollout_log_probs=[])
    for i, s in enumerate(samples):
        p = prompts[i // n_samples]
        text = decode(s.tokens[len(p.tokens): len(s.tokens) - (not s.truncated)])
        rewards.append(0.0 if s.truncated else task.reward(text, p))
        cols["tokens"].append(s.tokens)
        cols["response_lengths"].append(s.response_length)
        cols["truncated"].append(int(s.truncated))
        cols["rollout_log_probs"].append(s.log_probs)
        meta.append({"prompt": p.text, "response": text, "answer": p.answer})
    cols["rewards"] = rewards
    cols["metadata"] = meta
    return cols


def train_step(model, optimizer, batch, r):
    rewards = torch.tensor(np.asarray(batch["rewards"], dtype=np.float32)).view(-1, r.n_samples)
    adv = rewards - rewards.mean(1, keepdim=True)
    if r.std_norm:
        adv = adv / (rewards.std(1, keepdim=True, unbiased=False) + 1e-4)
    adv = adv.flatten()
    n = len(adv)
    L = torch.tensor([len(t) for t in batch["tokens"]])
    R = torch.tensor(np.asarray(batch["response_lengths"]))
    T = torch.full((n, int(L.max())), PAD)
    O = torch.zeros(n, int(R.max()))
    for i, (t, lp) in enumerate(zip(batch["tokens"], batch["rollout_log_probs"])):
        T[i, :len(t)] = torch.as_tensor(t)
        O[i, :len(lp)] = torch.as_tensor(lp)
    groups = torch.arange(n) // r.n_samples
    _, inv, cnt = torch.unique(torch.cat([groups[:, None], T], 1), dim=0, return_inverse=True, return_counts=True)
    first = torch.full((len(cnt),), n).scatter_reduce(0, inv, torch.arange(n), "amin")
    T, O, L, R, adv, W, groups = T[first], O[first], L[first], R[first], adv[first], cnt.float(), groups[first]
    n_groups = n // r.n_samples
    ents, clips, norms = [], [], []
    per = n_groups // r.minibatches
    for e in range(r.epochs):
        for k in range(r.minibatches):
            sel = (groups // per == k)
            if r.entropy_coefficient == 0:
                sel &= adv != 0
            idx = sel.nonzero()[:, 0]
            if len(idx) == 0:
                continue
            lp, ent, mask = response_log_probs(model, T[idx][:, : int(L[idx].max())], L[idx], R[idx])
            mf = mask.float() * W[idx][:, None]
            ratio = ((lp - O[idx][:, : lp.shape[1]]) * mask).exp()
            a = adv[idx][:, None]
            obj = torch.minimum(ratio * a, ratio.clamp(1 - r.clip_low, 1 + r.clip_high) * a)
            ntok = (n / r.minibatches) * 3
            loss = -(obj * mf).sum() / ntok - r.entropy_coefficient * (ent * mf).sum() / ntok
            optimizer.zero_grad()
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), r.max_grad_norm)))
            optimizer.step()
            with torch.no_grad():
                ents.append(float((ent * mf).sum() / mf.sum()))
                clips.append(float((((ratio - 1).abs() > r.clip_low) * mf).sum() / mf.sum()))
    f = lambda x: float(np.mean(x)) if x else 0.0
    return dict(entropy=f(ents), clip=f(clips), norm=f(norms), rows=len(cnt))
