"""How far a server's log-probs are from the trainer's, on two fixed sequences: the proof that weights arrived."""

import hashlib
import json

import gpt
import requests
import torch

SEQUENCES = ([7 * i % 241 + 5 for i in range(12)], [11 * i % 239 + 7 for i in range(20)])


def server_log_probs(url: str, tokens: list[int], timeout_s: float = 60) -> list[float]:
    """Log-probs of tokens[1:], as the server scores them."""
    body = {
        "input_ids": tokens,
        "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    response = requests.post(f"{url}/generate", json=body, timeout=timeout_s)
    response.raise_for_status()
    return [value for value, _, _ in response.json()["meta_info"]["input_token_logprobs"][1:]]


def server_checksum(url: str, timeout_s: float = 60) -> str:
    """The toy engine's is the trainer's own checksum; SGLang's is of its making, and only changes with the weights."""
    response = requests.post(f"{url}/weights_checker", json={"action": "checksum"}, timeout=timeout_s)
    response.raise_for_status()
    answer = response.json()
    if isinstance(answer.get("checksum"), str):
        return answer["checksum"]
    return "sglang:" + hashlib.sha256(json.dumps(answer["per_engine_checksum"]).encode()).hexdigest()


def score(model, url: str) -> dict:
    """One server's largest absolute difference over both sequences, and its checksum."""
    sequences = [torch.tensor(tokens) for tokens in SEQUENCES]
    with torch.no_grad():
        ours = gpt.response_log_probs(model, sequences, [len(tokens) - 1 for tokens in sequences])
    worst = 0.0
    for tokens, log_probs in zip(SEQUENCES, ours, strict=True):
        worst = max(worst, (torch.tensor(server_log_probs(url, tokens)) - log_probs).abs().max().item())
    return {"url": url, "max_logprob_diff": worst, "checksum": server_checksum(url)}
