"""The stand-ins by themselves, without Ray and without slime: model, weights, toy engine, reward."""

import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")
requests = pytest.importorskip("requests")

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "standins"), str(HERE / "stubs")]

import gpt  # noqa: E402
import layout  # noqa: E402
import mkmodel  # noqa: E402
import probe  # noqa: E402
import reward_gym  # noqa: E402
import single_job  # noqa: E402
import sums  # noqa: E402
import toy_engine  # noqa: E402
import weights  # noqa: E402

pytestmark = pytest.mark.ci


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    mkmodel.main(str(folder))
    return folder


@pytest.fixture(scope="module")
def model(tiny):
    gpt.use_cpu()
    layout.join_parallel_groups()
    model = gpt.build(weights.read_config(tiny))
    gpt.load_named(model, weights.load_folder(tiny))
    return model


@pytest.fixture
def engine_url(tiny):
    server = toy_engine.serve(str(tiny), "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def reference_log_probs(folder, tokens):
    """Of tokens[1:], by transformers."""
    from transformers import Qwen2ForCausalLM

    with torch.no_grad():
        logits = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens[None]).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, tokens[1:, None]).squeeze(-1)


def test_log_probs_equal_those_of_transformers(tiny, model):
    torch.manual_seed(0)
    tokens = [torch.randint(3, 320, (length,)) for length in (5, 17, 30)]
    ours = gpt.response_log_probs(model, tokens, [3, 8, 29])
    for sequence, log_probs, length in zip(tokens, ours, (3, 8, 29), strict=True):
        reference = reference_log_probs(tiny, sequence)[-length:]
        torch.testing.assert_close(log_probs.detach(), reference, atol=1e-5, rtol=0)


def test_weights_go_to_hugging_face_names_and_back(tiny, model, tmp_path):
    named = gpt.to_named(model)
    assert weights.checksum(named) == weights.checksum(weights.load_folder(tiny))
    with torch.no_grad():
        named = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in named.items()}
    weights.save_folder(tmp_path / "v1", named, like=tiny)
    changed = gpt.build(weights.read_config(tmp_path / "v1"))
    gpt.load_named(changed, weights.load_folder(tmp_path / "v1"))
    assert weights.checksum(gpt.to_named(changed)) == weights.checksum(named)
    tokens = torch.arange(5, 25)
    ours = gpt.response_log_probs(changed, [tokens], [19])[0].detach()
    torch.testing.assert_close(ours, reference_log_probs(tmp_path / "v1", tokens), atol=1e-4, rtol=1e-5)


def test_a_missing_or_surplus_weight_is_an_error(model):
    named = gpt.to_named(model)
    with pytest.raises(ValueError, match="surplus"):
        gpt.load_named(model, {**named, "surplus": torch.zeros(1)})
    named.pop("lm_head.weight")
    with pytest.raises(KeyError, match="lm_head"):
        gpt.load_named(model, named)


def ask(url, seed, prompt=tuple(range(40, 60)), **params):
    body = {
        "input_ids": list(prompt),
        "sampling_params": {"max_new_tokens": 16, "temperature": 1.0, "sampling_seed": seed, **params},
        "return_logprob": True,
    }
    response = requests.post(f"{url}/generate", json=body, timeout=30)
    response.raise_for_status()
    answer = response.json()
    answer["meta_info"].pop("id")
    return answer


def test_toy_answers_depend_on_request_and_seed_only(engine_url):
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda seed: ask(engine_url, seed), range(32)))
    alone = [ask(engine_url, seed) for seed in range(32)]
    assert together == alone
    assert len({tuple(answer["output_ids"]) for answer in alone}) > 30
    assert ask(engine_url, 0, temperature=0) == ask(engine_url, 1, temperature=0)
    # what is left of a sample's identity behind sglang-router 0.1.9, see seeded_generate
    marked = [ask(engine_url, None, stop_token_ids=[2**30 + mark]) for mark in (1, 2)]
    assert marked[0]["output_ids"] != marked[1]["output_ids"]


def test_toy_engine_scores_and_loads_weights_as_the_trainer_has_them(engine_url, tiny, model, tmp_path):
    first = probe.score(model, engine_url)
    assert first["max_logprob_diff"] < 1e-4
    assert first["checksum"] == weights.checksum(gpt.to_named(model))
    named = {name: tensor * 1.1 for name, tensor in gpt.to_named(model).items()}
    weights.save_folder(tmp_path / "v2", named, like=tiny)
    before = ask(engine_url, 1)
    for path, body in (
        ("pause_generation", {}),
        ("update_weights_from_disk", {"model_path": str(tmp_path / "v2"), "weight_version": "2"}),
        ("continue_generation", {}),
    ):
        requests.post(f"{engine_url}/{path}", json=body, timeout=30).raise_for_status()
    assert probe.server_checksum(engine_url) == weights.checksum(named)
    after = ask(engine_url, 1)
    assert after["meta_info"]["weight_version"] == "2"
    assert after["output_ids"] != before["output_ids"]
    assert probe.score(model, engine_url)["max_logprob_diff"] > 1e-2  # the witness: the probe sees other weights


def test_a_toy_engine_says_which_weights_it_has_and_can_ignore_an_update(engine_url, tiny, tmp_path, monkeypatch):
    """The other tests here rely on it; asked and updated as an engine of slime is."""
    from slime.cross_job.adapter import engine_weights

    def send(endpoint, payload):
        response = requests.post(f"{engine_url}/{endpoint}", json=payload, timeout=30)
        response.raise_for_status()
        return response.json()

    args = SimpleNamespace(rollout_external=True)
    engine = SimpleNamespace(args=args, get_url=lambda: engine_url, _make_request=send)
    assert engine_weights.claim(engine, "exp/new/a").version == "default"
    assert engine_weights.carry(engine, "exp/1/b").version == "exp/new/a"
    load = {"model_path": str(tiny), "weight_version": "7"}
    engine._make_request("update_weights_from_disk", load)
    assert engine_weights.said(engine).version == "exp/1/b"
    assert ask(engine_url, 1)["meta_info"]["weight_version"] == "exp/1/b"
    ignore = tmp_path / "ignore"
    ignore.write_text("2")
    monkeypatch.setenv("SLIME_CPU_IGNORE_UPDATE", str(ignore))
    engine_weights.carry(engine, "exp/2/c")
    assert engine._make_request("update_weights_from_disk", load)["success"] is True
    assert Path(f"{ignore}.held").exists()
    assert engine_weights.said(engine).version == "exp/1/b"


def test_a_toy_engine_pulls_what_is_newer_than_what_it_has(engine_url, tiny, tmp_path):
    for number, text in ((1, "first"), (2, "second")):
        (tmp_path / "weights" / f"weight_v00000{number}").mkdir(parents=True)
        (tmp_path / "weights" / f"weight_v00000{number}" / "file").write_text(text)
    found = []
    for target in (2, 1):
        body = {"local_checkpoint_dir": str(tmp_path / "local"), "source_dir": str(tmp_path / "weights")}
        requests.post(f"{engine_url}/pull_weights", json={**body, "target_version": target}, timeout=30)
        found.append((tmp_path / "local" / "file").read_text())
    assert found == ["second", "second"], "as slime's patch to SGLang does it"


def test_a_paused_toy_engine_holds_requests_back(engine_url):
    requests.post(f"{engine_url}/pause_generation", json={}, timeout=30).raise_for_status()
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(ask, engine_url, 3)
        with pytest.raises(TimeoutError):
            held.result(timeout=0.5)
        requests.post(f"{engine_url}/continue_generation", json={}, timeout=30).raise_for_status()
        assert len(held.result(timeout=30)["output_ids"]) > 0


@pytest.mark.parametrize("params", [{"top_k": 5}, {"stop": ["x"]}])
def test_the_toy_engine_refuses_what_it_does_not_do(engine_url, params):
    with pytest.raises(requests.HTTPError, match="400"):
        ask(engine_url, 1, **params)


def test_prompts_and_reward(tmp_path):
    sums.write_prompts(tmp_path / "a.jsonl", 20, seed=3)
    sums.write_prompts(tmp_path / "b.jsonl", 20, seed=3)
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()
    line = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])
    assert str(eval(line["text"].rstrip("="))) == line["label"]
    assert reward_gym.score("5", 1, "5") == 1.0
    assert reward_gym.score("6", 1, "5") == 0.5
    assert reward_gym.score("5678", 4, "5") == 1.0
    assert reward_gym.score("6578", 4, "5") == 0.5
    assert reward_gym.score("ab", 2, "5") == pytest.approx(0.1)
    assert reward_gym.score("", 0, "5") == 0.0
    assert reward_gym.score("<pad><eos>", 2, "5") == 0.0


def test_the_older_pins_ask_for_their_router():
    with pytest.raises(ValueError, match=r"0\.1\.9"):
        single_job.environment("v0.1.0", "slime", engine="toy", weight_dir="w")
    variables = single_job.environment("v0.1.0", "slime", engine="toy", weight_dir="w", router_019="r")
    assert variables["PYTHONPATH"].split(":")[0] == "r"
