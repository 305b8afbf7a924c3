"""The live view and the report in a real headless Chromium. What the page shows comes from a stand-in of the viewer (a
real ledger in this process), in the last test from a real Ray cluster with its broker and vault."""

import contextlib
import json
import os
import signal
import statistics
import time

import pytest

from slime.cross_job.errors import BrokerLost
from slime.cross_job.ops.report import report_data, write_report
from slime.cross_job.ops.web import WebView
from slime.cross_job.types import BROKER_NAME
from tests.support.chromium import Browser, chromium
from tests.support.patience import patient
from tests.support.viewer_stand_in import HOSTILE, ViewerStandIn

POLL_S = 0.25
SHOWN = "document.querySelector('#figures b')"
ACKED = "Number((document.querySelectorAll('#figures b')[1] || {}).textContent)"


@pytest.fixture(scope="module")
def window():
    with chromium() as browser:
        yield browser


@pytest.fixture
def browser(window):
    window.scheme(dark=False)
    window.size(1400)
    window.driver.get("about:blank")
    window.requests()
    window.complaints()
    return window


@pytest.fixture
def viewer():
    return ViewerStandIn().begin(retain=8)


@contextlib.contextmanager
def shown(viewer: ViewerStandIn, browser: Browser, **options):
    with WebView(lambda: viewer, **{"poll_s": POLL_S, **options}) as view:
        browser.driver.get(view.url)
        browser.until(SHOWN)
        yield view


def harmless(browser: Browser, *allowed: str) -> None:
    """No text was executed, no window opened, nobody but `allowed` asked for anything, the policy refused nothing."""
    from selenium.common.exceptions import NoAlertPresentException

    with pytest.raises(NoAlertPresentException):
        _ = browser.driver.switch_to.alert
    assert browser.js("return typeof window.__pwned") == "undefined"
    assert len(browser.driver.window_handles) == 1
    asked = [url for url in browser.requests() if not url.startswith(("data:", "about:", *allowed))]
    assert asked == []
    assert browser.complaints() == []
    strange = "script, img, iframe, link, style, object, embed, a, base, meta"
    assert browser.js(f"return document.querySelectorAll('main :is({strange}), aside :is({strange})').length") == 0


# ---------------------------------------------------------------- what is shown


@pytest.mark.ci
def test_the_whole_of_a_job_is_shown_and_follows_what_happens(viewer, browser):
    viewer.run(30)
    viewer.demand(30, 31, 32)
    viewer.make(30)
    viewer.make(31)
    viewer.train(30, ack=False)
    with shown(viewer, browser) as view:
        browser.until("document.querySelector('[data-state=claimed] .chip')")
        assert browser.text("#job") == "exp"
        assert "generation is the bottleneck" in browser.text("#verdict")
        assert browser.js("return [...document.querySelectorAll('.job h2')].map(n => n.textContent)") == [
            "rollout job",
            "train job",
        ]
        assert "node-a" in browser.text("#jobs")
        assert browser.text("[data-state=claimed] .chip") == "30"
        assert browser.text("[data-state=published] .chip") == "31"
        assert browser.js("return document.querySelectorAll('#charts path.line-a').length") == 2
        assert "attached" in browser.text("#events")
        assert browser.text("#fresh") == "● live"
        assert browser.js("return document.querySelectorAll('#actions button').length") == 0  # read-only
        viewer.train(30)
        viewer.ledger.control("exp", "paused")
        browser.until(f"{ACKED} === 31")
        browser.until("document.querySelector('#verdict-main').textContent.includes('Paused by its operator')")
        browser.until("document.querySelector('#events').textContent.includes('the job is paused now')")
        viewer.ledger.end("p-exp", "dead", "its node left the cluster")
        browser.until("document.querySelector('#verdict').dataset.level === 'error'")
        assert "The rollout job is dead" in browser.text("#verdict-main")
        assert "its node left the cluster" in browser.text("#verdict-main")
        assert browser.text(".job[data-state=dead] .standing b") == "dead"
        assert browser.text("#state") == "✕ dead"
        assert viewer.address in browser.text("#cluster")
        harmless(browser, view.url)


def test_what_was_lost_or_dropped_is_marked(viewer, browser):
    viewer.run(3)
    viewer.demand(3, 4)
    viewer.make(3)
    viewer.make(4)
    viewer.ledger.rollouts.vault_lost("vault")
    with shown(viewer, browser):
        browser.until("document.querySelectorAll('[data-state=lost] .chip').length === 2")
        assert "✕ lost 2" in browser.text("[data-state=lost] h3")
        assert "are lost (3, 4)" in browser.text("#verdict")
        assert browser.text("#figures [data-bad=yes] small") == "lost 2"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 390, 700, 1400])
def test_nothing_overflows_and_text_is_legible(viewer, browser, tmp_path, dark, width):
    viewer.run(60)
    viewer.demand(60, 61)
    viewer.make(60, meta={"reward": 0.9, "long" * 50: "x" * 3000})
    viewer.ledger.note_event("exp", "restarted", "unbreakable" * 60)
    viewer.texts = lambda row: {"response": "w" * 5000, "tokens": [*range(400)]}
    browser.scheme(dark)
    browser.size(width)
    with shown(viewer, browser, allow_control=True) as view:
        browser.until("document.querySelector('[data-state=published] .chip')").click()
        browser.until("document.querySelector('.sample')")
        for state in ("open", "closed"):
            browser.picture(tmp_path / f"{state}.png")
            assert browser.js("return document.documentElement.scrollWidth") <= width, state
            too_wide = browser.js(
                "return [...document.querySelectorAll('body *')].filter(n => n.getClientRects().length && "
                "!n.closest('pre, .scroll, svg, .skip, .chips') && n.getBoundingClientRect().right > innerWidth + 1)"
                ".map(n => n.outerHTML.slice(0, 90))"
            )
            assert too_wide == [], state
            assert browser.js(CONTRASTS) == []
            browser.js("document.querySelector('.close')?.click()")
        assert (tmp_path / "closed.png").stat().st_size > 10_000
        harmless(browser, view.url)


CONTRASTS = """
const rgb = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
const ground = (node) => {
  for (; node; node = node.parentElement) {
    const found = rgb(getComputedStyle(node).backgroundColor);
    if (found.length === 3 || found[3] === 1) return found;
  }
  return [255, 255, 255];
};
const light = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, part, i) => {
  const v = c[i] / 255;
  return sum + part * (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
}, 0);
const weak = [];
let seen = 0;
for (const node of document.querySelectorAll('header *, main *, aside *')) {
  const own = [...node.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  if (!own || node.disabled || node.closest('svg') || !node.getClientRects().length) continue;
  const [a, b] = [light(rgb(getComputedStyle(node).color)), light(ground(node))].sort((x, y) => y - x);
  const contrast = (a + 0.05) / (b + 0.05);
  if (contrast < 4.5) weak.push(`${contrast.toFixed(2)} ${node.textContent.slice(0, 40)}`);
  seen += 1;
}
return seen > 50 ? weak : [`only ${seen} texts were looked at`];
"""
"""Texts whose contrast is below 4.5 to 1 (WCAG AA)."""


def test_it_can_be_used_by_keyboard(viewer, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    viewer.run(20)
    with shown(viewer, browser):
        chip = browser.until("document.querySelector('[data-state=acked] .chip')")
        assert browser.js("return document.querySelectorAll('.chip[tabindex=\"0\"]').length") == 1
        browser.js("arguments[0].focus()", chip)
        first = chip.text
        chip.send_keys(Keys.ARROW_RIGHT)
        second = browser.driver.switch_to.active_element
        assert second.get_attribute("class") == "chip"
        assert second.text != first
        name = second.text
        second.send_keys(Keys.ENTER)
        browser.until("!document.getElementById('rollout').hidden")
        assert browser.driver.switch_to.active_element.text == f"Rollout {name}"
        browser.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
        assert browser.js("return document.getElementById('rollout').hidden")
        assert browser.driver.switch_to.active_element == second
        field = browser.driver.find_element(By.ID, "goto-id")
        field.send_keys("7", Keys.ENTER)
        browser.until("document.querySelector('#rollout-title')?.textContent === 'Rollout 7'")


# ---------------------------------------------------------------- hostile texts


@pytest.mark.ci
def test_hostile_samples_are_shown_and_do_nothing(viewer, browser):
    viewer.num_samples = len(HOSTILE)
    viewer.texts = lambda row: {
        "response": HOSTILE[row],
        HOSTILE[row]: "as a name",
        "nested": {HOSTILE[row]: [HOSTILE[row]]},
    }
    viewer.demand(0)
    viewer.make(0, meta={"reward": 0.5, "text": HOSTILE[1], HOSTILE[2]: 1})
    with shown(viewer, browser) as view:
        browser.until("document.querySelector('[data-state=published] .chip')").click()
        seen = []
        for first in range(0, len(HOSTILE), 2):
            browser.until(f"document.querySelector('.sample h4')?.textContent === 'sample {first}'")
            seen += browser.js(
                "return [...document.querySelectorAll('.sample')].map(s => s.querySelector('pre').textContent)"
            )
            browser.js("[...document.querySelectorAll('.pager button')].pop().click()")
        assert seen[:3] == HOSTILE[:3]  # the witness: they arrived
        assert seen[5] == "␛[31mred␛]0;title␇␛[2J bell and erase"
        assert seen[6].startswith("⟨U+202E⟩gnp.exe⟨U+202C⟩")
        assert seen[7] == "lone \\ud800 surrogates \\udfff"
        assert seen[8] == "nul ␀ and del ␡ and ⟨U+0085⟩"
        assert len(seen) == len(HOSTILE)
        browser.js("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert HOSTILE[1][:40] in browser.text("#rollout-detail").replace('\\"', '"')
        harmless(browser, view.url)


def test_hostile_words_of_jobs_and_events_do_nothing(viewer, browser):
    for text in HOSTILE:
        viewer.ledger.note_event("exp", "lost", text)
    viewer.ledger.heartbeat("c-exp", HOSTILE[0])
    viewer.ledger.end("p-exp", "failed", " ".join(HOSTILE))
    with shown(viewer, browser) as view:
        browser.until("document.querySelectorAll('#events li').length > 10")
        assert HOSTILE[0] in browser.text("#events")
        assert HOSTILE[1][:60] in browser.text("#verdict-main")
        assert "lone ⟨U+D800⟩ surrogates" in browser.text("#events")
        harmless(browser, view.url)


def test_a_line_of_ten_million_characters_is_cut(viewer, browser):
    viewer.texts = lambda row: {"response": "<b>" + "y" * 10_000_000, "bytes": b"\xff\xfe" * 5_000_000}
    viewer.demand(0)
    viewer.make(0)
    with shown(viewer, browser) as view:
        browser.until("document.querySelector('[data-state=published] .chip')").click()
        browser.until("document.querySelector('.sample pre')")
        assert browser.text(".sample pre").startswith("<b>yyy")
        assert browser.js("return document.body.textContent.length") < 200_000
        browser.js("document.querySelector('.sample .link').click()")
        assert browser.js("return document.querySelector('.sample pre').textContent.length") > 19_000
        harmless(browser, view.url)


@pytest.mark.ci
def test_a_payload_that_would_run_does_run_where_it_is_markup(browser):
    """The witness for the tests above: they would see it."""
    browser.driver.get("data:text/html,<script>window.__pwned='script'</script><img src=http://127.0.0.1:9/leak.png>")
    assert browser.js("return window.__pwned") == "script"
    assert [url for url in browser.requests() if "leak" in url]


# ---------------------------------------------------------------- stale figures


def test_stale_figures_are_never_shown_as_current(viewer, browser):
    viewer.run(5)
    with shown(viewer, browser):
        browser.until("document.querySelector('#fresh').dataset.state === 'live'")
        viewer.error = BrokerLost("the broker does not answer for 10 s")
        browser.until("document.querySelector('#fresh').dataset.state === 'stale'")
        assert "BrokerLost: the broker does not answer" in browser.text("#trouble")
        assert "not of now" in browser.text("#trouble")
        assert browser.js("return document.title").startswith("▲ stale")
        assert browser.js("return getComputedStyle(document.querySelector('main')).opacity") == "0.6"
        assert browser.js(f"return {ACKED}") == 5  # the last known
        browser.until(
            "/stale, [2-9] ?s old|stale, [2-9][.]\\d s old/.test(document.querySelector('#fresh').textContent)"
        )
        browser.js("document.querySelector('.chip').click()")
        assert browser.text("#rollout-age").startswith("▲ stale")  # where it lies over the rest, too
        viewer.error = None
        browser.until("document.querySelector('#fresh').dataset.state === 'live'")
        assert browser.text("#trouble") == ""
        browser.until("document.querySelector('#rollout-age').textContent === ''")
        assert browser.js("return getComputedStyle(document.querySelector('main')).opacity") == "1"


def test_a_broker_that_hangs_and_a_server_that_is_gone_are_said(viewer, browser):
    import threading

    viewer.run(5)
    with shown(viewer, browser) as view:
        browser.until("document.querySelector('#fresh').dataset.state === 'live'")
        viewer.hangs = threading.Event()
        browser.until("document.querySelector('#fresh').dataset.state === 'stale'", 10)
        assert "No answer for a while" in browser.text("#trouble")
        viewer.hangs.set()
        browser.until("document.querySelector('#fresh').dataset.state === 'live'", 10)
        port = view.port
    browser.until("document.querySelector('#fresh').dataset.state === 'stale'", 10)
    assert "server cannot be reached" in browser.text("#trouble")
    assert browser.js(f"return {ACKED}") == 5
    with WebView(lambda: viewer, poll_s=POLL_S, port=port):  # started again at the same place
        browser.until("document.querySelector('#fresh').dataset.state === 'live'", 20)
        viewer.demand(5)
        browser.until("document.querySelector('[data-state=demanded] .chip')?.textContent === '5'")


def test_a_job_that_begins_anew_leaves_nothing_of_the_old_one(viewer, browser):
    viewer.run(30)
    with shown(viewer, browser):
        browser.until(f"{ACKED} === 30")
        viewer.forget()
        viewer.begin()
        viewer.run(2)
        browser.until(f"{ACKED} === 2")
        assert browser.js("return [...document.querySelectorAll('.chip')].map(c => c.textContent).sort()") == [
            "0",
            "1",
        ]


# ---------------------------------------------------------------- five thousand


def test_five_thousand_rollouts_stay_smooth(browser):
    viewer = ViewerStandIn().begin(retain=20)
    viewer.run(5000)
    with shown(viewer, browser) as view:
        browser.until("document.querySelectorAll('#figures b')[1].textContent === '5,000'")
        times, sizes = [], []
        for r in range(5000, 5020):
            viewer.demand(r, r + 1)
            viewer.make(r)
            viewer.train(r)
            before = int(browser.js("return document.documentElement.dataset.refreshes"))
            browser.until(
                f"Number(document.documentElement.dataset.refreshes) > {before} "
                "&& document.documentElement.dataset.changed === 'true'"
            )
            times.append(float(browser.js("return document.documentElement.dataset.renderMs")))
        browser.until("document.querySelectorAll('#figures b')[1].textContent === '5,020'")
        sizes = browser.js(
            "return performance.getEntriesByType('resource').filter(e => e.name.includes('/api/look'))"
            ".map(e => e.decodedBodySize)"
        )
        nodes = browser.js("return document.querySelectorAll('*').length")
        harmless(browser, view.url)
    print(
        f"refresh at 5,000 rollouts: median {statistics.median(times):.1f} ms, max {max(times):.1f} ms; first answer "
        f"{sizes[0] / 1e3:.0f} kB, later {statistics.median(sizes[1:]) / 1e3:.1f} kB; {nodes} elements"
    )
    assert max(times) < patient(100)
    assert statistics.median(sizes[1:]) < 10_000 < sizes[0]
    assert nodes < 2500


# ---------------------------------------------------------------- steering


def test_a_job_is_steered_from_the_page_with_two_presses(viewer, browser):
    viewer.run(3)
    with shown(viewer, browser, allow_control=True):
        press = "[...document.querySelectorAll('button.steer')].find(b => b.textContent.startsWith('Pause'))"
        browser.js(f"{press}.click()")
        time.sleep(0.5)
        assert viewer.ledger.jobs["exp"].control == "running"
        assert "press again" in browser.js(f"return {press}.textContent")
        browser.js(f"{press}.click()")
        browser.until("document.querySelector('#state').dataset.state === 'paused'")
        assert viewer.ledger.jobs["exp"].control == "paused"
        assert browser.text("#steered") == "Pause: done"


def test_a_token_in_the_address_is_taken_out_of_it(viewer, browser):
    with WebView(lambda: viewer, poll_s=POLL_S, view_token="s3cret") as view:
        browser.driver.get(view.url)
        assert "a token is asked for" in browser.js("return document.body.textContent")
        browser.driver.get(f"{view.url}?token=s3cret")
        browser.until(SHOWN)
        assert browser.driver.current_url == view.url
        assert browser.js("return document.cookie") == ""
        assert "s3cret" not in browser.js("return document.documentElement.outerHTML")


# ---------------------------------------------------------------- the report


def test_a_report_is_one_file_that_asks_nobody(viewer, browser, tmp_path):
    viewer.run(40)
    for text in HOSTILE:
        viewer.ledger.note_event("exp", "lost", text)
    figures = write_report(viewer, "exp", tmp_path / "report.html")
    browser.driver.get(f"file://{tmp_path}/report.html")
    browser.until("document.querySelector('#report table')")
    assert "40 published, 40 acked" in browser.text("#report")
    assert f"{figures['reward']['first']:.3f}"[:4] in browser.text("#report")
    assert HOSTILE[1][:60] in browser.text("#events")
    data = json.loads(browser.js("return document.getElementById('data').textContent"))
    assert data["figures"] == figures == report_data(data["look"])  # the numbers can be computed again
    browser.js("document.querySelector('.chip').click()")
    assert "is trained on" in browser.text("#rollout-way")
    browser.driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    browser.js("document.querySelector('#save').click()")
    saved = tmp_path / "exp.json"
    deadline = time.monotonic() + patient(10)
    while not saved.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert json.loads(saved.read_text())["figures"] == figures
    browser.size(390)
    assert browser.js("return document.documentElement.scrollWidth") <= 390
    harmless(browser, "file://", "blob:")


# ---------------------------------------------------------------- a real cluster


def test_a_real_run_is_shown_with_its_samples_and_while_its_broker_stands_still(driver, browser, job_id):
    from slime.cross_job import Consumer, Producer
    from slime.cross_job.ops.viewer import Viewer
    from tests.support.actors import pid_of, stopped

    texts = [text for text in HOSTILE if "\ud800" not in text]
    with Producer(job_id) as producer, Consumer(job_id) as consumer:
        for rollout_id in range(4):
            consumer.demand(rollout_id)
            assert producer.next_demand(timeout_s=20) == rollout_id
            columns = {"response": texts, "rewards": [0.5] * len(texts)}
            producer.publish(rollout_id, columns, meta={"reward": rollout_id / 4})
            if rollout_id < 3:
                consumer.claim(rollout_id, timeout_s=20).ack()
        with WebView(lambda: Viewer(timeout_s=5), poll_s=POLL_S, job_id=job_id) as view:
            browser.driver.get(view.url)
            browser.until(f"{ACKED} === 3", 30)
            browser.until("document.querySelector('[data-state=published] .chip')").click()
            browser.until("document.querySelector('.sample pre')")
            assert browser.text(".sample pre") == texts[0]
            harmless(browser, view.url)
            broker = pid_of("slime_shared", BROKER_NAME)
            with stopped(broker):
                browser.until("document.querySelector('#fresh').dataset.state === 'stale'", 20)
                assert browser.js(f"return {ACKED}") == 3
            browser.until("document.querySelector('#fresh').dataset.state === 'live'", 30)
            os.kill(broker, signal.SIGKILL)
            consumer.claim(3, timeout_s=60).ack()  # the witness: it restarted, and knows all
            browser.until(f"{ACKED} === 4", 30)
            browser.until("document.querySelector('#events').textContent.includes('restarted')")
