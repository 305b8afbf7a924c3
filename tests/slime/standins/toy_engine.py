"""Small HTTP engine with SGLang's endpoints, for tests where runs must be equal to the bit; up in about a second.

`python toy_engine.py --model-path DIR --host H --port P`. It stands for sglang.launch_server in front of slime and of
sglang-router 0.1.9 and 0.3.2. The generator of a request is seeded by its input ids, sampling_params.sampling_seed and
stop_token_ids (see seeded_generate for why those) and by nothing else: equal requests get equal answers.

With top_p below 1 it tells which tokens that kept, as slime's patch to SGLang does.

For tests, SLIME_CPU_IGNORE_UPDATE names a file (see hold.py) with a number n: the n-th weight update does nothing and
reports success.

Not SGLang's: no batching, top_k, stop strings or streaming (they are refused), and pausing lets requests that
run finish (they take milliseconds) and holds new ones back, where SGLang's default aborts.
"""

import argparse
import base64
import hashlib
import json
import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy loads: more threads would only wait

import numpy as np
import weights
from hold import held
from tokenizers import Tokenizer
from toy_model import ToyModel, log_softmax
from weight_group import WeightGroups


class BadRequest(Exception):
    """The request asks for what this engine does not do."""


class Engine:
    """The model and its state, apart from HTTP."""

    def __init__(self, model_path: str, weight_version: str = "default") -> None:
        self.config = weights.read_config(model_path)
        self.tokenizer = Tokenizer.from_file(f"{model_path}/tokenizer.json")
        self.model_path, self.weight_version, self.updates = model_path, weight_version, 0
        self.running, self.paused, self.served = 0, False, 0
        self.changed, self.groups = threading.Condition(), WeightGroups()
        self._load(weights.load_folder(model_path))

    def _load(self, tensors: dict) -> None:
        self.tensors, self.checksum = tensors, weights.checksum(tensors)
        self.model = ToyModel(self.config, {name: tensor.float().numpy() for name, tensor in tensors.items()})

    def pause(self, _body: dict) -> dict:
        with self.changed:
            self.paused = True
            self.changed.wait_for(lambda: self.running == 0)
        return {"status": "ok", "message": "paused"}

    def resume(self, _body: dict) -> dict:
        with self.changed:
            self.paused = False
            self.changed.notify_all()
        return {"status": "ok", "message": "continued"}

    def update_weights(self, body: dict) -> dict:
        self.updates += 1
        if held("SLIME_CPU_IGNORE_UPDATE", self.updates):
            return {"success": True, "message": "This update was ignored, as the test wants."}
        return self._update(weights.load_folder(body["model_path"]), body)

    def receive_weights(self, body: dict) -> dict:
        """One chunk of an update: the other weights stay as they are."""
        received = self.groups.receive(body)
        if unknown := received.keys() - self.tensors.keys():
            raise BadRequest(f"this model has no {sorted(unknown)}")
        return self._update({**self.tensors, **received}, body)

    def _update(self, tensors: dict, body: dict) -> dict:
        with self.changed:  # no request runs half on the old weights
            self.changed.wait_for(lambda: self.running == 0)
            self._load(tensors)
            self.weight_version = str(body.get("weight_version") or self.weight_version)
        return {"success": True, "message": "Succeeded to update model weights.", "num_paused_requests": 0}

    def pull_weights(self, body: dict) -> dict:
        """As slime's patch to SGLang does it with full checkpoints: a host that is past the target does nothing."""
        local, target = Path(body["local_checkpoint_dir"]), body["target_version"]
        state = local / ".weight_sync" / "state.json"
        if state.exists() and target <= int(json.loads(state.read_text())["version"]):
            return {"success": True, "message": "Success."}
        state.parent.mkdir(parents=True, exist_ok=True)
        for file in Path(body["source_dir"], f"weight_v{target:06d}").iterdir():
            shutil.copy(file, local)
        state.write_text(json.dumps({"version": f"{target:06d}"}))
        return {"success": True, "message": "Success."}

    def update_version(self, body: dict) -> dict:
        self.weight_version = body["new_version"]
        return {"success": True, "message": "", "new_version": self.weight_version}

    def checker(self, body: dict) -> dict:
        if body.get("action") != "checksum":
            raise BadRequest("only the action checksum is here")
        return {"success": True, "message": "ok", "checksum": self.checksum}

    def loads(self) -> dict:
        return {"loads": [{"num_running_reqs": self.running, "num_waiting_reqs": 0}]}

    def info(self) -> dict:
        return {
            "model_path": self.model_path,
            "tokenizer_path": self.model_path,
            "served_model_name": self.model_path,
            "is_generation": True,
            "weight_version": self.weight_version,
            "model_type": self.config["model_type"],
            "architectures": self.config["architectures"],
            "max_total_num_tokens": 8192,
            "tp_size": 1,
            "dp_size": 1,
            "enable_memory_saver": False,
            "disaggregation_mode": "null",
            "version": "toy",
        }

    def generate(self, body: dict) -> dict | list:
        ids, text = body.get("input_ids"), body.get("text")
        if ids is None:
            ids = [self.tokenizer.encode(x).ids for x in ([text] if isinstance(text, str) else text)]
            ids = ids[0] if isinstance(text, str) else ids
        with self.changed:
            self.changed.wait_for(lambda: not self.paused)
            self.running += 1
            model, version = self.model, self.weight_version
        try:
            if ids and isinstance(ids[0], list):
                return [self._answer(body, model, version, one) for one in ids]
            return self._answer(body, model, version, ids)
        finally:
            with self.changed:
                self.running -= 1
                self.served += 1
                self.changed.notify_all()

    def _answer(self, body: dict, model: ToyModel, version: str, ids: list[int]) -> dict:
        params = body.get("sampling_params") or {}
        for name, harmless in (("top_k", (None, -1)), ("stop", (None, []))):
            if params.get(name) not in harmless:
                raise BadRequest(f"{name}={params[name]} is not done here")
        if body.get("stream") or not ids:
            raise BadRequest("no streaming, and the input must not be empty")
        scored, new, kept, finish = self._sample(model, ids, params)
        meta = {
            "id": body.get("rid") or hashlib.sha256(repr((self.served, ids)).encode()).hexdigest()[:32],
            "finish_reason": finish,
            "prompt_tokens": len(ids),
            "completion_tokens": len(new),
            "cached_tokens": 0,
            "weight_version": version,
        }
        if body.get("return_logprob"):
            meta["output_token_logprobs"] = [[value, token, None] for value, token in new]
            if (start := body.get("logprob_start_len", -1)) >= 0:
                meta["input_token_logprobs"] = [[value, token, None] for value, token in scored[start:]]
        if kept:
            arrays = {"ids": [token for of in kept for token in of], "offsets": np.cumsum([0, *map(len, kept)])}
            for name, values in arrays.items():
                packed = np.asarray(values, dtype=np.int32).tobytes()
                meta[f"top_p_token_{name}"] = base64.b64encode(packed).decode()
        tokens = [token for _, token in new]
        text = self.tokenizer.decode(tokens, skip_special_tokens=params.get("skip_special_tokens", True))
        return {"text": text, "output_ids": tokens, "meta_info": meta}

    def _sample(self, model: ToyModel, ids: list[int], params: dict) -> tuple[list, list, list, dict]:
        """Log-probs of the input and of the new tokens, as (value, token), the tokens that top_p kept at each new one,
        and the finish reason."""
        limit, temperature = params.get("max_new_tokens", 128), params.get("temperature", 1.0)
        top_p = params.get("top_p") or 1.0
        stops = {
            *(params.get("stop_token_ids") or ()),
            *(() if params.get("ignore_eos") else (self.config["eos_token_id"],)),
        }
        identity = [ids, params.get("sampling_seed"), sorted(params.get("stop_token_ids") or ())]
        seed = hashlib.sha256(json.dumps(identity).encode()).digest()
        uniform = np.random.Generator(np.random.PCG64(int.from_bytes(seed[:16], "little"))).random(max(limit, 1))
        sequence, scored, new, kept = model.start(len(ids) + limit), [(None, ids[0])], [], []
        for i, token in enumerate(ids):
            logits = sequence.feed(token)
            if i + 1 < len(ids):
                scored.append((float(log_softmax(logits)[ids[i + 1]]), ids[i + 1]))
        for draw in uniform[:limit]:
            log_probs = log_softmax(logits / np.float32(temperature or 1.0))
            chances = np.exp(log_probs, dtype=np.float64)
            if top_p < 1.0:
                order = np.argsort(-chances, kind="stable")
                ahead = chances[order].cumsum() - chances[order]
                chances[order[ahead >= top_p]] = 0.0
                kept.append(np.flatnonzero(chances).tolist())
            chances = chances.cumsum()
            token = (
                int(chances.searchsorted(draw * chances[-1], side="right")) if temperature else int(logits.argmax())
            )
            new.append((float(log_probs[token]), token))
            if token in stops:
                return scored, new, kept, {"type": "stop", "matched": token}
            if len(new) < limit:
                logits = sequence.feed(token)
        return scored, new, kept, {"type": "length", "length": limit}


class Handler(BaseHTTPRequestHandler):
    """Routes by the last part of the path, whatever the method: SGLang takes GET and POST for most of these."""

    protocol_version = "HTTP/1.1"
    engine: Engine
    disable_nagle_algorithm = True

    def _reply(self, status: int, value: object) -> None:
        payload = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        engine, done = self.engine, {"success": True, "message": "ok"}
        routes = {
            "/health": lambda b: done,
            "/health_generate": lambda b: done,
            "/flush_cache": lambda b: done,
            "/abort_request": lambda b: done,
            "/release_memory_occupation": lambda b: done,
            "/resume_memory_occupation": lambda b: done,
            "/v1/loads": lambda b: engine.loads(),
            "/get_load": lambda b: engine.loads()["loads"],
            "/server_info": lambda b: engine.info(),
            "/get_server_info": lambda b: engine.info(),
            "/model_info": lambda b: engine.info(),
            "/get_model_info": lambda b: engine.info(),
            "/v1/models": lambda b: {"object": "list", "data": [{"id": engine.model_path, "object": "model"}]},
            "/get_weight_version": lambda b: {"weight_version": engine.weight_version},
            "/weight_version": lambda b: {"weight_version": engine.weight_version},
            "/generate": engine.generate,
            "/pause_generation": engine.pause,
            "/continue_generation": engine.resume,
            "/update_weights_from_disk": engine.update_weights,
            "/init_weights_update_group": engine.groups.join,
            "/destroy_weights_update_group": engine.groups.leave,
            "/update_weights_from_distributed": engine.receive_weights,
            "/update_weight_version": engine.update_version,
            "/pull_weights": engine.pull_weights,
            "/weights_checker": engine.checker,
        }
        route = routes.get(self.path.split("?")[0])
        if route is None:
            return self._reply(404, {"error": f"no {self.path} here"})
        try:
            self._reply(200, route(json.loads(body) if body else {}))
        except (BadRequest, FileNotFoundError, KeyError, RuntimeError, ValueError) as error:
            self._reply(400, {"success": False, "error": {"message": repr(error)}})

    do_POST = do_PUT = do_GET

    def log_message(self, *args: object) -> None: ...


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024  # a rollout's requests arrive at once


def serve(model_path: str, host: str, port: int, weight_version: str = "default") -> Server:
    """A server bound to its port, ready for serve_forever (port 0: the system's choice, see server_port)."""
    handler = type("BoundHandler", (Handler,), {"engine": Engine(model_path, weight_version)})
    return Server((host, port), handler)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--weight-version", default="default")
    options = parser.parse_args()
    serve(options.model_path, options.host, options.port, options.weight_version).serve_forever()
