"""Looking into rollouts, and taking them out: peek, export; reading tokens with a tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import BadInput
from ..types import shortened
from ..vault.preview import preview, shown
from .app import DEFAULT, Address, JobId, Namespace, RolloutId, app, connected, out_json, say
from .text import dumps

MOST_TOKENS = 200_000
_FORMATS = ("arrow", "jsonl", "debug")
_ALL = 1 << 40


@app.command()
def peek(
    rollout: RolloutId,
    address: Address = None,
    namespace: Namespace = DEFAULT,
    job_id: JobId = None,
    first: Annotated[int, typer.Option("--first", help="begin with this sample", min=0)] = 0,
    count: Annotated[int, typer.Option("--count", "-c", help="how many", min=1, max=10_000)] = 3,
    version: Annotated[int | None, typer.Option("--version", help="of the rollout (default: the newest)")] = None,
    full: Annotated[bool, typer.Option("--full", help="cut nothing")] = False,
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", help="folder or name, to read tokens with")] = None,
) -> None:
    """Some samples as JSON, one a line; long lists and texts are cut."""
    viewer = connected(address, namespace)
    job = viewer.the_job(job_id)
    limits: dict[str, int] = {"numbers": _ALL, "characters": _ALL} if full else {}
    limits |= {"numbers": max(MOST_TOKENS, limits.get("numbers", 0))} if tokenizer else {}
    found = viewer.samples(job, rollout, version, first, count, **limits)
    if "samples" not in found:
        out_json(found, lines=True)
        return
    texts = read_tokens(tokenizer, found) if tokenizer else {}
    for sample in found["samples"]:
        line = {"rollout_id": rollout, "sample": sample["index"], **sample["values"], **texts.get(sample["index"], {})}
        out_json(line, lines=True)


@app.command()
def export(
    rollouts: Annotated[list[int], typer.Argument(metavar="ID...", help="the rollouts")],
    to: Annotated[Path, typer.Option("--out", help="a new folder")],
    address: Address = None,
    namespace: Namespace = DEFAULT,
    job_id: JobId = None,
    how: Annotated[str, typer.Option("--format", "-f", help=", ".join(_FORMATS))] = "arrow",
) -> None:
    """Write whole rollouts to files: Arrow IPC streams (one a part), JSON lines, or slime's debug rollout files."""
    if how not in _FORMATS:
        raise BadInput(f"--format {how} is not a format: there are {', '.join(_FORMATS)}")
    viewer = connected(address, namespace)
    job = viewer.the_job(job_id)
    found = {rollout: viewer.parts(job, rollout) for rollout in rollouts}
    if how == "debug":
        _debug(to, found)
        return
    try:
        to.mkdir(parents=True)
    except OSError as error:
        raise BadInput(f"{to} cannot be made: {error.strerror}: give a new folder") from None
    for rollout, (located, parts) in found.items():
        for number, part in enumerate(parts):
            if not hasattr(part, "ipc"):
                raise BadInput(f"rollout {rollout} is no batch, but a {type(part).__name__}: it has no columns")
            if how == "arrow":
                path = to / f"rollout-{rollout}.part-{number}.arrow"
                path.write_bytes(part.ipc)
                say(f"{path}: {part.num_samples} samples")
        if how == "jsonl":
            path = to / f"rollout-{rollout}.jsonl"
            with path.open("w") as lines:
                for sample in preview(parts, 0, _ALL, _ALL, _ALL)["samples"]:
                    head = {"rollout_id": rollout, "version": located.version, "sample": sample["index"]}
                    lines.write(dumps({**head, **sample["values"]}) + "\n")
            say(f"{path}: {located.payload.num_samples} samples")


def read_tokens(tokenizer: str, found: Mapping[str, Any]) -> dict[int, dict[str, str]]:
    """The texts of samples, by index: of `tokens`, split into prompt and response where `response_lengths` says how.

    Raises:
        BadInput: there is no such tokenizer, or nothing to read it with.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise BadInput("--tokenizer needs the package transformers: pip install transformers") from None
    try:
        reader = AutoTokenizer.from_pretrained(tokenizer)
    except Exception as error:  # transformers' own, of many kinds
        words = shortened(" ".join(str(error).split()), 300)
        raise BadInput(f"{tokenizer} cannot be read as a tokenizer: {words}") from None
    texts = {}
    for sample in found.get("samples", ()):
        tokens = [t for t in sample["values"].get("tokens", ()) if isinstance(t, int)]
        length = sample["values"].get("response_lengths")
        at = len(tokens) - length if isinstance(length, int) and 0 <= length <= len(tokens) else 0
        pieces = {"prompt_text": tokens[:at], "response_text": tokens[at:]}
        texts[sample["index"]] = {name: shown(reader.decode(ids)) for name, ids in pieces.items() if ids}
    return texts


def _debug(to: Path, found: Mapping[int, Any]) -> None:
    from ..adapter import debug_files
    from ..adapter.conversion import MISSING, to_samples

    made = {rollout: to_samples(parts, located.payload.meta) for rollout, (located, parts) in found.items()}
    template = debug_files.make_folder(to)
    for rollout, samples in made.items():
        say(f"{debug_files.write(template, rollout, samples)}: {len(samples)} samples")
    say(f"training data does not have, and these files therefore lack: {MISSING}")
    say(f"read them with --load-debug-rollout-data '{template}'")
