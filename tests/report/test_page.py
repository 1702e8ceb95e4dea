"""The page in a browser, where there is one."""

import os
import shutil
import time

import numpy as np
import pytest
import torch

from pyfast_xai import datasets, render, report
from pyfast_xai.datasets.manifest import NAME

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, CHROMIUMS)), None)
DRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip(f"no Chromium on PATH ({', '.join(CHROMIUMS)})")
    if DRIVER is None:
        pytest.skip(f"no chromedriver on PATH for {CHROMIUM}")
    webdriver = pytest.importorskip("selenium.webdriver")
    # Given both, Selenium has nothing to look for; offline, it would fetch nothing either.
    os.environ.setdefault("SE_OFFLINE", "true")
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

    def js(self, code, *options):
        return self.driver.execute_script(code, *options)

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

    def wait(self, holds):
        from selenium.webdriver.support.wait import WebDriverWait

        WebDriverWait(self.driver, 30).until(lambda _: holds())

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
    page.wait(lambda: len(page.shown) == 15)


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize(
    ("key", "column"), [("score", "score"), ("id", "id"), ("class", "class_name"), ("ms", "explain_ms")]
)
def test_sorting(page, rows, key, column, descending):
    page.set("sort", key)
    page.set("descending", descending)
    # Numbers are told with four digits; equal ones stay in the order of the source, and rows without come last.
    output = {r["id"]: float(f"{r[column]:.4g}") if isinstance(r[column], float) else r[column] for r in rows}
    there = [name for name, value in output.items() if value is not None]
    lower = {name: output[name].lower() if isinstance(output[name], str) else output[name] for name in there}
    expected = sorted(there, key=lower.get, reverse=descending)
    assert page.shown == expected + [name for name in output if name not in lower]


def test_the_slider_sets_the_opacity_of_every_map(page):
    for value in (0, 35, 100):
        page.set("opacity", value)
        output = page.js(
            "return [...document.querySelectorAll('.stage > canvas')].map(e => getComputedStyle(e).opacity)"
        )
        assert set(map(float, output)) == {value / 100}


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
    # On black and on white the library's own overlay shows its opacity and its colours.
    black, white = (render.overlay(torch.full((1, 3, 24, 24), ground), heat, alpha=1)[0] for ground in (0.0, 1.0))
    share = 1 - (white - black).mean(0)
    opacity, expected = 255 * share, (255 * black / share.clamp_min(1e-6)).permute(1, 2, 0)
    drawn = page.js(
        "const c = document.querySelector('.stage > canvas');"
        "return [c.width, c.height, ...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
    )
    assert drawn[:2] == [24, 24]
    drawn = torch.tensor(drawn[2:]).view(24, 24, 4).float()
    assert (drawn[..., 3] - opacity).abs().max() < 12  # 255 levels, of which opacity is up to six times as steep
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
    # A dialogue tells that it is closed in a task of its own.
    page.wait(lambda: page.focused == names[2])


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
    shutil.copy(made.one / NAME, empty)
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


@pytest.fixture(scope="module")
def swapped(made, loaded, tmp_path_factory, explained):
    return explained(made.folder, loaded, tmp_path_factory.mktemp("runs") / "swapped", color_swap=True)


@pytest.fixture
def colored(browser, made, swapped, tmp_path):
    """Two runs, of which the second was asked again with colours swapped."""
    opened = Opened(browser, report.write([made.runs[1], swapped], tmp_path / "r.html").path)
    yield opened
    assert opened.noise() == []


def test_colours_filter_by_what_swaps_change(colored, swapped):
    ok = [row for row in datasets.open(swapped) if row["status"] == "ok"]
    stays = [row["id"] for row in ok if row["swapped_index"] == row["topk_index"][:1] * 2]
    changes = [row["id"] for row in ok if row["id"] not in stays]
    assert stays
    assert changes
    choice = colored.all("#swapped")[0]
    assert not choice.is_displayed()  # the first run was not asked
    colored.set("run", "1")
    assert choice.is_displayed()
    colored.set("swapped", "stays")
    assert colored.shown == stays
    colored.set("swapped", "changes")
    assert colored.shown == changes
    colored.set("run", "0")
    assert len(colored.shown) == 15


def test_classes_by_how_far_they_depend_on_colour(colored, swapped, classes):
    from selenium.webdriver.common.keys import Keys

    right = [r for r in datasets.open(swapped) if r["status"] == "ok" and r["label"] == r["topk_index"][0]]
    colored.js("document.getElementById('tab-dataset').click()")
    cells = (
        "return [...document.querySelectorAll('.sortable tbody tr')]"
        ".map(r => [...r.children].map(e => e.textContent.trim()))"
    )
    body = colored.js(cells)
    pictures = {classes[c].strip(): sum(r["label"] == c for r in right) for c in {r["label"] for r in right}}
    assert {line[0]: int(line[1]) for line in body} == pictures
    for name, _, saved, *each in body:
        actual = [r["swapped_index"] for r in right if classes[r["label"]].strip() == name]
        shares = np.mean([[classes[c].strip() == name for c in result] for result in actual], 0)
        assert [saved, *each[:2]] == [f"{np.floor(100 * s + 0.5):.0f} %" for s in (shares.mean(), *shares)]
    assert "How far answers depend on colour is known of runs with --color-swap." in colored.all("#dataset")[0].text
    # By keyboard: a head sorts, again the other way round, and says so.
    heads = colored.all(".sortable thead button")
    for n in (0, 1, 2, 5):
        for _ in range(2):
            colored.js("arguments[0].focus()", heads[n])
            colored.press(Keys.ENTER)
            output = colored.js("return [...document.querySelectorAll('.sortable th[aria-sort]')].map(e => e.ariaSort)")
            assert len(output) == 1
            column = [line[n].lower() if n == 0 else float(line[n].split()[0]) for line in colored.js(cells)]
            assert column == sorted(column, reverse=output == ["descending"])
    # A class leads to its pictures.
    colored.set("name", "nothing is called so")
    first = colored.all(".sortable tbody button")[0]
    name = first.text
    colored.js("arguments[0].focus()", first)
    colored.press(Keys.ENTER)
    assert colored.js("return document.activeElement.id") == "tab-gallery"
    assert colored.shown == [r["id"] for r in right if classes[r["label"]].strip() == name]


def test_a_picture_shows_its_colours_swapped(colored, swapped, classes):
    row = next(row for row in datasets.open(swapped) if row["status"] == "ok")
    colored.js("document.querySelectorAll('.card > button')[arguments[0]].click()", row["index"])
    drawn = "return [...document.querySelectorAll('#detail .swaps canvas')].map(e => e.width)"
    colored.wait(lambda: colored.js(drawn) == [24, 24])  # they are 300 wide before
    output = [one.text for one in colored.all("#detail .swaps li")]
    result = zip(output, row["swapped_index"], row["swapped_score"], ("BRG", "GBR"), strict=True)
    for text, answer, score, order in result:
        assert classes[answer][:5] in text
        assert text.startswith("still" if answer == row["topk_index"][0] else "now")
        assert f"as {order}" in text
        assert text.endswith(f"{np.floor(100 * float(f'{score:.4g}') + 0.5):.0f} %")
    plain, *others = colored.js(
        "const pixels = (e) => { const c = document.createElement('canvas'); c.width = e.naturalWidth || e.width;"
        "c.height = e.naturalHeight || e.height; const x = c.getContext('2d'); x.drawImage(e, 0, 0);"
        "return [...x.getImageData(0, 0, c.width, c.height).data]; };"
        "const detail = document.getElementById('detail');"
        "return [detail.querySelector('img'), ...detail.querySelectorAll('.swaps canvas')].map(pixels)"
    )
    plain = np.reshape(plain, (24, 24, 4))[..., :3]
    for order, other in zip(((2, 0, 1), (1, 2, 0)), others, strict=True):
        assert np.array_equal(np.reshape(other, (24, 24, 4))[..., :3], plain[..., order])


@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_window_and_words_can_be_read(colored, width, scheme):
    driver = colored.driver
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 700}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    try:
        driver.refresh()
        for name in ("gallery", "dataset", "errors", "runs"):
            colored.js(f"document.getElementById('tab-{name}').click()")
            assert colored.js("return document.documentElement.scrollWidth") <= width
            # Contrast of text with the page, as WCAG counts it, at least 4.5 to 1.
            assert colored.js(CONTRAST, name) == []
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


CONTRAST = """
const light = (color) => {
  const parts = color.match(/[\\d.]+/g).slice(0, 3).map((own) => own / (color.startsWith("color(") ? 1 : 255));
  const [r, g, b] = parts.map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const faint = [], walk = document.createTreeWalker(document.getElementById(arguments[0]), NodeFilter.SHOW_TEXT);
for (let node = walk.nextNode(); node; node = walk.nextNode()) {
  const element = node.parentElement;
  if (!node.data.trim() || !element.checkVisibility() || element.closest("svg, select")) continue;
  const ground = (e) => getComputedStyle(e).backgroundColor;
  let behind = element;
  while (behind !== document.body && ground(behind) === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
  const a = light(getComputedStyle(element).color), b = light(ground(behind));
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) faint.push(`${node.data.trim().slice(0, 40)}: ${ratio.toFixed(2)}`);
}
return faint;
"""


@pytest.mark.extended
def test_ten_thousand_rows_open(browser, loaded, tmp_path, paint):
    """The time is printed, not asserted; the cards in the page are few however long the list is."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    paint(folder, 50)
    names = "".join(f"{n % 50:02d}.png,{n:05d}.png,{n % 5}\n" for n in range(10_000))
    (folder / "list.csv").write_text("path,id,label\n" + names)
    datasets.explain(str(folder / "list.csv"), loaded, method="grad-cam", out=tmp_path / "run", batch_size=256)
    written = report.write(tmp_path / "run", tmp_path / "r.html", limit=None)
    start = time.perf_counter()
    opened = Opened(browser, written.path)
    print(f"\n10,000 rows, {written.bytes / 1e6:.1f} MB: open after {time.perf_counter() - start:.2f} s")
    assert opened.all("#count")[0].text == "10,000 pictures"
    assert 0 < len(opened.shown) < 300
    opened.js("window.scrollTo(0, document.body.scrollHeight)")
    opened.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    assert "09999.png" in opened.shown
    assert len(opened.shown) < 300
    assert opened.noise() == []
