"""The reward of sums.py for slime: `--custom-rm-path reward_gym.reward`.

Half of it is reasoning_gym's own score of the response's first character (every answer has one digit), half is
shaping: for each token of the whole response 1 for a digit, 0.2 for another printable character. What 20 steps teach a
random model of 115k parameters is the shaping first, that is to write digits, then which first digit is right most
often. It is a signal that climbs, not arithmetic.
"""

import re
from functools import cache

SPECIAL = re.compile("<(pad|bos|eos|unk)>")  # spelled out, they would pass for printable text, and be learned at once


@cache
def _verifier():
    from sums import dataset

    return dataset(seed=0)


def score(response: str, response_length: int, label: str) -> float:
    response = SPECIAL.sub("", response)
    digits = sum(character in "0123456789" for character in response)
    printable = sum(" " <= character <= "~" for character in response) - digits
    shaping = min(1.0, (digits + 0.2 * printable) / max(response_length, 1))
    return 0.5 * _verifier().score_answer(response.strip()[:1], {"answer": label}) + 0.5 * shaping


async def reward(args, sample, **kwargs):
    return score(sample.response, sample.response_length, str(sample.label))
