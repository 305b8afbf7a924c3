"""Record a job's rollouts, and train on them again without a rollout job.

    cross_job_replay.py record --job-id JOB     --store URI --recording NAME        until the job's stream ends
    cross_job_replay.py list                    --store URI [--recording NAME] [--json]
    cross_job_replay.py serve  --job-id REPLAY  --store URI --recording NAME        in the place of the rollout job
    cross_job_replay.py export                  --store URI --recording NAME FOLDER
    cross_job_replay.py import                  --store URI --recording NAME 'DIR/{rollout_id}.pt' -- ARGUMENTS

`record` and `serve` are drivers on a Ray cluster, as the two jobs are. `export` writes the files that slime's
--load-debug-rollout-data reads; `import` reads those of --save-debug-rollout-data, with slime's own code, which needs
slime's ARGUMENTS and a patched checkout. NAME may also be the job id of a run that keeps its rollouts in the store
itself (--cross-job-store), as far as it has not freed them.

A URI with a password is given by --store-env NAME or --store-file PATH: a command line is seen by others.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slime.cross_job.adapter import debug_files
from slime.cross_job.adapter.arguments import PEER_GRACE_S
from slime.cross_job.client.jobs import run
from slime.cross_job.errors import BadInput, PayloadDamaged
from slime.cross_job.settings import COMPRESSIONS, Settings, add_arguments, store_uri
from slime.cross_job.storage import Store, open_store
from slime.cross_job.storage.recording import IMPORTED, Header, Recording, is_recording, recordings
from slime.cross_job.types import Ids, check_job_id, ids_text


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        store = added.add_mutually_exclusive_group(required=True)
        store.add_argument("--store", help="URI of the durable store with the recordings")
        store.add_argument("--store-env", metavar="NAME", help="environment variable that holds that URI")
        store.add_argument("--store-file", metavar="PATH", help="file that holds that URI")
        needed = name not in ("list", "record")
        default = " (default: JOB.recording)" if name == "record" else ""
        added.add_argument("--recording", required=needed, help=f"name of the recording{default}")
        return added

    one = command("record", "keep every rollout of a running job")
    one.add_argument(
        "--compression", choices=COMPRESSIONS, default="none", help="compression of what is kept (default: none)"
    )
    one.add_argument("--address", help="of the Ray cluster (default: RAY_ADDRESS)")
    add_arguments(one)
    one = command("list", "the recordings of a store, or the rollouts of one")
    one.add_argument("--json", action="store_true", help="as JSON")
    one = command("serve", "answer the demands of a train job with recorded rollouts")
    one.add_argument("--num-rollout", type=int, help="of the train job, where it is not that of the recorded run")
    one.add_argument(
        "--free",
        action="append",
        default=[],
        metavar="TERM",
        help="let the train job have another value of this argument of slime, as global-batch-size; may be repeated",
    )
    one.add_argument("--address", help="of the Ray cluster (default: RAY_ADDRESS)")
    add_arguments(one)
    one = command("export", "write recorded rollouts as files of slime's --load-debug-rollout-data")
    one.add_argument("--rollouts", type=parse_ids, help="which, as 0-4,7 (default: all)")
    one.add_argument("folder", type=Path, metavar="FOLDER", help="a new folder")
    one = command("import", "make a recording of files of slime's --save-debug-rollout-data")
    one.add_argument(
        "--compression", choices=COMPRESSIONS, default="none", help="compression of what is kept (default: none)"
    )
    one.add_argument("--rollouts", type=parse_ids, help="which, as 0-4,7 (default: all)")
    one.add_argument("--ranks", type=int, default=1, help="data-parallel ranks to split for (any will do; default: 1)")
    one.add_argument("files", metavar="DIR/{rollout_id}.pt", help="the path template that was given to slime")
    return made


def parse_ids(text: str) -> Ids:
    """The rollouts of "0-4,7"."""
    found = Ids()
    for piece in text.split(","):
        first, dash, last = piece.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise argparse.ArgumentTypeError(f"{text!r} names no rollouts: write ids and ranges, as 0-4,7")
        for rollout_id in range(int(first), int(last or first) + 1):
            found.add(rollout_id)
    return found


def main(words: list[str]) -> None:
    """Carry out one command. Raises CrossJobError."""
    own, rest = words, []
    if "--" in words:
        at = words.index("--")
        own, rest = words[:at], words[at + 1 :]
    options = parser().parse_args(own)
    if rest and options.command != "import":
        raise BadInput(f"{options.command} takes none of slime's arguments: leave out what follows --")
    commands = {"record": _record, "list": _list, "serve": _serve, "export": _export}
    if options.command == "import":
        _import(options, rest)
    else:
        commands[options.command](options)


def _store(options: argparse.Namespace) -> Store:
    uri = store_uri(options.store, options.store_env, options.store_file, "--store")
    assert uri is not None
    return open_store(uri)


def _record(options: argparse.Namespace) -> None:
    from slime.cross_job.adapter.replay import record

    settings = _connected(options)
    name = options.recording or f"{options.job_id}.recording"
    recording = record(options.job_id, _store(options), name, settings, options.compression)
    print(f"recording {name}: {ids_text(recording.ids)}")


def _serve(options: argparse.Namespace) -> None:
    from slime.cross_job.adapter.replay import serve, terms_of

    recording = Recording(_store(options), options.recording)
    free = tuple(name if name in recording.terms else f"--{name}" for name in options.free)
    terms = terms_of(recording, options.num_rollout, free)
    served = serve(options.job_id, recording, _connected(options), terms)
    print(f"recording {options.recording}: {served} rollouts served to job {options.job_id}")


def _list(options: argparse.Namespace) -> None:
    store = _store(options)
    if options.recording is None:
        found, damaged = [], {}
        for name in recordings(store):
            try:
                found.append(_summary(Recording(store, name)))
            except PayloadDamaged as error:
                damaged[name] = str(error)
        if options.json:
            print(json.dumps([*found, *({"recording": name, "unreadable": why} for name, why in damaged.items())]))
            return
        for one in found:
            state = one["ended"] or "open: its recorder is there still, or ended before the job"
            origin = f"{one['how']} from {one['job_id']}"
            print(f"{one['recording']}: {one['shown']}, {origin}, {one['nbytes']} bytes; {state}")
        for name, why in damaged.items():
            print(f"{name}: {why}")
        if not found and not damaged:
            print(f"no recordings in {store.shown}")
        return
    recording = Recording(store, options.recording)
    if options.json:
        rollouts = [asdict(entry) for entry in recording.rollouts()]
        print(json.dumps({**_summary(recording), "terms": recording.terms, "rollouts": rollouts}))
        return
    for entry in recording.rollouts():
        weights = "" if entry.weight_version is None else f", weights {entry.weight_version}"
        size = f"{entry.num_samples} samples in {entry.parts} parts, {entry.nbytes} bytes"
        print(f"rollout {entry.rollout_id} version {entry.version}: {size}{weights}")
    for name, why in recording.damaged.items():
        print(f"damaged: {name}: {why}")


def _summary(recording: Recording) -> dict[str, Any]:
    header, rollouts = recording.header, recording.rollouts()
    return {
        "recording": recording.name,
        "job_id": header.job_id if header else recording.name,
        "how": header.how if header else "kept by its job",
        "ended": header.ended if header else "",
        "ids": recording.ids.ranges(),
        "shown": ids_text(recording.ids),
        "nbytes": sum(entry.nbytes for entry in rollouts),
        "damaged": recording.damaged,
    }


def _export(options: argparse.Namespace) -> None:
    from slime.cross_job.adapter.conversion import MISSING, to_samples

    recording = Recording(_store(options), options.recording)
    chosen = [recording.find(rollout_id) for rollout_id in options.rollouts or recording.ids]
    template = debug_files.make_folder(options.folder)
    for entry in chosen:
        try:
            samples = to_samples(recording.load(entry), entry.meta)
        except BadInput as error:
            raise BadInput(f"rollout {entry.rollout_id} of recording {recording.name!r}: {error}") from None
        path = debug_files.write(template, entry.rollout_id, samples)
        print(f"rollout {entry.rollout_id}: {len(samples)} samples in {path}")
    print(f"not in these files, because training data does not have it: {MISSING}")
    print(f"read them with --load-debug-rollout-data '{template}'")


def _import(options: argparse.Namespace, rest: list[str]) -> None:
    if not rest:
        raise BadInput(
            "give slime's arguments after --: how rewards are normalised and samples are split depends on them, and "
            "slime's own code does both"
        )
    files = debug_files.find(options.files)
    chosen = list(options.rollouts or files)
    if missing := [rollout_id for rollout_id in chosen if rollout_id not in files]:
        raise BadInput(f"there is no file for {ids_text(missing)}: {options.files} has {ids_text(files)}")
    store = _store(options)
    if is_recording(store, options.recording):
        raise BadInput(f"{store.shown} has a recording {options.recording!r} already: choose another --recording")
    samples = {rollout_id: debug_files.read(files[rollout_id], rollout_id) for rollout_id in chosen}
    args = _slime_arguments(rest)

    from slime.cross_job.adapter.conversion import by_slime
    from slime.cross_job.adapter.handshake import terms

    made = {rollout_id: by_slime(args, found, options.ranks) for rollout_id, found in samples.items()}
    stated = terms(args, in_parts=any("split" in meta for _, meta in made.values()))
    header = Header(options.files, IMPORTED, stated)
    recording = Recording.make(store, options.recording, header, options.compression)
    for rollout_id, (parts, meta) in made.items():
        recording.keep(rollout_id, parts, meta=meta)
        print(f"rollout {rollout_id}: {meta['samples']} samples from {files[rollout_id]}")
    recording.end("all files were imported")


def _slime_arguments(words: list[str]) -> Any:
    try:
        from slime.utils.arguments import parse_args
    except ImportError as error:
        raise BadInput(
            f"import runs slime's own code, which is not found here: start it in a patched checkout ({error})"
        ) from None
    sys.argv = ["train.py", *words]
    return parse_args()


def _connected(options: argparse.Namespace) -> Settings:
    """The settings of a client, after this process has joined the cluster."""
    from slime.cross_job.client.connection import ensure_ray

    check_job_id(options.job_id)
    if options.cross_job_peer_grace_s is None:
        options.cross_job_peer_grace_s = PEER_GRACE_S
    settings = Settings.from_args(options)
    ensure_ray(options.address)
    return settings


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
