"""Sums whose answers reasoning_gym writes and verifies: the environment of the CPU example.

Guarantees: rollout `r` of seed `s` always gets the same prompts, computed from the two numbers alone, so a
rollout job that restarts repeats and skips nothing; every id the vocabulary holds decodes to something.

Does NOT show the model an answer: the prompt is the expression, and the answer is only ever compared with what the
model wrote.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reasoning_gym.arithmetic.basic_arithmetic import BasicArithmeticDataset, BasicArithmeticDatasetConfig

PAD, BOS, EOS = 0, 1, 2
LARGEST = 20  # of 10+10
SYMBOLS = (*(str(number) for number in range(LARGEST + 1)), "+", "=")
VOCABULARY: tuple[str, ...] = ("<pad>", "<bos>", "<eos>", *SYMBOLS)
_IDS = {symbol: index for index, symbol in enumerate(VOCABULARY)}

# reasoning_gym seeds item i of a dataset with seed + i: neighbouring seeds would share all items but one.
_ITEMS_PER_SEED = 2**40


def encode(text: str) -> list[int]:
    """Return one id a number or sign, as tokenizers do that keep small numbers whole; no BOS or EOS is added.

    Raises:
        ValueError: `text` has something that is none of SYMBOLS.
    """
    try:
        return [_IDS[symbol] for symbol in re.findall(r"\d+|.", text)]
    except KeyError as error:
        raise ValueError(f"{text!r} has {error.args[0]!r}, which is none of {' '.join(SYMBOLS)}") from None


def decode(tokens: Sequence[int]) -> str:
    """Return the text of `tokens`. Special ids are spelled out, so a stray one spoils an answer, never hides in it."""
    return "".join(VOCABULARY[token] for token in tokens)


@dataclass(frozen=True)
class Prompt:
    """One question.

    Attributes:
        text: what the model reads, such as `7+9=`.
        tokens: BOS and the ids of `text`.
        answer: reasoning_gym's own answer; for the record, never for the model.
        entry: the item as reasoning_gym made it, which its verifier wants back.
    """

    text: str
    tokens: list[int]
    answer: str
    entry: dict[str, Any]


class SumTask:
    """Sums of two numbers from 0 to 10 (reasoning_gym's basic_arithmetic), 121 different prompts."""

    def __init__(self) -> None:
        self._verifier = self._dataset(seed=0)

    def prompts(self, seed: int, rollout_id: int, n_prompts: int) -> list[Prompt]:
        """Return the prompts of one rollout: the same for the same three numbers, on any machine."""
        dataset = self._dataset(seed * _ITEMS_PER_SEED)
        first = rollout_id * n_prompts
        return [self._prompt(dataset[index]) for index in range(first, first + n_prompts)]

    def reward(self, response: str, prompt: Prompt) -> float:
        """Return 1.0 where reasoning_gym's verifier finds `response` exactly right, else 0.0.

        It also gives partial credit to whatever contains the answer; that is cut, because only the sum counts.
        """
        return 1.0 if self._verifier.score_answer(response, prompt.entry) == 1.0 else 0.0

    def _dataset(self, seed: int) -> BasicArithmeticDataset:
        config = BasicArithmeticDatasetConfig(
            min_terms=2,
            max_terms=2,
            min_digits=1,
            max_digits=1,
            operators=["+"],
            allow_parentheses=False,
            allow_negation=False,
            whitespace="no_space",
            seed=seed,
        )
        return BasicArithmeticDataset(config)

    @staticmethod
    def _prompt(entry: dict[str, Any]) -> Prompt:
        # The English around the expression is the same in every question: reading it would cost time, teach nothing.
        text = entry["metadata"]["expression"].replace(" ", "") + "="
        return Prompt(text=text, tokens=[BOS, *encode(text)], answer=entry["answer"], entry=entry)
