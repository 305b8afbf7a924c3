"""Real slime at each pin, cloned and patched by the project's scripts, and a Ray cluster with logical GPUs."""

import functools
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from local_cluster import LocalCluster
from tests.slime.single_job import PINS
from tests.slime.slime_jobs import CRITIC_ONLY, FIGURES, ROLLOUTS, Run, end_as_upstream, end_well, ppo

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    """checkout(pin, patched): folder of slime at that pin. SLIME_AT_MAIN names a patched checkout of another commit
    that stands for the pin main, see scripts/track_upstream.sh."""
    made: dict[tuple[str, bool], Path] = {}

    def get(pin: str, patched: bool = True) -> Path:
        if (pin, patched) not in made:
            folder = tmp_path_factory.mktemp("slime") / f"{pin}-{'patched' if patched else 'upstream'}"
            ported = os.environ.get("SLIME_AT_MAIN") if pin == "main" else None
            if ported and patched:
                folder = Path(ported)
            elif ported:
                subprocess.run(["git", "clone", "-q", ported, folder], check=True)
            else:
                script("fetch_slime.sh", folder, pin)
            if patched and not ported:
                script("apply.sh", folder)
                script("apply.sh", folder, "--verify")
            made[pin, patched] = folder
        return made[pin, patched]

    return get


def script(name: str, *args: object) -> None:
    done = subprocess.run([ROOT / "scripts" / name, *map(str, args)], capture_output=True, text=True, check=False)
    if done.returncode and name == "fetch_slime.sh":
        pytest.skip(f"slime cannot be cloned here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(num_cpus=24, num_gpus=5, object_store_bytes=800_000_000) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def single(
    cluster: LocalCluster, checkout: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[tuple[Any, ...]]]:
    """single(pin, script): FIGURES of each step of slime in one job, with every default of the tests; run once."""
    made: dict[tuple[str, str], list[tuple[Any, ...]]] = {}

    def get(pin: str, script: str = "train.py") -> list[tuple[Any, ...]]:
        if (pin, script) not in made:
            run = Run(cluster.api, pin, checkout(pin), tmp_path_factory.mktemp("single") / f"{pin}-{script}")
            end_as_upstream(script, pin, run.start(script))
            steps = run.steps(*FIGURES)
            assert [step[0] for step in steps] == list(range(ROLLOUTS))
            made[pin, script] = steps
        return made[pin, script]

    return get


@pytest.fixture(scope="session")
def single_ppo(
    cluster: LocalCluster, checkout: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, list[tuple[Any, ...]]]]:
    """single_ppo(pin): FIGURES of each step of slime's PPO in one job, by role (`slime_jobs.ppo`); run once."""

    @functools.cache
    def get(pin: str) -> dict[str, list[tuple[Any, ...]]]:
        run = Run(cluster.api, pin, checkout(pin), tmp_path_factory.mktemp("single") / "ppo")
        end_well(run.start("train.py", *ppo(run), save=run.root / "critic", save_interval=2))
        steps = {role: run.steps(*FIGURES, role=role) for role in ("actor", "critic")}
        assert [step[0] for step in steps["critic"]] == list(range(ROLLOUTS))
        assert [step[0] for step in steps["actor"]] == list(range(CRITIC_ONLY, ROLLOUTS))
        assert len({step[-1] for of_role in steps.values() for step in of_role}) == 2 * ROLLOUTS - CRITIC_ONLY
        return steps

    return get


@pytest.fixture(params=PINS)
def pin(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def new_run(cluster: LocalCluster, checkout: Callable[..., Path], tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """new_run(pin, name, ...): an experiment of its own; what it started is stopped at the end of the test."""
    runs: list[Run] = []

    def make(pin: str, name: str, **given: Any) -> Run:
        runs.append(Run(cluster.api, pin, checkout(pin), tmp_path / name, **given))
        return runs[-1]

    yield make
    for run in runs:
        run.stop()
