"""slime's own train.py or train_async.py on a CPU with the stand-ins: arguments and environment for each pin.

    python single_job.py --slime CHECKOUT --pin v0.3.1 --engine toy --work DIR [--script train_async.py] -- SLIME FLAGS

makes model and prompts in DIR where they are missing and runs one job on the Ray cluster that RAY_ADDRESS names, which
must have 12 CPUs and 4 GPUs (logical ones). Tests call `slime_arguments` and `environment` instead.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
PINS = ("079dbcf", "v0.1.0", "v0.3.1", "main")
IN_PARTS = ("v0.3.1", "main")
"""Pins at which the rollout job splits a rollout among training ranks."""
ENGINES = ("toy", "sglang")


@dataclass(frozen=True)
class Folders:
    """What one run reads and writes, below one folder."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "tiny"

    @property
    def prompts(self) -> Path:
        return self.root / "prompts.jsonl"

    @property
    def weights(self) -> Path:
        return self.root / "weights"

    @property
    def log(self) -> Path:
        return self.root / "train.jsonl"

    def prepare(self) -> None:
        """Make the folders, and the model and the prompts where they are missing."""
        self.weights.mkdir(parents=True, exist_ok=True)
        if not (self.model / "config.json").exists():
            from tests.slime import mkmodel

            mkmodel.main(str(self.model))
        if not self.prompts.exists():
            from tests.slime import sums

            sums.write_prompts(self.prompts)


def slime_arguments(
    pin: str,
    model: str | Path,
    prompts: str | Path,
    *,
    weight_dir: str | Path,
    num_rollout: int | None = 3,
    rollout_batch_size: int = 8,
    n_samples_per_prompt: int = 8,
    global_batch_size: int | None = None,
    micro_batch_size: int = 8,
    max_response_len: int = 4,
    lr: float = 5e-3,
    engines: int = 1,
    save: str | Path | None = None,
    save_interval: int | None = None,
    load: str | Path | None = None,
    extra: tuple[str, ...] = (),
) -> list[str]:
    """The arguments after train.py; one optimizer step a rollout unless global_batch_size says otherwise.

    Where `num_rollout` is None, `extra` says how many.
    """
    if pin not in PINS:
        raise ValueError(f"{pin!r} is none of {PINS}")
    options: dict[str, object] = {
        "hf-checkpoint": model,
        "ref-load": model,
        "actor-num-nodes": 1,
        "actor-num-gpus-per-node": 2,
        "rollout-num-gpus": engines,
        "rollout-num-gpus-per-engine": 1,
        "prompt-data": prompts,
        "input-key": "text",
        "label-key": "label",
        "num-rollout": num_rollout,
        "rollout-batch-size": rollout_batch_size,
        "n-samples-per-prompt": n_samples_per_prompt,
        "global-batch-size": global_batch_size or rollout_batch_size * n_samples_per_prompt,
        "micro-batch-size": micro_batch_size,
        "rollout-max-response-len": max_response_len,
        "rollout-temperature": 1.0,
        "custom-generate-function-path": "seeded_generate.generate",
        "custom-rm-path": "reward_gym.reward",
        "advantage-estimator": "grpo",
        "lr": lr,
        "num-layers": 2,
        "hidden-size": 64,
        "num-attention-heads": 4,
        "ffn-hidden-size": 128,
    }
    if num_rollout is None:
        del options["num-rollout"]
    if pin in IN_PARTS:
        options |= {
            "num-gpus-per-node": 4,
            "update-weight-mode": "full",
            "update-weight-transport": "disk",
            "update-weight-disk-dir": weight_dir,
        }
    if save is not None:
        options |= {"save": save, "save-interval": save_interval or 1}
    if load is not None:
        options["load"] = load
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    if pin == "079dbcf":  # else it tokenizes the response's text again, which bytes outside UTF-8 do not survive
        flags.append("--use-token-output")
    return [*flags, *extra]


def environment(
    pin: str,
    slime: str | Path,
    *,
    engine: str,
    weight_dir: str | Path,
    log: str | Path | None = None,
    probe: bool = False,
    log_dir: str | Path | None = None,
    router_019: str | Path | None = None,
    before: tuple[str | Path, ...] = (),
) -> dict[str, str]:
    """What driver and workers need beside the machine's own environment; for a job's runtime_env and for its driver.

    `router_019` is the folder of sglang-router 0.1.9, which the two older pins need (pip install --target). `before`
    goes between the stand-ins and slime on PYTHONPATH.
    """
    if engine not in ENGINES:
        raise ValueError(f"{engine!r} is none of {ENGINES}")
    if pin not in IN_PARTS and router_019 is None:
        raise ValueError(f"slime {pin} needs sglang-router 0.1.9: give its folder as router_019")
    path = [HERE / "standins", HERE / "stubs", HERE, *before]
    if pin not in IN_PARTS:
        path.insert(0, router_019)
    variables = {
        "PYTHONPATH": os.pathsep.join(map(str, [*path, slime])),
        "SLIME_CPU_ENGINE": engine,
        "SLIME_CPU_WEIGHT_DIR": str(weight_dir),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "SGLANG_USE_CPU_ENGINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if log is not None:
        variables["SLIME_CPU_TRAIN_LOG"] = str(log)
    if probe:
        variables["SLIME_CPU_PROBE"] = "1"
    if log_dir is not None:
        variables["SLIME_CPU_LOG_DIR"] = str(log_dir)
    return variables


def driver_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """For a driver started as a plain process: its workers get the same variables, by way of the job config."""
    config = {"runtime_env": {"env_vars": dict(variables)}}
    return {**os.environ, **variables, "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(config)}


def read_log(path: str | Path, event: str) -> list[dict]:
    """The lines of one kind (init, train, save, probe) of a run's log."""
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--slime", required=True)
    parser.add_argument("--pin", choices=PINS, required=True)
    parser.add_argument("--engine", choices=ENGINES, default="toy")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--script", default="train.py")
    parser.add_argument("--router-019")
    parser.add_argument("--path", action="append", default=[], help="another folder for PYTHONPATH, before slime's")
    parser.add_argument("--num-rollout", type=int, default=3)
    parser.add_argument("--probe", action="store_true")
    own, extra = sys.argv[1:], []
    if "--" in own:
        at = own.index("--")
        own, extra = own[:at], own[at + 1 :]
    options = parser.parse_args(own)
    folders = Folders(options.work.resolve())
    folders.prepare()
    arguments = slime_arguments(
        options.pin,
        folders.model,
        folders.prompts,
        weight_dir=folders.weights,
        num_rollout=options.num_rollout,
        extra=tuple(extra),
    )
    variables = environment(
        options.pin,
        options.slime,
        engine=options.engine,
        weight_dir=folders.weights,
        log=folders.log,
        probe=options.probe,
        log_dir=folders.root,
        router_019=options.router_019,
        before=tuple(options.path),
    )
    command = [sys.executable, options.script, *arguments]
    return subprocess.run(command, cwd=options.slime, env=driver_environment(variables), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
