"""The pages: what is made of the code is what the code says, links lead somewhere, commands and flags exist."""

import functools
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import reference
from slime.cross_job.ops import cli, export, steer  # noqa: F401  they add their commands
from slime.cross_job.ops.app import app
from slime.cross_job_arguments import add_arguments
from tests.slime import features
from tests.support.patience import patient

ROOT = Path(__file__).resolve().parents[2]
OVERLAY = ROOT / "slime_overlay"
PAGES = OVERLAY / "docs" / "en" / "advanced"
ENTRY = PAGES / "cross-job.md"
OURS = sorted([ROOT / "README.md", ROOT / "README_zh.md", *ROOT.glob("docs/*.md"), *PAGES.glob("*.md")])
"""Pages of this repository, of which all is checked."""
ALL = sorted({*OURS, *(ROOT / name for name in ("patches/README.md", "tests/chaos/README.md", "scripts/bench.md"))})
ALL += sorted(ROOT.glob("docker/**/README.md"))
COMMANDS = {name: command for name, command in typer.main.get_command(app).commands.items()}  # type: ignore[attr-defined]
MOST_LINES = 150
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<!`)!?\[[^\]]*\]\(([^)\s]+)\)")
NOT_OURS = {"export", "git", "ray", "docker", "openssl", "helm", "kubectl", "$EDITOR"}


def of_page(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_tables_are_what_the_code_says():
    text = reference.PAGE.read_text()
    assert text == reference.page(text), "run: python scripts/reference.py"


def test_every_error_has_its_exit_code():
    shown = dict(re.findall(r"^\| \d+ \| `(\w+)` \| (.+) \|$", reference.PAGE.read_text(), re.MULTILINE))
    assert {"CrossJobError", "WrongWeights", "Stopped"} <= shown.keys()
    assert all(len(text) > 10 for text in shown.values())


def test_the_first_page_is_short_and_names_the_pins():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= MOST_LINES
    pins = json.loads((ROOT / "patches" / "upstream.json").read_text())["pins"]
    counts = re.search(
        r"^\| \*\*patches, inserted lines\*\* \| (.*) \|$", (ROOT / "patches/README.md").read_text(), re.M
    )
    assert counts
    for pin, count in zip(pins, counts[1].split(" | "), strict=True):
        row = re.search(rf"^\| {re.escape(pin['name'])} \| ([^|]*) \| {re.escape(count)} \|$", text, re.MULTILINE)
        assert row, f"{pin['name']}: {count}"
        assert pin["name"] != "main" or row[1].startswith(pin["commit"][:9])


def test_the_entry_names_every_page_of_the_overlay():
    named = set(LINK.findall(ENTRY.read_text()))
    assert {page.name for page in PAGES.glob("*.md")} - {ENTRY.name} <= named
    assert [
        page for page in (OVERLAY / "docs").rglob("*") if page.is_file() and not page.name.startswith("cross-job")
    ] == []


# ---------------------------------------------------------------------- links


def prose(text: str) -> str:
    """Without code."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def anchors(path: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text()), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        assert slug not in found, f"two headings {heading!r} in {of_page(path)}"
        found.add(slug)
    return found


@pytest.mark.parametrize("page", ALL, ids=of_page)
def test_links_lead_somewhere(page):
    for link in LINK.findall(prose(page.read_text())):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link}: there is no such file"
        assert not anchor or anchor in anchors(target), f"{link}: there is no such heading"
        if OVERLAY in page.parents:
            assert PAGES in target.parents, f"{link}: only the overlay comes into a user's checkout"


# ---------------------------------------------------------------------- commands and flags


def lines_of(text: str) -> Iterator[str]:
    """The commands in the fenced blocks of a shell, a line each."""
    for language, body in FENCE.findall(text):
        if language == "bash":
            yield from filter(None, (line.strip() for line in body.replace("\\\n", " ").splitlines()))


@functools.cache
def help_of(script: str, *words: str) -> str:
    command = [sys.executable] if script.endswith(".py") else []
    command += [str(ROOT / script), *words, "--help"]
    return subprocess.run(command, capture_output=True, text=True, timeout=patient(60), cwd=ROOT, check=True).stdout


def cross_job_flags() -> set[str]:
    return set(add_arguments(reference.argparse.ArgumentParser())._option_string_actions)


def flags_of(words: list[str]) -> set[str]:
    """The flags that are given to a script itself."""
    own = words[: words.index("--")] if "--" in words else words
    return {word.partition("=")[0] for word in own if re.match(r"--?[a-z]", word)}


def check_ours(words: list[str], known: set[str]) -> None:
    assert not (unknown := flags_of(words) - known), f"{' '.join(words)}: {unknown}"


def check_line(line: str) -> None:
    words = shlex.split(line, comments=True)
    if not words or words[0] in NOT_OURS or re.match(r"\w+=", words[0]):
        return
    if words[0] == ".":
        assert (ROOT / words[1]).is_file(), line
        return
    if words[0] in ("python", "python3") and words[1] == "-m":
        assert (ROOT / f"{words[2].replace('.', '/')}.py").is_file(), line
        return
    if "&&" in words:
        at = words.index("&&")
        check_line(shlex.join(words[:at]))
        check_line(shlex.join(words[at + 1 :]))
        return
    words = words[1:] if words[0] in ("python", "python3") else words
    script = next((name for name in (words[0], f"slime_overlay/{words[0]}") if (ROOT / name).is_file()), "")
    assert script, f"{line}: there is no {words[0]}"
    if script == "scripts/slime-cross-job":
        if words[1] != "COMMAND":
            options = {name for one in COMMANDS[words[1]].params for name in one.opts}
            check_ours(words[2:], options)
        return
    sub = words[1:2] if script.endswith(("cross_job_replay.py", "launch_cluster.sh")) else []
    known = set(re.findall(r"--?[a-z][\w-]*", help_of(script, *sub)))
    if script.startswith("scripts/launch_"):
        known |= cross_job_flags()
    check_ours(words, known)


@pytest.mark.parametrize("page", ALL, ids=of_page)
def test_commands_exist_with_their_flags(page):
    for line in lines_of(page.read_text()):
        check_line(line)


@pytest.mark.parametrize(
    "line",
    [
        "scripts/nosuch.sh",
        "scripts/apply.sh ~/slime --revert",
        "scripts/slime-cross-job status --pretty",
        "scripts/launch_train.sh --job-id exp1 --slim ~/slime -- --anything",
        "python cross_job_replay.py record --recordings x",
    ],
)
def test_a_wrong_command_is_found(line):
    with pytest.raises(AssertionError):
        check_line(line)


@pytest.mark.parametrize("page", OURS, ids=of_page)
def test_what_is_named_in_passing_exists(page):
    """Paths of this repository, flags of cross-job, and commands of slime-cross-job, in code within a line."""
    flags = cross_job_flags()
    for code in re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text())):
        for path in re.findall(r"(?<![\w/~.])((?:scripts|tests|docker|patches)/[\w./-]*\w)", code):
            assert (ROOT / path).exists(), path
        for flag in re.findall(r"--(?:cross-job|job-id)[a-z-]*", code):
            assert flag in flags or flag == "--cross-job-", flag
        for command in re.findall(r"slime-cross-job ([a-z][\w-]+)", code):
            assert command in COMMANDS, command


# ---------------------------------------------------------------------- shape


@pytest.mark.parametrize("page", OURS, ids=of_page)
def test_lines_are_not_too_long(page):
    if page == features.PAGE:
        return  # it is made
    long = [line for line in page.read_text().splitlines() if len(line) > 120 and not line.startswith("|")]
    assert long == []


def test_the_chinese_page_has_the_same_commands_and_pages():
    english, chinese = ((ROOT / name).read_text() for name in ("README.md", "README_zh.md"))
    bare = lambda text: [shlex.split(line, comments=True) for line in lines_of(text)]  # noqa: E731
    assert bare(chinese) == bare(english)
    local = lambda text: {link for link in LINK.findall(text) if "README" not in link}  # noqa: E731
    assert local(chinese) == local(english)
    rows = lambda text: re.findall(r"^\| ([\w.]+) \| .*\| (\d+, \d+) \|$", text, re.MULTILINE)  # noqa: E731
    assert rows(chinese) == rows(english) != []
