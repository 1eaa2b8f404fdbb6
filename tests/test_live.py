# ruff: noqa: F811 - the fixture `chromium` is imported
"""The page of a run that goes on: what it says of the run, and how it follows it in a real browser."""

import io
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_page import SOURCE, STEP, Run, chromium, embedded, shade  # noqa: F401 - chromium is a fixture
from test_serve import Served

import loop
from gallery import page


def live(version="a"):
    return embedded(Path("samples", version, "index.html"), "summary")["live"]


# ------------------------------------------------------------------------------------------------ what the page says


def test_the_page_says_from_the_first_step_on_that_the_run_goes_on_and_in_the_end_how_it_ended(run, monkeypatch):
    seen = []
    show = loop.Run.show
    monkeypatch.setattr(loop.Run, "show", lambda self: (seen.append(live()), show(self)))
    assert run("--version", "a", "--total_step", 2, "--sample_step", 1)[0] == 0
    assert [entry["state"] for entry in seen] == ["running", "running"] and live()["state"] == "done"
    assert seen[0]["every"] is None and seen[1]["every"] >= 1 and abs(live()["at"] - time.time()) < 60
    before = live()
    listed, = embedded(Path("samples/index.html"), "data")["runs"]
    assert listed["live"] == before
    assert run("--version", "a", "--train", "false", "--num_samples", 1)[0] == 0
    assert live() == before, "who only samples changes nothing of it"
    assert embedded(Path("samples/a/index.html"), "data")["extras"]     # though the page was written


def test_a_run_that_fails_says_so(run, monkeypatch):
    def fail(self):
        raise RuntimeError("broken")

    monkeypatch.setattr(loop.Run, "due", fail)
    with pytest.raises(RuntimeError, match="broken"):
        run("--version", "a", "--total_step", 4)
    assert live()["state"] == "failed"


def test_an_odd_entry_is_none(tmp_path):
    one = Run(tmp_path)
    text = one.write("running", 5).read_text(encoding="utf-8")
    for odd in ('{"state":"<b>","every":5,"at":3}', '{"state":"running","every":"5","at":3}', "7", "null"):
        block = f'"live":{odd}'
        one.path.write_text(re.sub(r'"live":\{.*?\}', lambda _, to=block: to, text, count=1), encoding="utf-8")
        page.write_overview(tmp_path / "samples")
        listed, = embedded(tmp_path / "samples" / "index.html", "data")["runs"]
        assert listed["live"] is None


# -------------------------------------------------------------------------------------------------------- the browser

SWITCH = "document.querySelector('.live input')"
TOLD = "document.querySelector('.live [role=status]').textContent"
LOOKS = "(window.looks = 0, new MutationObserver(all => all.forEach(one => one.addedNodes.forEach(node => { " \
        "if (node.localName === 'iframe') looks++; }))).observe(document.body, {childList: true}))"


@pytest.fixture
def growing(tmp_path, chromium):
    """A run of two records that goes on, and the browser on its page."""
    one = Run(tmp_path)
    for index in range(2):
        add(one, index)
    one.write("running", 1)
    chromium.open(one.path)
    chromium.js("localStorage.clear()")
    yield one
    chromium.js("localStorage.clear()")


def add(one, index):
    step = 100 * (index + 1)
    one.record(step, colour=shade(index))
    one.log(*({"step": number, "d_loss": number / 100, "g_loss": 1} for number in range(step - 90, step + 1, 10)))


def look_now(browser):
    """As whoever comes back to this tab."""
    browser.js("document.dispatchEvent(new Event('visibilitychange'))")


def assert_never_looks(browser):
    """Not even when its next look is due: whether it is, the page asks itself every second."""
    browser.js(LOOKS)
    browser.js("next = 0")
    time.sleep(1.2)
    assert browser.js("looks") == 0


@pytest.mark.browser
def test_a_new_record_appears_by_itself_without_loading_the_page_again(chromium, growing):
    chromium.js("document.querySelector('.stage .picture').focus(), window.sameDocument = true")
    assert chromium.js(STEP) == "step 200" and chromium.js(TOLD) == "running"
    add(growing, 2)
    growing.write("running", 1)
    chromium.wait(f"{STEP} === 'step 300'")             # of a run with a record a second, within 3 seconds
    assert chromium.js(SOURCE) == "0000300_fake.png" and chromium.colour(0) == shade(2)
    assert "d_loss\n3" in chromium.js("document.querySelector('.values').innerText")
    assert chromium.js("document.querySelector('.curve svg').getAttribute('aria-label')").startswith(
        "losses at step 300: d_loss 3,")
    assert chromium.js("sameDocument") and chromium.js("document.querySelectorAll('iframe').length") < 2
    assert chromium.js("document.querySelectorAll('.stage .picture').length") == 2
    assert chromium.js("document.activeElement.ariaLabel") == "Full size: Generated, step 300"
    assert chromium.errors() == []


@pytest.mark.browser
def test_step_layer_place_and_what_is_unfolded_stay_as_their_reader_left_them(chromium, growing):
    from selenium.webdriver.common.keys import Keys

    chromium.keys(Keys.HOME)
    chromium.click(".layers button:nth-child(2)")
    chromium.click(".config summary")
    chromium.js("document.body.style.paddingBottom = '100vh'")          # room to scroll
    chromium.js("document.querySelector('#curves').scrollIntoView()")
    heading = "document.querySelector('#curves h2').getBoundingClientRect().top"
    top, focused = chromium.js(heading), "document.activeElement.textContent"
    assert chromium.js("scrollY") > 300 and chromium.js(focused) == "Settings of this run"
    add(growing, 2)
    growing.log({"step": 300, "fid": 40, "protocol": "P", "source": "G_ema"})
    growing.write("running", 1)
    look_now(chromium)
    chromium.wait("document.querySelector('#slider').max === '2'")
    assert chromium.js("document.querySelectorAll('#quality .curve').length") == 1      # above, so all moved down
    assert abs(chromium.js(heading) - top) < 2
    assert chromium.js(STEP) == "step 100" and chromium.js("document.querySelector('#slider').value") == "0"
    assert chromium.js("[...document.querySelectorAll('.layers button')].map(b => b.ariaPressed)") == ["false", "true"]
    layer = "document.querySelectorAll('.stage .picture img')[1].getAttribute('src')"
    assert chromium.js(layer) == "0000100_attn_g16.png"
    assert chromium.js("document.querySelector('.config').open") and chromium.js(focused) == "Settings of this run"
    chromium.keys(Keys.ARROW_RIGHT)                     # one handler of keys, though the page was built twice
    assert chromium.js(STEP) == "step 200" and chromium.errors() == []


@pytest.mark.browser
def test_a_picture_in_full_size_and_a_video_of_records_are_not_disturbed(chromium, growing):
    from selenium.webdriver.common.keys import Keys

    chromium.click(".stage .picture")
    add(growing, 2)
    growing.write("running", 1)
    look_now(chromium)
    chromium.wait(f"{TOLD} === 'a newer record waits'")
    assert chromium.js("document.querySelector('dialog').open") and chromium.js(STEP) == "step 200"
    chromium.keys(Keys.ESCAPE)
    chromium.wait(f"{STEP} === 'step 300' && {TOLD} === 'running'")
    chromium.click("#play")                             # from the first step on
    add(growing, 3)
    growing.write("running", 1)
    look_now(chromium)
    chromium.wait(f"{STEP} === 'step 300'")
    assert chromium.js("document.querySelector('#slider').max") == "2"
    chromium.wait("document.querySelector('#slider').max === '3'")


@pytest.mark.browser
def test_a_picture_that_is_shown_on_is_neither_loaded_again_nor_replaced(chromium, growing):
    from selenium.webdriver.common.keys import Keys

    chromium.keys(Keys.HOME)
    chromium.all_loaded()
    chromium.js("window.before = [...document.querySelectorAll('.stage .picture img')]")
    chromium.requested()
    add(growing, 2)
    growing.write("running", 1)
    look_now(chromium)
    chromium.wait("document.querySelector('#slider').max === '2'")
    assert chromium.js("[...document.querySelectorAll('.stage .picture img')].every((img, i) => img === before[i])")
    assert "0000100_fake.png" not in chromium.requested()


@pytest.mark.browser
def test_who_ends_is_not_looked_at_any_more(chromium, growing):
    add(growing, 2)
    growing.write("done", 1)
    look_now(chromium)
    chromium.wait(f"{STEP} === 'step 300' && {TOLD} === 'done'")
    assert not chromium.js("document.querySelector('.live label').checkVisibility()")
    assert_never_looks(chromium)
    growing.write("running", 1)                         # the same command again; the tab is visited again
    look_now(chromium)
    chromium.wait(f"{TOLD} === 'running' && looks > 0")


@pytest.mark.browser
def test_who_was_killed_is_not_looked_at_for_ever(chromium, tmp_path, monkeypatch):
    one, now = Run(tmp_path), time.time()
    add(one, 0)
    for every, silent, late in ((3600, 1900, False), (3600, 19_000, True), (None, 7200, False), (1, 1700, False),
                                (1, 1900, True)):
        monkeypatch.setattr(page.time, "time", lambda ago=silent: now - ago)
        chromium.open(one.write("running", every))
        chromium.js("localStorage.clear()")
        assert chromium.js(TOLD).startswith("no news since") == late, (every, silent)
    assert_never_looks(chromium)


@pytest.mark.browser
def test_the_switch_turns_it_off_for_this_page_and_the_next(chromium, growing):
    chromium.click(".live label")
    assert not chromium.js(f"{SWITCH}.checked")
    add(growing, 2)
    growing.write("running", 1)
    assert_never_looks(chromium)
    assert chromium.js(STEP) == "step 200"
    chromium.open(growing.path)
    assert not chromium.js(f"{SWITCH}.checked") and chromium.js(STEP) == "step 300"
    add(growing, 3)
    growing.write("running", 1)
    chromium.click(".live label")
    chromium.wait(f"{STEP} === 'step 400'")


@pytest.mark.browser
def test_who_was_interrupted_and_goes_on_is_followed_again(chromium, growing):
    growing.write("interrupted", 1)
    look_now(chromium)
    chromium.wait(f"{TOLD} === 'interrupted'")
    assert chromium.js("document.querySelector('.live label').checkVisibility()")
    add(growing, 2)
    growing.write("running", 1)
    chromium.js("next = 0")                             # half a minute later
    chromium.wait(f"{STEP} === 'step 300' && {TOLD} === 'running'")


@pytest.mark.browser
@pytest.mark.soak
def test_another_run_of_this_name_is_shown_with_its_own_pictures(chromium, growing):
    chromium.all_loaded()
    chromium.js("window.sameDocument = true")
    shutil.rmtree(growing.folders.samples)
    (growing.folders.logs / "metrics.jsonl").unlink()
    growing.folders.create()
    time.sleep(1)                                       # runs are told apart by the second in which they were begun
    growing.record(100, colour=(0, 200, 0))
    growing.record(200, colour=(0, 200, 0))
    growing.write("running", 1)
    chromium.wait("window.sameDocument !== true")
    chromium.all_loaded()
    picture = chromium.driver.find_element("css selector", ".stage .picture img").screenshot_as_png
    shown = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"), int)
    assert (abs(shown - (0, 200, 0)).max(2) < 12).mean() > 0.5 and chromium.js(STEP) == "step 200"


@pytest.mark.browser
def test_the_space_bar_on_the_switch_turns_it_off_and_nothing_is_said_of_what_is_not_looked_at(
        chromium, growing, monkeypatch):
    from selenium.webdriver.common.keys import Keys

    monkeypatch.setattr(page.time, "time", lambda: time.time_ns() / 1e9 - 1700)
    growing.write("running", 1)
    chromium.open(growing.path)
    chromium.js(f"{SWITCH}.focus()")
    chromium.keys(Keys.SPACE)
    assert not chromium.js(f"{SWITCH}.checked")
    assert chromium.js("document.querySelector('#play').ariaPressed") == "false"
    chromium.js("Date.now = (now => () => now() + 1e6)(Date.now)")
    chromium.wait(f"{TOLD}.startsWith('running at ')")


@pytest.mark.browser
@pytest.mark.soak
def test_the_focus_stays_on_its_picture_among_those_of_checkpoints(chromium, growing):
    for seed in range(3):
        shutil.copy(growing.folders.samples / "0000100_fake.png",
                    growing.folders.samples / f"0000100_generated_seed{seed}.png")
    growing.write("running", 1)
    focused = "document.activeElement.ariaLabel"
    chromium.wait("document.querySelectorAll('.more button').length === 3")
    chromium.js("document.querySelectorAll('.more button')[2].focus()")
    before = chromium.js(focused)
    add(growing, 2)
    growing.write("running", 1)
    chromium.wait(f"{STEP} === 'step 300'")
    assert chromium.js(focused) == before and "seed2" in before


@pytest.mark.browser
def test_the_list_of_runs_follows_them_too(chromium, growing):
    page.write_overview(growing.root / "samples")
    chromium.open(growing.root / "samples" / "index.html")
    cards = "[...document.querySelectorAll('.runs li')].map(li => li.innerText)"
    card, = chromium.js(cards)
    assert "step 200 of 1,000" in card and "· running" in card
    assert chromium.js("document.querySelector('.live label').checkVisibility()")
    other = Run(growing.root, "other")
    add(other, 0)
    other.write("done")
    add(growing, 2)
    growing.write("interrupted")
    page.write_overview(growing.root / "samples")
    chromium.wait("document.querySelectorAll('.runs li').length === 2")
    first, second = sorted(chromium.js(cards))
    assert "other" in first and "· done" in first and "step 300" in second and "· interrupted" in second
    growing.write("done")
    page.write_overview(growing.root / "samples")
    look_now(chromium)
    chromium.wait(f"{cards}.every(card => card.includes('· done'))")
    assert not chromium.js("document.querySelector('.live label').checkVisibility()")
    chromium.all_loaded()
    assert chromium.js("kept.size") == 2, "of older records nothing is kept"
    assert chromium.errors() == []


@pytest.mark.browser
def test_the_list_of_runs_shows_the_pictures_of_a_run_that_was_begun_again(chromium, growing, monkeypatch):
    page.write_overview(growing.root / "samples")
    chromium.open(growing.root / "samples" / "index.html")
    address = "document.querySelector('.runs img').getAttribute('src')"
    before = chromium.js(address)
    growing.folders.samples.rename(growing.root / "old")
    (growing.folders.logs / "metrics.jsonl").unlink()
    growing.folders.create()
    monkeypatch.setattr(page.time, "time", lambda: time.time_ns() / 1e9 + 5)
    for index in range(2):
        add(growing, index)
    growing.write("running", 1)
    page.write_overview(growing.root / "samples")
    chromium.wait(f"{address} !== arguments[0]", before)
    assert chromium.js(address).partition("?")[0] == before.partition("?")[0]


@pytest.mark.browser
def test_after_the_computer_slept_a_run_is_looked_for_again(chromium, growing):
    chromium.js("Date.now = (now => () => now() + 1e7)(Date.now)")      # for almost three hours
    add(growing, 2)
    growing.write("running", 1)
    chromium.wait(f"{STEP} === 'step 300'")


@pytest.mark.browser
@pytest.mark.soak
def test_a_page_whose_file_is_gone_stays_as_it_is(chromium, growing):
    gone = growing.root / "gone"
    shutil.move(growing.folders.samples, gone)
    chromium.js(LOOKS)
    chromium.wait("looks > 1")
    chromium.wait(f"{TOLD}.startsWith('running at ')")                  # nothing is known of it any more
    assert chromium.js(STEP) == "step 200" and chromium.js("document.querySelectorAll('iframe').length") < 2
    shutil.move(gone, growing.folders.samples)
    add(growing, 2)
    growing.write("running", 1)
    chromium.wait(f"{STEP} === 'step 300'")


@pytest.mark.browser
def test_a_page_in_another_programs_frame_shows_itself(chromium, growing):
    """As in a notebook: only a frame that a page of ours made is silent."""
    outer = growing.root / "notebook.html"
    outer.write_text('<iframe src="samples/v/index.html" width="900" height="700"></iframe>')
    chromium.open(outer)
    chromium.driver.switch_to.frame(0)
    try:
        assert chromium.js(STEP) == "step 200"
    finally:
        chromium.driver.switch_to.default_content()


@pytest.mark.browser
def test_a_served_page_follows_its_run(chromium, growing):
    one = Served("--sample_path", str(growing.root / "samples"))
    try:
        chromium.driver.get(f"http://127.0.0.1:{one.port}/v/")
        assert chromium.js(STEP) == "step 200"
        add(growing, 2)
        growing.write("running", 1)
        chromium.wait(f"{STEP} === 'step 300'")
        chromium.all_loaded()
    finally:
        code, err = one.end()
    assert (code, err) == (130, "interrupted\n")
