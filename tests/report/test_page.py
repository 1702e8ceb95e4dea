"""The page in a browser, where there is one."""

import shutil
import time

import numpy as np
import pytest
import torch

from pyfast_xai import datasets, render, report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("needs Chromium and its driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,800"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Opened:
    def __init__(self, driver, path):
        self.driver = driver
        driver.get(path.as_uri())

    def js(self, code, *given):
        return self.driver.execute_script(code, *given)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def set(self, name, value):
        kind = "checked" if isinstance(value, bool) else "value"
        self.js(
            f"const e = document.getElementById(arguments[0]); e.{kind} = arguments[1];"
            "e.dispatchEvent(new Event('input', {bubbles: true}))",
            name,
            value,
        )

    def press(self, *keys):
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    @property
    def shown(self):
        """Names of the cards, in order."""
        cards = "document.querySelectorAll('.card > button > .caption:last-child')"
        return self.js(f"return [...{cards}].map(e => e.title)")

    @property
    def focused(self):
        return self.js("return document.activeElement.closest('.card')?.querySelector('button > .caption').title")

    def noise(self):
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture
def page(browser, made, tmp_path):
    opened = Opened(browser, report.write(made.runs, tmp_path / "r.html").path)
    yield opened
    assert opened.noise() == []
    assert opened.driver.title == "grad-cam, clear - explanations"  # no name has changed it


@pytest.fixture
def rows(made):
    return list(datasets.open(made.one))


def test_all_rows_are_shown_in_the_order_of_the_source(page, rows):
    assert page.shown == [row["id"] for row in rows]
    assert page.all("#count")[0].text == "15 pictures"
    assert page.all("#errors td")[0].get_attribute("textContent")
    assert page.js("return document.querySelectorAll('#errors tbody tr').length") == 4


def test_filters(page, rows, classes):
    ok = [row for row in rows if row["status"] == "ok"]
    page.set("class", classes[2][:5].upper())
    assert page.shown == [r["id"] for r in rows if r["class_name"] == classes[2] or r["label"] == 2]
    page.set("class", "")
    page.set("answer", "wrong")
    assert page.shown == [r["id"] for r in ok if r["label"] != r["topk_index"][0]]
    page.set("answer", "right")
    assert page.shown == [r["id"] for r in ok if r["label"] == r["topk_index"][0]]
    page.set("answer", "")
    page.set("status", "2")
    assert page.shown == [r["id"] for r in rows if r["status"] == "error"]
    page.set("status", "")
    middle = float(np.median([row["score"] for row in ok])) + 1e-3
    page.set("low", str(middle))
    assert page.shown == [r["id"] for r in ok if r["score"] >= middle]
    assert page.all("#count")[0].text == f"{len(page.shown)} of 15 pictures"
    page.set("low", "")
    page.set("high", str(middle))
    assert page.shown == [r["id"] for r in ok if r["score"] <= middle]
    page.set("name", "ZZZ")
    assert page.shown == []
    page.all("#filters button[type=reset]")[0].click()
    assert len(page.shown) == 15


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize(
    ("key", "column"), [("score", "score"), ("id", "id"), ("class", "class_name"), ("ms", "explain_ms")]
)
def test_sorting(page, rows, key, column, descending):
    page.set("sort", key)
    page.set("descending", descending)
    # Numbers are told with four digits; equal ones stay in the order of the source, and rows without come last.
    told = {r["id"]: float(f"{r[column]:.4g}") if isinstance(r[column], float) else r[column] for r in rows}
    there = [name for name, value in told.items() if value is not None]
    lower = {name: told[name].lower() if isinstance(told[name], str) else told[name] for name in there}
    expected = sorted(there, key=lower.get, reverse=descending)
    assert page.shown == expected + [name for name in told if name not in lower]


def test_the_slider_sets_the_opacity_of_every_map(page):
    for value in (0, 35, 100):
        page.set("opacity", value)
        told = page.js("return [...document.querySelectorAll('.stage > canvas')].map(e => getComputedStyle(e).opacity)")
        assert set(map(float, told)) == {value / 100}


def test_boxes_lie_where_the_run_has_them(page, rows):
    page.set("boxes", True)
    left, top, width, height = page.js(
        "const s = document.querySelector('.stage'), b = s.querySelector('.box').getBoundingClientRect(),"
        "o = s.getBoundingClientRect();"
        "return [(b.left-o.left)/o.width, (b.top-o.top)/o.height, b.width/o.width, b.height/o.height]"
    )
    x1, y1, x2, y2 = rows[0]["box"]
    expected = (x1 / 24, y1 / 24, (x2 + 1 - x1) / 24, (y2 + 1 - y1) / 24)
    assert (left, top, width, height) == pytest.approx(expected, abs=0.01)


def test_the_page_colours_a_map_as_the_library_does(page, rows, made):
    heat = render.normalize(rows[0].explanation().heatmap)
    expected = (render.colorize(heat)[0] * 255).permute(1, 2, 0)
    rise = (2 * heat[0]).clamp(max=1)
    opacity = 255 * rise * rise * (3 - 2 * rise)
    drawn = page.js(
        "const c = document.querySelector('.stage > canvas');"
        "return [c.width, c.height, ...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
    )
    assert drawn[:2] == [24, 24]
    drawn = torch.tensor(drawn[2:]).view(24, 24, 4).float()
    assert (drawn[..., 3] - opacity).abs().max() < 6  # 255 levels, of which opacity is up to three times as steep
    solid = opacity > 200  # where it is thin, the canvas itself rounds colours
    assert (drawn[..., :3] - expected)[solid].abs().max() < 12  # two of the table's steps


def test_keys_walk_open_and_close(page, rows):
    from selenium.webdriver.common.keys import Keys

    names = [row["id"] for row in rows]
    across = page.js(
        "const c = [...document.querySelectorAll('.card')];return c.filter(e => e.offsetTop === c[0].offsetTop).length"
    )
    page.js("document.querySelector('.card > button').focus()")
    assert page.focused == names[0]
    for key, place in (
        (Keys.ARROW_RIGHT, 1),
        (Keys.ARROW_DOWN, 1 + across),
        (Keys.ARROW_LEFT, across),
        (Keys.ARROW_UP, 0),
        (Keys.ARROW_LEFT, 0),
        (Keys.END, 14),
        (Keys.ARROW_RIGHT, 14),
        (Keys.HOME, 0),
    ):
        page.press(key)
        assert page.focused == names[place]
    # One place for the tab key.
    assert page.js("return document.querySelectorAll('.card > button[tabindex=\"0\"]').length") == 1
    page.press(Keys.ENTER)
    assert page.js("return document.getElementById('detail').open")
    assert page.all("#detail-title")[0].text == names[0]
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert page.all("#detail-title")[0].text == names[2]
    page.press(Keys.ESCAPE)
    assert not page.js("return document.getElementById('detail').open")
    assert page.focused == names[2]


def test_tabs_are_walked_by_arrows(page):
    from selenium.webdriver.common.keys import Keys

    page.js("document.getElementById('tab-gallery').focus()")
    for name in ("dataset", "errors", "runs", "gallery"):
        page.press(Keys.ARROW_RIGHT)
        assert page.js("return document.activeElement.id") == f"tab-{name}"
        shown = page.js("return [...document.querySelectorAll('[role=tabpanel]:not([hidden])')].map(e => e.id)")
        assert shown == [name]
    assert page.js("return document.querySelectorAll('#dataset .matrix').length") == 3  # one of dominant classes
    assert len(page.shown) == 15


def test_what_a_screen_reader_is_told(page):
    faults = page.js(
        """
        const faults = [], said = (e) => (e.getAttribute("aria-label") || e.textContent || "").trim();
        document.getElementById("tab-dataset").click(); document.getElementById("tab-runs").click();
        document.querySelectorAll("img").forEach((e) => { if (!e.alt) faults.push("img without alt"); });
        document.querySelectorAll("canvas").forEach((e) => {
          if (e.getAttribute("role") !== "img" || !said(e)) faults.push("canvas without words"); });
        document.querySelectorAll("button").forEach((e) => { if (!said(e)) faults.push("button without words"); });
        document.querySelectorAll("input, select").forEach((e) => {
          if (!e.labels.length && !e.ariaLabel) faults.push(`${e.id} without label`); });
        document.querySelectorAll("table").forEach((e) => {
          if (!e.querySelector("th[scope]")) faults.push("table without heads"); });
        document.querySelectorAll("[aria-controls], [aria-labelledby], [aria-describedby]").forEach((e) => {
          for (const name of ["aria-controls", "aria-labelledby", "aria-describedby"]) {
            const id = e.getAttribute(name);
            if (id && !document.getElementById(id)) faults.push(`${name} to nothing: ${id}`);
          } });
        const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
        if (new Set(ids).size !== ids.length) faults.push("an id twice");
        document.querySelectorAll(".card").forEach((e) => {
          if (e.getAttribute("role") !== "listitem" || !e.getAttribute("aria-posinset")) faults.push("card"); });
        return faults;
        """
    )
    assert faults == []
    assert page.js("return document.documentElement.lang") == "en"


def test_names_stay_text(browser, made, tmp_path, evil_name, classes):
    opened = Opened(browser, report.write(made.runs, tmp_path / "r.html").path)
    assert evil_name in opened.shown
    opened.js("document.querySelectorAll('.card > button')[4].click()")
    for tab in ("dataset", "runs", "errors", "gallery"):
        opened.js(f"document.getElementById('tab-{tab}').click()")
    assert classes[2] in opened.js("return document.body.textContent")
    assert opened.js("return document.querySelectorAll('[onerror]').length") == 0
    assert opened.js("return document.scripts.length") == opened.js(
        "return document.querySelectorAll('script.pictures').length + 2"
    )
    assert opened.driver.title == "grad-cam, clear - explanations"
    assert opened.noise() == []


def test_pages_without_rows_without_labels_and_with_errors_alone(browser, loaded, made, tmp_path, paint, explained):
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(made.one / "_run.json", empty)
    folder, bad = tmp_path / "pictures", tmp_path / "bad"
    folder.mkdir()
    bad.mkdir()
    paint(folder, 3)
    (bad / "a.png").write_bytes(b"no picture")
    plain = explained(folder, loaded, tmp_path / "plain", labels=False)
    broken = explained(bad, loaded, tmp_path / "broken", max_errors=3)
    for run, count in ((empty, 0), (plain, 3), (broken, 1)):
        opened = Opened(browser, report.write(run, tmp_path / "r.html").path)
        for tab in ("dataset", "errors", "runs", "gallery"):
            opened.js(f"document.getElementById('tab-{tab}').click()")
        assert len(opened.shown) == count
        assert opened.noise() == []


@pytest.mark.extended
def test_ten_thousand_rows_open(browser, loaded, tmp_path, paint):
    """The time is printed, not asserted; the cards in the page are few however long the list is."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    paint(folder, 50)
    names = "".join(f"{n % 50:02d}.png,{n:05d}.png,{n % 5}\n" for n in range(10_000))
    (folder / "list.csv").write_text("path,id,label\n" + names)
    datasets.explain(str(folder / "list.csv"), loaded, method="grad-cam", out=tmp_path / "run", batch=256)
    written = report.write(tmp_path / "run", tmp_path / "r.html", limit=None)
    began = time.perf_counter()
    opened = Opened(browser, written.path)
    print(f"\n10,000 rows, {written.bytes / 1e6:.1f} MB: open after {time.perf_counter() - began:.2f} s")
    assert opened.all("#count")[0].text == "10,000 pictures"
    assert 0 < len(opened.shown) < 300
    opened.js("window.scrollTo(0, document.body.scrollHeight)")
    opened.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    assert "09999.png" in opened.shown
    assert len(opened.shown) < 300
    assert opened.noise() == []
