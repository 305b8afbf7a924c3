"""Sums of one digit from reasoning_gym as a prompt file for slime: `python sums.py OUT [COUNT] [SEED]`.

The prompt is the expression (`4+1=`), the label the answer, always one digit. Nothing of the answer is in the prompt.
"""

import json
import sys
from pathlib import Path

from reasoning_gym.arithmetic.basic_arithmetic import BasicArithmeticDataset, BasicArithmeticDatasetConfig


def dataset(seed: int) -> BasicArithmeticDataset:
    """Endless in practice: items are made as they are asked for."""
    return BasicArithmeticDataset(
        BasicArithmeticDatasetConfig(
            min_terms=2,
            max_terms=2,
            min_digits=1,
            max_digits=1,
            operators=["+", "-"],
            allow_parentheses=False,
            allow_negation=False,
            seed=seed,
            size=1_000_000,
        )
    )


def write_prompts(path: str | Path, count: int = 256, seed: int = 0) -> None:
    """Write `count` lines with the keys text and label; the same for the same seed."""
    items, lines, index = dataset(seed), [], 0
    while len(lines) < count:
        item = items[index]
        index += 1
        if len(item["answer"]) == 1:
            text = item["metadata"]["expression"].replace(" ", "") + "="
            lines.append(json.dumps({"text": text, "label": item["answer"]}))
    Path(path).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write_prompts(sys.argv[1], *map(int, sys.argv[2:4]))
