"""The page in a real browser: strokes are drawn with the mouse, by touch and by keyboard, and answered.

Every test leaves pictures in tests/output/page/, to be looked at. The browser is Chromium or Chrome: the one that the
environment variable TINYVIT_BROWSER names, else one on the PATH, else Playwright's own.
"""

import contextlib
import importlib
import os
import re
import sys
from pathlib import Path

import pytest

for needed in ("fastapi", "uvicorn", "playwright"):
    pytest.importorskip(needed, reason=f"the page's tests need {needed}: pip install -e '.[app,app-test]'")

from playwright.sync_api import expect, sync_playwright  # noqa: E402

pytestmark = pytest.mark.extended

expect.set_options(timeout=20_000)  # tests run beside each other

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / "tests" / "output" / "page"
sys.path.insert(0, str(ROOT / "benchmarks"))
serve = importlib.import_module("serve")


@pytest.fixture(scope="module")
def browser():
    path = serve.find_browser()
    with sync_playwright() as playwright:
        path = path or playwright.chromium.executable_path
        if not Path(path).exists():
            if os.environ.get("TINYVIT_BROWSER"):
                pytest.fail(f"TINYVIT_BROWSER is {path!r}, where there is no browser")
            pytest.skip("no browser: apt-get install chromium, or set TINYVIT_BROWSER to one")
        with contextlib.closing(playwright.chromium.launch(executable_path=path, args=serve.BROWSER_FLAGS)) as found:
            yield found


@pytest.fixture(scope="module")
def address():
    with serve.Server() as server:
        yield f"http://127.0.0.1:{server.port}"


@pytest.fixture
def open_page(browser, address, request):
    """Return a function that opens the page; what goes wrong in it, and any request to elsewhere, fails the test."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    contexts, wrong = [], []

    def open_it(expected=(), ready=True, **options):
        context = browser.new_context(**{"viewport": {"width": 1360, "height": 900}, **options})
        contexts.append(context)
        context.set_default_timeout(20_000)
        page = context.new_page()

        def note(text):
            # the last of these is about `painted`, which reads canvases
            if not any(part in text for part in [*expected, "willReadFrequently"]):
                wrong.append(text)

        page.on("console", lambda message: note(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: note(str(error)))
        page.on("request", lambda found: None if found.url.startswith(address) else note(f"asked {found.url}"))
        page.goto(address)
        if ready:
            page.wait_for_selector(".sample")
            page.wait_for_selector(".head")
        return page

    yield open_it
    for number, context in enumerate(contexts):
        name = re.sub(r"\W+", "-", request.node.name).strip("-")
        context.pages[0].screenshot(path=OUTPUT / f"{name}{number or ''}.png", full_page=True)
        context.close()
    assert wrong == []


def draw(page, strokes, up=True):
    """Draw with the mouse, where the drawing area is."""
    serve.draw_with_mouse(page, [[*stroke[::3], stroke[-1]] for stroke in strokes], up)


def answer(page):
    return page.inner_text("#digit")


def expect_answer(page, text):
    expect(page.locator("#digit")).to_have_text(text, timeout=20_000)


def canvas(page, selector):
    """Return what a canvas shows, as text."""
    return page.eval_on_selector(selector, "canvas => canvas.toDataURL()")


def painted(page, selector):
    """Return how many pixels of a canvas are not empty."""
    return page.eval_on_selector(
        selector,
        """canvas => canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data
                         .reduce((count, value, i) => count + (i % 4 === 3 && value > 0 ? 1 : 0), 0)""",
    )


def bars(page):
    return page.eval_on_selector_all(
        "#bars .fill", "fills => fills.map(fill => Number(fill.style.transform.slice(7, -1)))"
    )


# ---- drawing ----


def test_all_ten_digits_are_recognised_and_the_bars_and_the_attention_change(open_page):
    page = open_page()
    seen = set()
    for digit in range(10):
        draw(page, serve.drawing(digit))
        expect_answer(page, str(digit))
        shares = bars(page)
        assert shares.index(max(shares)) == digit
        assert abs(sum(shares) - 1) < 1e-3
        expect(page.locator("#bars .best")).to_contain_text(str(digit))
        seen.add((tuple(shares), canvas(page, "#over"), canvas(page, "#seen"), canvas(page, ".head canvas")))
        page.click("#clear")
        expect_answer(page, "?")
    for part in zip(*seen, strict=True):
        assert len(set(part)) == 10  # no two digits have the same bars, attention or picture


def test_it_answers_while_one_draws(open_page):
    page = open_page()
    draw(page, serve.drawing(7), up=False)
    expect_answer(page, "7")
    page.mouse.up()
    assert re.search(r"Answered \d+ ms after the pen moved", page.inner_text("#latency"))


def test_a_digit_of_two_strokes_grows(open_page):
    page = open_page()
    first, second, third = serve.drawing(4)
    draw(page, [first, second])
    expect(page.locator("#digit")).not_to_have_text("?")
    before = canvas(page, "#seen")
    draw(page, [third])
    expect_answer(page, "4")
    assert canvas(page, "#seen") != before


def test_clear_and_undo(open_page):
    page = open_page()
    expect(page.locator("#undo")).to_be_disabled()
    expect(page.locator("#clear")).to_be_disabled()
    draw(page, serve.drawing(3))
    expect_answer(page, "3")
    ink = painted(page, "#ink")
    assert ink > 1000
    page.click("#clear")
    expect_answer(page, "?")
    assert painted(page, "#ink") == painted(page, "#over") == painted(page, "#seen") == 0
    assert bars(page) == [0] * 10
    expect(page.locator("#verdict")).to_have_text("Nothing drawn yet.")
    page.click("#undo")  # of the clearing
    expect_answer(page, "3")
    assert painted(page, "#ink") == ink
    page.keyboard.press("Control+z")
    assert 0 < painted(page, "#ink") < ink
    for _ in range(5):
        page.keyboard.press("Control+z")
    expect_answer(page, "?")
    expect(page.locator("#undo")).to_be_disabled()


def test_clearing_at_once_leaves_no_late_answer(open_page):
    page = open_page()
    for _ in range(5):
        draw(page, serve.drawing(5))
        page.click("#clear")
        page.wait_for_timeout(150)
        assert answer(page) == "?"


def test_a_drawing_may_leave_the_area(open_page):
    page = open_page()
    box = page.locator("#ink").bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 100, box["y"] + box["height"] + 50, steps=10)  # out at the bottom, and in again
    page.mouse.move(box["x"] + 105, box["y"] + 100, steps=10)
    page.mouse.up()
    expect_answer(page, "1")
    page.mouse.move(box["x"] + 300, box["y"] + 100, steps=5)  # the pen is up
    page.wait_for_timeout(100)
    expect_answer(page, "1")


def test_a_long_scribble_is_still_taken(open_page):
    page = open_page()
    box = page.locator("#ink").bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 100)
    for _ in range(4):
        page.mouse.down()
        scribble(page)
        page.mouse.up()
    expect(page.locator("#verdict")).to_contain_text("Most probably")
    page.wait_for_timeout(1000)  # and so it stays when the last of it has come
    expect(page.locator("#verdict")).to_contain_text("Most probably")


def scribble(page):
    page.evaluate(
        """() => {  // two thousand moves, faster than a mouse could
            const ink = document.getElementById("ink"), box = ink.getBoundingClientRect();
            for (let i = 0; i < 2500; i += 1) {
                const x = box.left + box.width * (0.5 + 0.4 * Math.cos(i * 0.7)), y = box.top + box.height * (0.5 + 0.4 * Math.sin(i));
                ink.dispatchEvent(new PointerEvent("pointermove", { pointerId: 1, clientX: x, clientY: y, bubbles: true }));
            }
        }"""  # noqa: E501
    )


# ---- looking ----


def test_every_head_of_every_layer_can_be_looked_at(open_page):
    page = open_page()
    draw(page, serve.drawing(2))
    expect_answer(page, "2")
    shown = {}
    for value in ["rollout", "none", *[f"{layer}-{head}" for layer in range(4) for head in range(4)]]:
        page.check(f"input[name=look][value='{value}']", force=True)
        shown[value] = canvas(page, "#seen"), page.inner_text("#meaning"), canvas(page, "#over")
        shares = [int(text.removesuffix(" %")) for text in page.locator("#shares b").all_inner_texts()]
        assert len(shares) == (0 if value == "none" else 16)
        if value != "none":
            assert 30 < sum(shares) < 109  # with what it keeps for itself they make a hundred, but for rounding
    pictures, words, overlays = zip(*shown.values(), strict=True)
    assert len(set(words)) == 18
    # two heads that give all to the same patch make the same picture; few do
    assert len(set(pictures)) >= 12
    assert len(set(overlays)) >= 12
    assert "head 3 of layer 2" in shown["1-2"][1]
    assert "Layer 4, head 4 looks most at row" in page.get_attribute("#seen", "aria-label")


def test_the_shares_on_the_page_are_those_of_the_api(open_page, address):
    page = open_page()
    with page.expect_response(lambda response: "/api/predict" in response.url) as found:
        page.click(".sample >> nth=4")
    reading = found.value.json()
    expect_answer(page, str(reading["digit"]))
    page.check("input[name=look][value='2-1']", force=True)
    texts = page.locator("#shares b").all_inner_texts()
    # halves are rounded up in the page
    assert texts == [f"{int(100 * share + 0.5)} %" for share in reading["attention"][2][1][1:]]
    assert bars(page) == pytest.approx(reading["probabilities"], abs=1e-4)


def test_the_attention_can_be_taken_off_the_drawing(open_page):
    page = open_page()
    draw(page, serve.drawing(0))
    expect_answer(page, "0")
    assert painted(page, "#over") > 1000
    page.uncheck("#overlay")
    assert painted(page, "#over") == 0


def test_samples(open_page):
    page = open_page()
    samples = page.locator(".sample")
    assert samples.count() == 20
    for number in range(10):
        samples.nth(number).click()
        expect_answer(page, str(number))
        expect(page.locator("#verdict .right")).to_have_text(f"Right: it is labelled {number}.")
        expect(samples.nth(number)).to_have_attribute("aria-pressed", "true")
    samples.nth(19).click()
    expect(page.locator("#verdict .wrong")).to_contain_text("Wrong: it is labelled")
    draw(page, serve.drawing(7))  # a stroke takes the sample's place
    expect_answer(page, "7")
    expect(page.locator(".sample[aria-pressed=true]")).to_have_count(0)
    assert page.locator("#verdict .right, #verdict .wrong").count() == 0


# ---- without a mouse, and without eyes ----


def test_a_digit_is_drawn_by_keyboard_alone(open_page):
    page = open_page()
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.locator("#ink")).to_be_focused()
    outline = page.eval_on_selector("#board", "board => getComputedStyle(board).outlineStyle")
    assert outline == "solid"  # one sees where one is
    page.keyboard.press("Space")
    for key, times in (("ArrowRight", 14), ("ArrowDown", 22)):  # a 7 with a right angle
        for _ in range(times):
            page.keyboard.press(key)
    page.keyboard.press("Space")
    expect_answer(page, "7")
    expect(page.locator("#live")).to_contain_text("Most probably a 7")
    ink = painted(page, "#ink")
    page.keyboard.press("ArrowLeft")  # the pen is up
    assert abs(painted(page, "#ink") - ink) < 600  # but for the cursor


def test_lifting_the_pen_leaves_the_answer_to_be_announced(open_page):
    page = open_page()
    page.locator("#ink").focus()
    page.keyboard.press("Space")
    for _ in range(20):
        page.keyboard.press("ArrowDown")
    for rest in (0, 1_500):  # the answer waits to be announced, or has been
        expect(page.locator("#digit")).not_to_have_text("?")
        page.wait_for_timeout(rest)
        page.keyboard.press("Space")
        expect(page.locator("#live")).to_have_text("Pen up")
        expect(page.locator("#live")).to_contain_text("Most probably")
        page.keyboard.press("Space")
        page.keyboard.press("ArrowDown")


def test_everything_else_by_keyboard(open_page):
    page = open_page()
    page.locator(".sample").nth(3).focus()
    page.keyboard.press("Enter")
    expect_answer(page, "3")
    page.locator("input[value=rollout]").focus()
    before = canvas(page, "#seen")
    for _ in range(3):
        page.keyboard.press("ArrowDown")
    assert page.evaluate("document.querySelector('input[name=look]:checked').value") == "0-1"
    assert canvas(page, "#seen") != before
    expect(page.locator("#live")).to_contain_text("Layer 1, head 2 looks most at row")
    page.locator("#clear").focus()
    page.keyboard.press("Enter")
    expect_answer(page, "?")
    expect(page.locator("#live")).to_have_text("Cleared")


def test_the_answer_is_announced_once_it_rests(open_page):
    page = open_page()
    page.evaluate(
        """() => { window.said = []; new MutationObserver(() => window.said.push(document.getElementById("live").textContent))
                   .observe(document.getElementById("live"), { childList: true }); }"""  # noqa: E501
    )
    answered = []
    page.on("response", lambda response: answered.append(response) if "/api/predict" in response.url else None)
    draw(page, serve.drawing(8))
    expect(page.locator("#live")).to_contain_text("Most probably an 8")
    assert 1 <= len(page.evaluate("window.said")) < max(2, len(answered) / 2)  # and not at every move of the pen
    assert page.get_attribute("#live", "aria-live") == "polite"


def test_everything_that_can_be_used_has_a_name(open_page):
    page = open_page()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, a, canvas[tabindex], [role]")].filter(element =>
            !(element.getAttribute("aria-label") || element.textContent.trim() || element.closest("label")?.textContent.trim()
              || element.getAttribute("role") === "status")).map(element => element.outerHTML)"""  # noqa: E501
    )
    assert nameless == []
    assert page.get_attribute("html", "lang") == "en"
    assert page.locator("h1").count() == 1


# ---- sizes and colours ----


def finger(page, strokes):
    """Draw by touch, as a browser gets it from a touch screen."""
    session = page.context.new_cdp_session(page)
    page.locator("#ink").scroll_into_view_if_needed()
    box = page.locator("#ink").bounding_box()
    for stroke in strokes:
        for number, (x, y) in enumerate(stroke):
            point = {"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"]}
            kind = "touchMove" if number else "touchStart"
            session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [point]})
        session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


PHONE = {"viewport": {"width": 360, "height": 740}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(open_page, scheme):
    page = open_page(**PHONE, color_scheme=scheme)
    finger(page, serve.drawing(5))
    expect_answer(page, "5")
    assert page.evaluate("window.scrollY") < 200  # the finger drew and did not scroll
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    small = page.evaluate(
        """() => [...document.querySelectorAll("button, .check, .wide span, .head")].map(element =>
            element.getBoundingClientRect()).filter(box => box.width < 32 || box.height < 32).length"""
    )
    assert small == 0  # a finger meets it


@pytest.mark.parametrize("width", [320, 600, 820, 1100, 1920])
def test_no_width_needs_to_be_scrolled_sideways(open_page, width):
    page = open_page(viewport={"width": width, "height": 900})
    draw(page, serve.drawing(6))
    expect_answer(page, "6")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    area = page.locator("#ink").bounding_box()
    assert abs(area["width"] - area["height"]) < 1
    assert area["width"] >= 240


def test_light_and_dark_are_of_different_colours_and_both_can_be_read(open_page):
    colours = {}
    for scheme in ("light", "dark"):
        page = open_page(color_scheme=scheme)
        draw(page, serve.drawing(3))
        expect_answer(page, "3")
        colours[scheme] = [
            page.evaluate(f"getComputedStyle(document.querySelector('{selector}')).{what}")
            for selector, what in (("body", "backgroundColor"), ("body", "color"), (".card", "backgroundColor"),
                                   (".hint", "color"))
        ]  # fmt: skip
        background, text, card, muted = (brightness(colour) for colour in colours[scheme])
        assert contrast(background, text) > 7
        assert contrast(card, muted) > 4.5  # WCAG 2.2, 1.4.3
    assert all(one != other for one, other in zip(*colours.values(), strict=True))


def test_a_change_of_colours_repaints_the_drawing(open_page):
    page = open_page(color_scheme="light")
    draw(page, serve.drawing(3))
    expect_answer(page, "3")
    before = canvas(page, "#ink"), canvas(page, "#seen"), canvas(page, ".sample canvas")
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("before => document.getElementById('ink').toDataURL() !== before", arg=before[0])
    after = canvas(page, "#ink"), canvas(page, "#seen"), canvas(page, ".sample canvas")
    assert all(one != other for one, other in zip(before, after, strict=True))


def brightness(colour):
    """Return the relative luminance of "rgb(r, g, b)" (WCAG 2.2)."""
    levels = [int(level) / 255 for level in re.findall(r"\d+", colour)[:3]]
    linear = [level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4 for level in levels]
    return sum(weight * level for weight, level in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


# ---- when something is wrong ----


def test_a_busy_server_is_asked_again(open_page):
    page = open_page(expected=["503"])
    refused = []

    def refuse_twice(route):
        if len(refused) < 2:
            refused.append(route)
            route.fulfill(status=503, headers={"retry-after": "0.2"}, json={"detail": "too many digits are waiting"})
        else:
            route.continue_()

    page.route("**/api/predict/strokes", refuse_twice)
    draw(page, [[[0.5, 0.2], [0.5, 0.8]]])
    expect_answer(page, "1")
    assert len(refused) == 2


def test_a_server_that_is_gone_is_said_and_asked_again(open_page):
    page = open_page(expected=["ERR_FAILED"])
    page.route("**/api/predict/strokes", lambda route: route.abort())
    draw(page, serve.drawing(2))
    expect(page.locator("#verdict")).to_have_text("The server does not answer. Trying again. Is it still running?")
    page.unroute("**/api/predict/strokes")
    expect_answer(page, "2")


def test_what_the_server_refuses_is_said(open_page):
    page = open_page(expected=["422"])
    page.route("**/api/predict/strokes", lambda route: route.fulfill(status=422, json={"detail": "a <b>reason</b>"}))
    draw(page, serve.drawing(2))
    expect(page.locator("#verdict")).to_have_text("The server says: a <b>reason</b>")  # as text, not as HTML


def test_a_page_without_its_server_says_so(open_page):
    page = open_page(expected=["ERR_FAILED"], ready=False)
    page.route("**/api/*", lambda route: route.abort())
    page.reload()
    expect(page.locator("#verdict")).to_contain_text("Start it again, and reload this page")


def test_scripts_from_within_the_page_do_not_run(open_page):
    page = open_page(expected=["Content Security Policy", "404"])
    page.evaluate(
        """() => { const script = document.createElement("script"); script.textContent = "window.ran = true";
                   document.body.append(script);
                   document.body.insertAdjacentHTML("beforeend", "<img src=x onerror='window.ran = true'>"); }"""
    )
    page.wait_for_timeout(200)
    assert page.evaluate("window.ran") is None


def test_the_words_about_the_api_look_right(open_page, address):
    page = open_page()
    page.click("footer a")
    expect(page.locator("h1")).to_have_text("The JSON API")
    assert page.locator("table").bounding_box()["width"] > 500
    assert page.locator("pre").first.evaluate("pre => pre.scrollWidth <= pre.clientWidth + 60")
    assert page.evaluate("document.documentElement.scrollWidth") <= 1360


def test_the_screenshots_are_there(open_page):
    """Those which one looks at first, by name."""
    for name, options in {
        "light": {"color_scheme": "light"}, "dark": {"color_scheme": "dark"}, "phone": PHONE,
        "phone-dark": {**PHONE, "color_scheme": "dark"}, "tablet": {"viewport": {"width": 820, "height": 1180}},
    }.items():  # fmt: skip
        page = open_page(**options)
        if "phone" in name:
            finger(page, serve.drawing(3))
        else:
            draw(page, serve.drawing(3))
        expect_answer(page, "3")
        page.wait_for_timeout(300)  # until the bars have come to rest
        path = OUTPUT / f"{name}.png"
        page.screenshot(path=path, full_page=True)
        assert path.stat().st_size > 30_000
