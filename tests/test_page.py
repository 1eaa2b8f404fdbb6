"""What a reader finds when a run's page is opened: in the data that Python puts into it, and in a real browser."""

import base64
import hashlib
import io
import json
import os
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import page
from utils import RunFolders

HOSTILE = '"><img src=x onerror=alert(1)>'
HOSTILE_VERSION = "<script>alert(2)<%script><!-- &amp; '\"%20#?"       # no / in a version


def picture(path, colour=(90, 120, 150), size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def shade(index):
    """A colour of its own for each recorded step, to be recognized in the browser."""
    return (10 + index * 37 % 240, 10 + index * 91 % 240, 60)


class Run:
    """A run's folders in `root`, filled with small pictures and a metrics.jsonl."""

    def __init__(self, root, version="v", attention=None):
        self.root = root
        self.folders = RunFolders(root / "samples" / version, attention or root / "samples" / version,
                                  root / "logs" / version, root / "models" / version)
        self.config = SimpleNamespace(version=version, model="sagan", dataset="toy", image_path="./data", imsize=32,
                                      total_step=1000, g_attn=(8, 16), metadata=None, hflip=False)
        self.folders.create()

    def record(self, step, kinds=("fake", "attn_g8", "attn_g16"), colour=(90, 120, 150)):
        for kind in kinds:
            folder = self.folders.attention if kind.startswith("attn_") else self.folders.samples
            picture(folder / f"{step:07d}_{kind}.png", colour)

    def log(self, *lines, end="\n"):
        with open(self.folders.logs / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + end)

    def write(self):
        page.write_run_page(self.folders, self.config)
        return self.path

    @property
    def path(self):
        return self.folders.samples / "index.html"

    def data(self):
        return embedded(self.write(), "data")


def embedded(path, name):
    """What stands in a page's JSON block, read as a browser does: up to the first </script."""
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(rf'<script type="application/json" id="{name}">(.*?)</script', text, re.DOTALL)[1])


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


# ----------------------------------------------------------------------------------------------------- the pictures


def test_steps_and_layers_are_those_on_disk(run):
    for step in (100, 200, 12345678):
        run.record(step, ("fake", "attn_d4", "attn_g16", "attn_g8", "attn_d8"))
    run.record(200, ("recon",))
    for other in ("0000100_generated_seed0.png", "100_fake.png", "0000300_fake.png.tmp", "00000100_fake.png", "x.png"):
        picture(run.folders.samples / "t.png").rename(run.folders.samples / other)
    (run.folders.samples / "0000100_generated_seed1").mkdir()
    picture(run.folders.samples / "real.png", size=(70, 50))
    data = run.data()
    assert data["steps"] == [100, 200, 12345678]
    assert list(data["pictures"]) == ["attn_g8", "attn_g16", "attn_d8", "attn_d4", "fake", "recon"]
    assert data["pictures"]["fake"] is None and data["pictures"]["recon"] == [1]
    assert data["extras"] == ["00000100_fake.png", "0000100_generated_seed0.png"]
    assert data["real"] == "real.png" and data["sizes"]["real"] == [70, 50] and data["sizes"]["fake"] == [40, 30]
    assert embedded(run.path, "summary")["thumb"] == "12345678_fake.png"


def test_attention_elsewhere_is_linked_relatively(tmp_path):
    run = Run(tmp_path, attention=tmp_path / "maps" / "v")
    run.record(100)
    data = run.data()
    assert data["attention"] == ["..", "..", "maps", "v"]
    assert data["steps"] == [100] and "attn_g8" in data["pictures"] and data["sizes"]["attn_g8"] == [40, 30]


def test_nothing_there_yet_is_a_page_all_the_same(run):
    run.config.lambda_gp = float("inf")                                 # no number of JSON's
    data = run.data()
    assert data["config"]["lambda_gp"] == "Infinity" and data["config"]["metadata"] is None
    assert data["steps"] == data["rows"] == data["keys"] == data["others"] == [] and data["real"] is None
    assert embedded(run.path, "summary")["step"] == 0


def test_names_that_are_no_text_are_left_out(run):
    run.record(100)
    try:
        (run.folders.samples / os.fsdecode(b"0000200_attn_\xff.png")).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes no such names")
    assert run.data()["steps"] == [100]


def test_a_picture_that_is_none_stops_nothing(run):
    (run.folders.samples / "0000100_fake.png").mkdir()
    (run.folders.samples / "0000100_recon.png").write_bytes(b"GIF89a")
    assert run.data()["sizes"] == {"fake": None, "recon": None}


# ------------------------------------------------------------------------------------------------------ the numbers


def test_numbers_of_a_step_are_of_the_first_line_that_reaches_it(run):
    for step in (100, 150, 205, 300):
        run.record(step)
    run.log({"step": 100, "d_loss": 1.23456}, {"step": 200, "d_loss": 2}, {"step": 210, "d_loss": 3, "entropy/g8": 0.5})
    data = run.data()
    assert data["keys"] == ["d_loss", "entropy/g8"]
    # 300 has no line yet: the last one stands in, until the right one comes
    assert data["rows"] == [[100, 1.235], [200, 2], [210, 3, 0.5], [210, 3, 0.5]]
    run.log({"step": 300, "d_loss": 4})
    assert run.data()["rows"][3] == [300, 4]


def test_a_half_written_line_waits_for_its_other_half(run):
    run.log({"step": 10, "d_loss": 1})
    run.log('{"step": 20, "d_lo', end="")
    assert run.data()["curves"] == [[[10], [1], [1], [1]]]
    run.log('ss": 2}')
    assert run.data()["curves"] == [[[10, 20], [1, 2], [1, 2], [1, 2]]]


def test_lines_that_are_none_are_passed_over(run):
    run.log("", "nonsense", "[1]", '{"d_loss": 1}', '{"step": "10", "d_loss": 1}', '{"step": true, "d_loss": 1}',
            {"step": 10, "d_loss": float("nan"), "g_loss": float("inf"), "ok": 1, "note": "x", "flag": True, "n": None},
            {"step": 10, "ok": 7}, {"step": 20, "ok": 2})
    data = run.data()
    assert data["keys"] == ["ok"] and data["curves"] == [[[10, 20], [1, 2], [1, 2], [1, 2]]]


def test_a_run_that_goes_back_forgets_the_later_lines(run):
    run.record(100)
    run.log(*({"step": step, "d_loss": step} for step in range(10, 310, 10)))
    assert run.data()["curves"][0][0][-1] == 300
    metrics = run.folders.logs / "metrics.jsonl"
    kept = metrics.read_text().splitlines()[:9]
    metrics.write_text("")
    run.log(*kept, *({"step": step, "d_loss": -step} for step in range(100, 510, 10)))      # longer than before
    data = run.data()
    assert data["curves"][0][0][-1] == 500 and data["curves"][0][1][-1] == -500 and data["rows"] == [[100, -100]]
    metrics.unlink()
    assert run.data()["curves"] == []


def test_long_curves_keep_their_peaks_and_few_points(run):
    values = np.random.default_rng(0).normal(size=5001)
    values[1234], values[4321] = 50, -50
    run.log(*({"step": step, "d_loss": value} for step, value in enumerate(values, start=1)))
    x, mean, low, high = run.data()["curves"][0]
    assert 100 < len(x) == len(mean) == len(low) == len(high) <= 200 and x == sorted(set(x))
    peak, pit = high.index(50), low.index(-50)
    assert abs(x[peak] - 1235) <= 16 and abs(x[pit] - 4322) <= 16       # 32 points each
    assert mean[5] == pytest.approx(values[5 * 32:6 * 32].mean(), abs=1e-4) and x[-1] > 4960


def test_read_on_or_read_anew_is_the_same(run, tmp_path):
    for step in range(1, 2000):
        run.log({"step": step, "d_loss": step % 7, "g_loss": -step})
        if step % 250 == 0:
            run.record(step, ("fake",))
            run.write()
    once = run.data()
    page._metrics_of.cache_clear()
    assert run.data() == once


def test_a_thousand_records_and_a_long_log_are_written_fast_and_small(run):
    for step in range(100, 100_100, 100):
        for kind in ("fake", "attn_g8", "attn_g16", "attn_d8", "attn_d4"):
            (run.folders.samples / f"{step:07d}_{kind}.png").touch()
    keys = ("d_loss", "g_loss", "d_real", "d_fake", "gamma/g8", "gamma/g16", "entropy/g8", "epoch", "sec_per_step")
    rng = np.random.default_rng(0)
    run.log(*({"step": step, **dict(zip(keys, rng.normal(size=9), strict=True))} for step in range(10, 100_010, 10)))
    run.write()
    times = []
    for step in range(100_010, 100_060, 10):
        run.log({"step": step, "d_loss": 1})
        began = time.process_time()
        run.write()
        times.append(time.process_time() - began)
    assert min(times) < 0.05
    assert run.path.stat().st_size < 400_000


# --------------------------------------------------------------------------------------------------------- the page


def test_names_cannot_leave_the_data(tmp_path):
    run = Run(tmp_path, HOSTILE_VERSION)
    run.record(100, ("fake", f"attn_{HOSTILE}"))
    run.log({"step": 100, "</script><script>alert(3)</script>": 1})
    text = run.write().read_text(encoding="utf-8")
    assert text.count("<script") == 3 == text.count("</script")         # summary, data, the script
    assert "onerror" not in re.sub(r'<script type="application/json".*?</script>', "", text, flags=re.DOTALL).replace(
        "img.onerror", "")
    data = embedded(run.path, "data")
    assert f"attn_{HOSTILE}" in data["pictures"] and data["keys"] == ["</script><script>alert(3)</script>"]
    assert embedded(run.path, "summary")["version"] == HOSTILE_VERSION == data["config"]["version"]


def test_the_policy_allows_this_style_and_script_alone(run):
    text = run.write().read_text(encoding="utf-8")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="(.*?)"', text)[1]
    assert "unsafe" not in policy and policy.startswith("default-src 'none'") and "http" not in policy
    for tag in ("style", "script"):
        inline = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in policy
    markup = re.sub(r"<(script|style).*?</\1>", "", text, flags=re.DOTALL)
    assert not re.search(r"\s(style|on\w+)\s*=", markup) and "http" not in markup.replace("http-equiv", "")


def test_pages_appear_whole_or_not_at_all(run, monkeypatch):
    before = run.write().read_bytes()
    monkeypatch.setattr(page.Path, "write_text", lambda self, *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        run.write()
    assert run.path.read_bytes() == before and list(run.folders.samples.iterdir()) == [run.path]


def test_overview_lists_the_runs_below_and_nothing_else(tmp_path):
    samples = tmp_path / "samples"
    for version, step in (("one", 100), (HOSTILE_VERSION, 200)):
        run = Run(tmp_path, version)
        run.record(step)
        run.log({"step": step, "d_loss": 0.5, "fid": 12.25})
        run.write()
    run = Run(tmp_path, "empty")
    run.config.dataset, run.config.image_path = "folder", "/pictures/of cats/"
    assert run.data()["others"] == [HOSTILE_VERSION, "one"]
    foreign = {"a": "<p>mine</p>", "b": '<script type="application/json" id="summary">{"version": 3}</script>',
               "c": '<script type="application/json" id="summary">{{{</script>'}
    for name, text in foreign.items():
        (samples / name).mkdir()
        (samples / name / "index.html").write_text(text)
    (samples / "no page").mkdir()
    page.write_overview(samples)
    runs = {run["folder"]: run for run in embedded(samples / "index.html", "data")["runs"]}
    assert set(runs) == {"one", HOSTILE_VERSION, "empty"}
    assert runs["one"]["thumb"] == "0000100_fake.png" and runs["one"]["step"] == 100
    assert runs["one"]["figures"] == {"d_loss": 0.5, "fid": 12.25}
    assert runs["empty"]["thumb"] is None and runs["empty"]["dataset"] == "of cats"


# ------------------------------------------------------------------------------------------------------- the browser


class Browser:
    """Chromium on one page at a time."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, path, width=1200, scheme="light", motion="no-preference"):
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600})
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [
            {"name": "prefers-color-scheme", "value": scheme}, {"name": "prefers-reduced-motion", "value": motion}]})
        for log in ("browser", "performance"):
            self.driver.get_log(log)
        self.driver.get(Path(path).as_uri())
        return self

    def js(self, script, *arguments):
        return self.driver.execute_script(f"return {script}", *arguments)

    def wait(self, script, *arguments):
        """Until the expression is true, five seconds at most."""
        end = time.monotonic() + 5
        while not self.js(script, *arguments):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.02)

    def keys(self, *keys):
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver, duration=0).send_keys(*keys).perform()

    def click(self, selector):
        self.js("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", selector)
        self.driver.find_element("css selector", selector).click()

    def all_loaded(self):
        """Waits for all the pictures in sight; a picture that did not load would never do."""
        self.wait("[...document.images].filter(i => i.checkVisibility()).every(i => i.complete && i.naturalWidth > 0)")

    def colour(self, panel):
        """(r, g, b) shown in the middle of a panel, from a screenshot."""
        self.all_loaded()
        image = self.driver.find_elements("css selector", ".stage .picture img")[panel]
        self.js("arguments[0].scrollIntoView({block: 'center'})", image)
        with Image.open(io.BytesIO(image.screenshot_as_png)) as pixels:
            return pixels.convert("RGB").getpixel((pixels.width // 2, pixels.height // 2))

    def requested(self):
        """Names of the pictures asked for since the page was opened."""
        events = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        urls = (event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent")
        return {url.rpartition("/")[2] for url in urls if url.endswith(".png")}

    def errors(self):
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("no chromium and chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for switch in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
                   "disable-background-networking", "disable-component-update", "disable-sync",
                   f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield Browser(chrome)
    chrome.quit()


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A finished run with attention elsewhere, reconstructions, curves, a hostile layer and a hostile version."""
    root = tmp_path_factory.mktemp("look")
    run = Run(root, HOSTILE_VERSION, attention=root / "ma #ps" / "v?")
    for index in range(6):
        step = 100 * (index + 1)
        run.record(step, ("fake", "attn_g8", "attn_g16", f"attn_{HOSTILE.replace('/', '')}", "recon"), shade(index))
    picture(run.folders.samples / "real.png")
    picture(run.folders.samples / "0000600_generated_seed0.png")
    run.log(*({"step": step, "d_loss": step / 100, "g_loss": -0.5, "gamma/g8": 0.1, "gamma/g16": -0.02,
               f"x{HOSTILE}": 1.0, "epoch": step / 50} for step in range(10, 610, 10)))
    other = Run(root, "other")
    other.record(100)
    for one in (run, other, run):
        one.write()
    page.write_overview(root / "samples")
    return run


SOURCE = "document.querySelector('.stage .picture img').getAttribute('src')"
STEP = "document.querySelector('#step').textContent"


@pytest.mark.browser
def test_opens_by_double_click_and_shows_the_newest(chromium, shown):
    chromium.open(shown.path)
    chromium.all_loaded()
    assert chromium.js(SOURCE) == "0000600_fake.png" and chromium.js(STEP) == "step 600"
    assert chromium.colour(0) == shade(5) == chromium.colour(1)         # the grid and the first map
    assert chromium.js("document.querySelectorAll('.curve svg path').length") == 6
    assert "d_loss\n6" in chromium.js("document.querySelector('.values').innerText")
    assert chromium.js("document.title") == HOSTILE_VERSION
    assert chromium.errors() == []


@pytest.mark.browser
def test_slider_and_keys_change_the_pictures(chromium, shown):
    from selenium.webdriver.common.keys import Keys

    chromium.open(shown.path)
    chromium.keys(Keys.ARROW_LEFT)
    assert chromium.js(SOURCE) == "0000500_fake.png" and chromium.js(STEP) == "step 500"
    assert chromium.colour(0) == shade(4) == chromium.colour(1)
    chromium.keys(Keys.HOME)
    assert chromium.js(SOURCE) == "0000100_fake.png"
    chromium.keys(Keys.ARROW_LEFT)                                      # there is nothing before the first
    chromium.keys(Keys.ARROW_RIGHT)
    assert chromium.js(STEP) == "step 200"
    assert "d_loss\n2" in chromium.js("document.querySelector('.values').innerText")
    chromium.keys(Keys.END)
    assert chromium.js(STEP) == "step 600"
    slider = chromium.driver.find_element("css selector", "#slider")
    slider.click()                                                      # in its middle
    assert chromium.js(STEP) in ("step 300", "step 400")
    at = chromium.js(STEP)
    slider.send_keys(Keys.ARROW_RIGHT)                                  # one step, not two, where the slider has focus
    assert int(chromium.js(STEP)[5:]) == int(at[5:]) + 100
    assert chromium.js("document.querySelector('#slider').getAttribute('aria-valuetext')") == chromium.js(STEP)
    assert chromium.errors() == []


@pytest.mark.browser
def test_layers_are_chosen_and_hidden_ones_not_asked_for(chromium, shown):
    chromium.open(shown.path)
    chromium.all_loaded()
    asked = chromium.requested()
    assert {"0000600_fake.png", "0000600_attn_g8.png", "0000500_fake.png"} <= asked          # with a neighbour
    assert not {"0000100_fake.png", "0000600_attn_g16.png"} & asked
    chromium.click(".layers button:nth-child(2)")
    assert chromium.colour(1) == shade(5)
    assert "attn_g16" in chromium.js("document.querySelectorAll('.stage .picture img')[1].src")
    assert chromium.js("[...document.querySelectorAll('.layers button')].map(b => b.ariaPressed)") == [
        "false", "true", "false"]


@pytest.mark.browser
def test_play_runs_to_the_end_and_space_stops_it(chromium, shown):
    chromium.open(shown.path)
    pressed = "document.querySelector('#play').ariaPressed"
    time.sleep(0.7)
    assert chromium.js(STEP) == "step 600" and chromium.js(pressed) == "false"      # nothing plays by itself
    chromium.keys(" ")
    assert chromium.js(STEP) == "step 100" and chromium.js(pressed) == "true"
    chromium.wait(f"{STEP} === 'step 200'")
    chromium.keys(" ")
    assert chromium.js(pressed) == "false"
    chromium.click("#play")
    chromium.wait(f"{STEP} === 'step 600' && {pressed} === 'false'")


@pytest.mark.browser
def test_reduced_motion_is_kept(chromium, shown):
    chromium.open(shown.path)
    moves = "getComputedStyle(document.querySelector('.picture')).transitionDuration"
    assert chromium.js(moves) != "0s"
    chromium.open(shown.path, motion="reduce")
    assert chromium.js(moves) == "0s"
    chromium.keys(" ")
    time.sleep(0.75)                                                    # at full speed the second step would be there
    assert chromium.js(STEP) == "step 100"
    chromium.wait(f"{STEP} === 'step 200'")


@pytest.mark.browser
def test_a_picture_opens_in_full_size_and_focus_returns(chromium, shown):
    from selenium.webdriver.common.keys import Keys

    chromium.open(shown.path)
    is_open, full = "document.querySelector('dialog').open", "document.querySelector('dialog img')"
    for number in range(4):
        chromium.js("document.querySelectorAll('.stage .picture')[arguments[0]].focus()", number)
        chromium.keys(Keys.ENTER)
        chromium.wait(f"{is_open} && {full}.naturalWidth > 0 && {full}.width >= {full}.naturalWidth")
        chromium.keys(Keys.ESCAPE)
        chromium.wait(f"!{is_open}")
        focused = "[...document.querySelectorAll('.stage .picture')].indexOf(document.activeElement)"
        assert chromium.js(focused) == number
    chromium.click(".stage .picture")
    chromium.keys(Keys.ARROW_LEFT)                                      # the steps can be gone through there too
    assert chromium.js(f"{full}.src").endswith("0000500_fake.png")
    chromium.click("dialog button")
    assert not chromium.js(is_open)
    chromium.click("#more .picture")
    chromium.wait(f"{is_open} && {full}.src.endsWith('generated_seed0.png')")
    chromium.keys(Keys.ESCAPE)


@pytest.mark.browser
def test_curves_tell_their_values_to_a_pointer_and_to_a_reader(chromium, shown):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    chromium.open(shown.path)
    chart = chromium.driver.find_element("css selector", ".curve svg")
    assert chart.get_attribute("aria-label") == "losses at step 600: d_loss 6, g_loss −0.5"
    chromium.js("arguments[0].focus()", chart)
    chromium.keys(Keys.HOME)
    assert chart.get_attribute("aria-label") == "losses at step 100: d_loss 1, g_loss −0.5"
    chromium.js("arguments[0].scrollIntoView({block: 'center'})", chart)
    ActionChains(chromium.driver, duration=0).move_to_element(chart).perform()
    said = re.fullmatch(r"losses at step (\d+): d_loss ([\d.]+), g_loss −0.5", chart.get_attribute("aria-label"))
    assert 200 < int(said[1]) < 400 and float(said[2]) == int(said[1]) / 100
    chart.click()
    assert chromium.js(STEP) in ("step 300", "step 400")


@pytest.mark.browser
def test_light_and_dark(chromium, shown):
    def lightness(scheme, path):
        chromium.open(path, scheme=scheme)
        paper, ink = (np.mean([int(part) for part in re.findall(r"\d+", chromium.js(
            f"getComputedStyle(document.body).{what}"))[:3]]) for what in ("backgroundColor", "color"))
        return paper, ink

    for path in (shown.path, shown.root / "samples" / "index.html"):
        paper, ink = lightness("light", path)
        assert paper > 230 and ink < 60
        paper, ink = lightness("dark", path)
        assert paper < 40 and ink > 200


@pytest.mark.browser
def test_a_phone_needs_no_sideways_scrolling(chromium, shown, tmp_path):
    wide = Run(tmp_path, "w" * 100)
    wide.record(10_000_000, ("fake", f"attn_{'m' * 80}", f"attn_{'n' * 80}"))
    wide.log({"step": 10_000_000, "k" * 80: 1, **{f"gamma/{'g' * 60}{n}": -1.234e-12 for n in range(9)}})
    wide.write()
    page.write_overview(tmp_path / "samples")
    for path in (shown.path, shown.path.parent.parent / "index.html", wide.path, tmp_path / "samples" / "index.html"):
        chromium.open(path, width=400)
        chromium.js("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        assert chromium.js("document.documentElement.clientWidth") == 400
        assert chromium.js("document.documentElement.scrollWidth") == 400


@pytest.mark.browser
def test_hostile_names_do_nothing(chromium, shown):
    chromium.open(shown.path)
    assert chromium.js("document.querySelector('#version').textContent") == HOSTILE_VERSION
    layers = chromium.js("[...document.querySelectorAll('.layers button')].map(b => b.textContent)")
    assert layers == ["g8", "g16", HOSTILE]
    chromium.click(".layers button:nth-child(3)")
    assert chromium.colour(1) == shade(5)                               # its picture is shown none the less
    assert chromium.js("document.querySelectorAll('img[onerror], img[src=x], script:not([id])').length") == 1
    chromium.open(shown.root / "samples" / "index.html")
    chromium.all_loaded()
    assert HOSTILE_VERSION in chromium.js("[...document.querySelectorAll('h2')].map(h => h.textContent)")
    assert chromium.errors() == []                                      # an alert would have raised long before


@pytest.mark.browser
def test_the_policy_holds_in_the_browser(chromium, shown):
    chromium.open(shown.path)
    refused = chromium.js("""(() => {
        try { document.body.innerHTML = '<b>'; return false; } catch (error) { return error instanceof TypeError; }
    })()""")
    assert refused
    chromium.js("document.body.setAttribute('style', 'color: red')")
    assert chromium.js("getComputedStyle(document.body).color") != "rgb(255, 0, 0)"


@pytest.mark.browser
def test_runs_are_linked_with_each_other(chromium, shown):
    chromium.open(shown.path)
    chromium.click("nav > a")
    chromium.wait("document.querySelectorAll('.runs li').length === 2")
    chromium.all_loaded()
    other = chromium.js("[...document.querySelectorAll('.runs h2')].findIndex(h => h.textContent === 'other')")
    chromium.click(f".runs li:nth-child({other + 1}) a")
    chromium.wait("document.title === 'other'")
    chromium.click("#others summary")
    chromium.click("#others a")
    chromium.wait("document.title === arguments[0]", HOSTILE_VERSION)
    chromium.all_loaded()


@pytest.mark.browser
def test_works_where_it_is_copied_to_and_says_what_is_missing(chromium, shown, tmp_path):
    copied = shutil.copytree(shown.folders.samples, tmp_path / "elsewhere" / "a b")
    chromium.open(copied / "index.html")
    chromium.wait("document.querySelector('.stage .picture img').naturalWidth > 0")
    chromium.wait("document.querySelectorAll('.absent:not([hidden])').length === 1")    # the maps were not copied
    assert "Attention g8, step 600" in chromium.js("document.querySelector('.absent:not([hidden])').textContent")
    empty = Run(tmp_path, "empty")
    chromium.open(empty.write())
    assert chromium.js(STEP) == "no pictures yet" and chromium.errors() == []


@pytest.mark.browser
def test_a_thousand_records_open_within_two_seconds(chromium, tmp_path):
    run = Run(tmp_path)
    run.record(100, colour=shade(0))
    for step in range(200, 100_100, 100):
        for kind in ("fake", "attn_g8", "attn_g16"):
            os.link(run.folders.samples / f"0000100_{kind}.png", run.folders.samples / f"{step:07d}_{kind}.png")
    rng = np.random.default_rng(0)
    run.log(*({"step": step, **{f"k{n}": value for n, value in enumerate(rng.normal(size=18))}}
              for step in range(100, 100_100, 100)))
    run.write()
    began = time.monotonic()
    chromium.open(run.path)
    chromium.all_loaded()
    assert time.monotonic() - began < 2
    assert 2 <= len(chromium.requested()) < 10
    assert chromium.errors() == []


def test_somebody_elses_index_html_is_left_alone(tmp_path):
    (tmp_path / "index.html").write_text("<p>my own page</p>")
    page.write_overview(tmp_path)
    assert (tmp_path / "index.html").read_text() == "<p>my own page</p>"
