"""Figures of the benchmark as text: medians, tables, targets, and what this machine is."""

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil


@dataclass(frozen=True)
class Target:
    """One figure held against its bound; `better` says on which side of the bound it should lie."""

    what: str
    bound: float
    value: float
    unit: str
    better: str  # "lower" | "higher"

    @property
    def reached(self) -> bool:
        return self.value >= self.bound if self.better == "higher" else self.value <= self.bound

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "reached": self.reached}


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median with its spread; the samples of one figure, all in one unit."""
    low, high = min(samples), max(samples)
    return {"median": statistics.median(samples), "min": low, "max": high, "n": len(samples)}


def figure(value: float, digits: int = 3) -> str:
    """About `digits` significant digits, never in exponent form."""
    if value == 0:
        return "0"
    whole = len(str(int(abs(value))))
    return f"{value:,.{max(0, digits - whole)}f}"


def spread(found: dict[str, float]) -> str:
    """`median (min-max)`."""
    return f"{figure(found['median'])} ({figure(found['min'])}-{figure(found['max'])})"


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left, the others to the right."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    out = [title]
    for cells in [header, ["-" * width for width in widths], *rows]:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        out.append(("  " + "  ".join([cells[0].ljust(widths[0]), *padded[1:]])).rstrip())
    return "\n".join(out) + "\n"


def machine() -> dict[str, Any]:
    """CPU, memory, versions and load: what the figures are to be read with."""
    cpu = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = psutil.virtual_memory()
    return {
        "cpu": cpu[0] if cpu else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory.total / 1e9, 1),
        "memory_available_gb": round(memory.available / 1e9, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("ray", "pyarrow", "numpy", "torch")},
        "load_average_at_start": [round(load, 2) for load in os.getloadavg()],
    }


def targets_table(targets: Sequence[Target]) -> str:
    rows = [
        [
            target.what,
            f"{'>=' if target.better == 'higher' else '<='} {figure(target.bound)} {target.unit}",
            f"{figure(target.value)} {target.unit}",
            "yes" if target.reached else "NO",
        ]
        for target in targets
    ]
    return table("Targets", ["", "target", "value", "reached"], rows)


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()
