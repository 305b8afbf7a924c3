"""The page as a text: what is inside, what its policy allows, and that no data ends the element in which it lies; and
the figures of a report."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser

import numpy
import pytest

from slime.cross_job.errors import BadInput
from slime.cross_job.ops.page import FOLDER, SCRIPTS, embedded, live_page, plain, report_page, to_json
from slime.cross_job.ops.report import report_data, spread, write_report
from tests.support.viewer_stand_in import HOSTILE, ViewerStandIn


class Elements(HTMLParser):
    """Tags with their attributes, and what lies in scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.inside, self._parts = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._parts = [] if tag in ("script", "style") else None

    def handle_data(self, data):
        if self._parts is not None:
            self._parts.append(data)

    def handle_endtag(self, tag):
        if self._parts is not None:
            self.inside.append((*self.tags[-1], "".join(self._parts)))
        self._parts = None


def digest(text):
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@pytest.fixture(scope="module")
def run():
    viewer = ViewerStandIn().begin()
    viewer.run(40)
    return viewer


@pytest.fixture(params=["live", "report"])
def html(request, run):
    if request.param == "live":
        return live_page().html
    look = run.look("exp")
    return report_page({"look": look, "figures": report_data(look), "namespace": "x", "written_at": 1.0})


def test_the_page_asks_nobody(html):
    elements = Elements(html)
    for tag, attributes in elements.tags:
        assert not {"src", "srcset", "action", "style"} & attributes.keys(), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert attributes.get("href", "data:,") in ("data:,", "#main")
    sources = " ".join(data for tag, _, data in elements.inside)
    assert not re.findall(r"@import|url\(|https?://(?!www\.w3\.org/2000/svg)", sources)


def test_the_policy_allows_this_style_and_this_script_and_no_other(html):
    elements = Elements(html)
    (policy,) = [a["content"] for tag, a in elements.tags if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    script = "".join(data for tag, a, data in elements.inside if tag == "script" and "type" not in a)
    style = "".join(data for tag, _, data in elements.inside if tag == "style")
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == digest(script)
    assert rules["style-src"] == digest(style)
    assert rules["connect-src"] == ("'none'" if 'id="data"' in html else "'self'")
    assert rules["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in live_page().policy


def test_no_script_makes_markup_of_a_text():
    assert {path.name for path in FOLDER.glob("*.js")} == {*SCRIPTS}
    for name in SCRIPTS:
        source = (FOLDER / name).read_text()
        assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", source)
        assert not re.findall(r"setAttribute\(\"(style|on)", source)


@pytest.mark.parametrize("text", [*HOSTILE, "</script>", "<!--", "]]>", "\u2028\u2029", "&lt;"])
def test_hostile_data_stays_inside_its_element_and_arrives_whole(text):
    page = report_page({"look": {"text": text, text: 1}})
    elements = Elements(page)
    assert [tag for tag, _ in elements.tags].count("script") == 2
    (block,) = [data for tag, a, data in elements.inside if a.get("type") == "application/json"]
    assert json.loads(block) == {"look": {"text": text, text: 1}}
    assert not set("<>&") & set(embedded(text))
    assert embedded(text).isascii()


def test_ten_million_characters_are_embedded():
    text = "</script>" * 1_200_000
    assert json.loads(embedded([text])) == [text]


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (2**53 + 1, "9007199254740993"),
        (2**53, 2**53),
        (True, True),
        (numpy.float32(0.5), 0.5),
        (numpy.arange(3), [0, 1, 2]),
        (b"a\xff", "a\\xff"),
        ({1: {2: {3}}}, {"1": {"2": [3]}}),
    ],
)
def test_what_json_cannot_hold_is_told_in_words(value, found):
    assert plain(value) == found
    assert json.loads(to_json(value)) == found


def test_depth_is_bounded():
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    assert "too deep" in to_json(deep)


# ---------------------------------------------------------------- the report


def test_the_figures_are_those_of_the_rows():
    rows = [
        {"demanded": 10.0 + 10 * r, "begun": 11.0 + 10 * r, "made": 14.0 + 10 * r, "published": 14.5 + 10 * r}
        | {"claimed": 16.0 + 10 * r, "acked": 18.0 + 11 * r, "num_samples": 64, "staleness": r % 2, "nbytes": 100}
        | {"rollout_id": r, "reward": (0.1, 0.9, math.nan, 0.4, None)[r], "state": "acked", "seq": r}
        for r in range(5)
    ]
    status = ViewerStandIn().begin().status("exp") | {"acked": 5}
    found = report_data({"status": status, "progress": rows, "wall": status["began"] + 100.0})
    assert found["wall_s"] == 52  # from 10 to 18 + 44
    assert found["rollouts_per_minute"] == pytest.approx(60 * 5 / 52)
    assert found["samples_per_s"] == pytest.approx(5 * 64 / 52, abs=1e-6)
    assert found["spans"]["generate"] == {"count": 5, "p50": 3, "p95": 3, "max": 3, "mean": 3}
    assert found["spans"]["publish"]["p50"] == 0.5
    assert found["spans"]["queue wait"]["max"] == 1.5
    train = [2, 3, 4, 5, 6]
    assert found["spans"]["train to ack"]["p50"] == numpy.percentile(train, 50)
    assert found["spans"]["train to ack"]["p95"] == numpy.percentile(train, 95)
    assert spread([5.0, 1.0, 3.0]) == {"count": 3, "p50": 3, "p95": pytest.approx(4.8), "max": 5, "mean": 3}
    assert found["staleness"] == {"0": 3, "1": 2}
    assert found["reward"] == {"count": 3, "first": 0.1, "last": 0.4, "max": 0.9, "max_at": 1}
    json.dumps(found, allow_nan=False)


def test_the_chip_says_how_the_job_stands():
    """Not what its operator wants (`control`), which is "running" when both jobs are dead."""
    page = live_page().html
    assert "status.state" in page
    assert "status.control" not in page


def test_a_report_names_its_cluster(run, tmp_path):
    write_report(run, "exp", tmp_path / "report.html")
    assert f'"cluster":"{run.address}"' in (tmp_path / "report.html").read_text()


def test_waits_are_shares_of_the_whole_run():
    """Those before the first demand are in it, and those of rollouts that are remembered no more."""
    viewer = ViewerStandIn().begin()
    viewer.ahead_s = 1000.0
    viewer.ledger.views.note_wait("p-exp", "next_demand", 1000.0)
    viewer.run(3)
    look = viewer.look("exp")
    status = look["status"] | {"began": look["wall"] - 1000.0}
    found = report_data({**look, "status": status})
    shares = {what: share for what, share in found["waited_share"].items() if found["waited_s"][what]}
    assert set(shares) == {"producer demand", "consumer data"}
    assert all(0 < share <= 1 for share in shares.values())
    assert shares["consumer data"] == pytest.approx(found["waited_s"]["consumer data"] / 1000, rel=0.01)


def test_a_job_of_which_nothing_is_known_has_no_figures():
    found = report_data(ViewerStandIn().begin().look("exp"))
    assert found["wall_s"] is None
    assert found["rollouts_per_minute"] is None
    assert found["spans"]["generate"] == spread([])
    assert found["reward"]["count"] == 0


def test_write_report_writes_a_whole_file_whose_data_give_the_figures_again(run, tmp_path):
    figures = write_report(run, "exp", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    (block,) = [data for _, a, data in Elements(page).inside if a.get("type") == "application/json"]
    data = json.loads(block)
    assert data["figures"] == figures == report_data(data["look"])
    assert figures["rollouts"]["acked"] == 40
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_folder_that_is_not_there_is_told(run, tmp_path):
    with pytest.raises(BadInput, match="cannot write the report to "):
        write_report(run, "exp", tmp_path / "nowhere" / "report.html")
