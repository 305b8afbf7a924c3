"""What the chaos run trains: a tiny policy whose every figure follows from the seed, in the last bit.

Prompt n of a seed is always the same, and so is what weights answer to it; a rollout takes the next prompts, wherever
it is generated. NumPy only, always in the same order, so that a run with faults can be compared with one without.
"""

from typing import Any

import numpy as np

FEATURES, ACTIONS = 16, 4
PROMPTS, SAMPLES = 8, 4  # a rollout has PROMPTS prompts, each answered SAMPLES times
RANKS = 2
_RATE = 0.5
_BALLAST = 16_384  # numbers, so that a rollout is not small enough to be inlined anywhere


def first_weights(seed: int) -> np.ndarray:
    """Weights of version 0, float64 of shape [FEATURES, ACTIONS]."""
    return np.random.default_rng([seed, 0]).normal(0.0, 0.1, (FEATURES, ACTIONS))


def prompt(seed: int, number: int) -> np.ndarray:
    """Prompt `number`: float64 of shape [FEATURES]. The greatest of its first 4 is the right action."""
    return np.random.default_rng([seed, 1, number]).normal(0.0, 1.0, FEATURES)


def generate(seed: int, weights: np.ndarray, first_prompt: int) -> dict[str, list[Any]]:
    """Columns of the rollout that takes PROMPTS prompts from `first_prompt` on; one row a sample."""
    columns: dict[str, list[Any]] = {"prompt": [], "action": [], "reward": []}
    for number in range(first_prompt, first_prompt + PROMPTS):
        features = prompt(seed, number)
        chances = np.cumsum(_chances(features @ weights))
        draws = np.random.default_rng([seed, 2, number]).random(SAMPLES)
        for action in np.minimum(np.searchsorted(chances, draws), ACTIONS - 1).tolist():
            columns["prompt"].append(number)
            columns["action"].append(action)
            columns["reward"].append(float(action == int(np.argmax(features[:ACTIONS]))))
    ballast = np.random.default_rng([seed, 3, first_prompt]).integers(0, 2**31, _BALLAST).tolist()
    columns["ballast"] = [ballast, *([] for _ in columns["prompt"][1:])]
    return columns


def gradient(seed: int, weights: np.ndarray, rows: dict[str, list[Any]], baseline: float) -> tuple[float, np.ndarray]:
    """(loss, gradient) of some rows of a rollout, summed."""
    loss, total = 0.0, np.zeros_like(weights)
    for number, action, reward in zip(rows["prompt"], rows["action"], rows["reward"], strict=True):
        features = prompt(seed, number)
        chances = _chances(features @ weights)
        advantage = reward - baseline
        loss -= advantage * float(np.log(chances[action]))
        chances[action] -= 1.0
        total += advantage * np.outer(features, chances)
    return loss, total


def step(weights: np.ndarray, parts: list[tuple[float, np.ndarray]], samples: int) -> tuple[float, np.ndarray]:
    """(loss, new weights) from what the ranks computed, in the order of their numbers."""
    loss = sum(part[0] for part in parts) / samples
    total = np.zeros_like(weights)
    for _, part in parts:
        total += part
    return loss, weights - _RATE / samples * total


def _chances(logits: np.ndarray) -> np.ndarray:
    grown = np.exp(logits - logits.max())
    return grown / grown.sum()
