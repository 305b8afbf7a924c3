"""How a test job tells the test something, and the columns that test jobs publish."""

import json
import random
from typing import Any


def say(**facts: Any) -> None:
    print("SAID " + json.dumps(facts), flush=True)


def columns(rollout_id: int, samples: int = 8, tokens: int = 5000) -> dict[str, list[Any]]:
    """The same columns for the same id, in every process."""
    rng = random.Random(rollout_id)
    lengths = [rng.randrange(1, tokens) for _ in range(samples)]
    return {
        "tokens": [[rng.randrange(150_000) for _ in range(n)] for n in lengths],
        "response_lengths": lengths,
        "rewards": [rng.random() for _ in lengths],
        "loss_masks": [[1] * n for n in lengths],
        "metadata": [{"prompt": f"prompt {rollout_id}.{i}"} for i in range(samples)],
    }
