"""The service's page in a real Chromium (Debian's, driven by Playwright): from a dropped file to the report; what is typed wrong; themes,
narrow screens, keys, the keyboard, and what axe finds wrong for screen readers."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import service_trials as trials  # type: ignore[import-not-found]

sys.path.pop(0)

CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
DEMO = Path(__file__).parents[1] / "demo"
WAIT = 240_000  # ms; a machine may be busy
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is not there: apt-get install chromium, or CHROMIUM=its path"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield found
        found.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    at = tmp_path_factory.mktemp("page")
    trials.write_model(at / "model.npz")
    with trials.Process("serve", at / "home", "--port", "0") as server:
        yield server.url, at


@pytest.fixture
def page(browser: Any, served: tuple[str, Path]) -> Iterator[Any]:
    """A page at the start that fails the test for anything on its console."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, bypass_csp=False)
    found, said = context.new_page(), []
    found.set_default_timeout(WAIT)
    found.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    found.on("pageerror", lambda error: said.append(str(error)))
    found.goto(served[0])
    found.wait_for_selector("h1")
    yield found
    context.close()
    assert said == []


# All letters of both charts as large as the style sheet says, whatever the width.
LETTERS = """width => innerWidth === width && document.querySelectorAll('.chart svg .tick').length > 6 &&
    [...document.querySelectorAll('.chart svg')].every((svg) =>
    Math.abs(svg.getScreenCTM().a - 1) < 0.02 && svg.querySelectorAll('.tick').length > 3)"""


def knob(page: Any, name: str, value: str) -> Any:
    field = page.locator(f"#knob-{name.replace('.', '-')}")
    field.fill(value)
    return field


def ask(page: Any, model: Path, **knobs: str) -> None:
    page.set_input_files("#file-network", model)
    page.locator("input[value=smoke]").check(force=True)
    page.wait_for_function("() => document.querySelector('#knob-train-steps')?.value === '20'")  # its own values, not the last recipe's
    for name, value in knobs.items():
        knob(page, name.replace("_", ".", 1), value)


def test_from_a_file_to_the_report(page, served):
    url, at = served
    ask(page, at / "model.npz")
    knob(page, "train.steps", "60")
    page.locator("button.main:enabled").click()
    page.wait_for_selector(".stages li.now")
    page.wait_for_selector(".gates .meter")
    figures = page.locator(".figure").all_inner_texts()
    assert any("Temperature" in text for text in figures)
    report = page.wait_for_selector("iframe").content_frame()
    assert "Binary gates" in report.wait_for_selector("h1, h2").inner_text() + report.locator("body").inner_text()
    assert page.locator(".chip").first.inner_text() == "done"
    assert page.locator(".stages li.past").count() == 5
    assert page.locator("svg polyline.lineA").count() >= 2
    for width in (1280, 360):
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_function(LETTERS, arg=width)  # drawn again for the width
    page.set_viewport_size({"width": 1280, "height": 900})
    with page.expect_download() as got:
        page.get_by_text("Download .tar").click()
    assert got.value.suggested_filename == "model.rnn2bin.tar"
    page.goto(f"{url}/#/jobs")
    page.wait_for_selector("tbody tr")
    page.locator("#uploads summary").click()
    page.get_by_role("button", name="Delete model.npz").click()
    page.wait_for_selector("#uploads >> text=None.")
    assert "done" in page.locator("tbody tr").first.inner_text()
    page.locator("tbody a").first.click()
    page.wait_for_selector("iframe")
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Really delete?").click()
    page.wait_for_selector(".empty")


def test_what_is_under_the_hand_stays_when_the_page_is_drawn_again(page, served):
    """Buttons were once made anew with every event: the keyboard lost its place, and "Really delete?" was "Delete" again."""
    focused = lambda: page.evaluate("() => document.activeElement.textContent")
    job = f"{served[0]}/#/jobs/"
    with trials.Client(served[0]) as client:
        id = client.convert(served[1] / "model.npz", recipe="smoke", set=trials.LONG)["id"]
        page.goto(job + id)
        page.wait_for_selector(".gates .meter")
        page.get_by_role("button", name="Cancel").focus()
        steps = page.locator(".figure", has_text="Steps").inner_text()
        page.wait_for_function("old => ![...document.querySelectorAll('.figure')].some((one) => one.innerText === old)", arg=steps)
        assert focused() == "Cancel"
        page.goto(f"{served[0]}/#/jobs")
        link = page.locator(f"tbody a[href='#/jobs/{id}']")
        link.focus()
        link.evaluate("(node) => { node.dataset.old = 1 }")
        page.wait_for_selector(f"tbody a[href='#/jobs/{id}']:not([data-old])")
        assert focused() == "model.npz"
        page.goto(job + id)
        page.get_by_role("button", name="Cancel").click()
        page.wait_for_selector(".chip.cancelled")
        page.get_by_role("button", name="Delete").click()
        for width in (700, 1280):
            page.set_viewport_size({"width": width, "height": 900})  # draws everything again
            page.wait_for_timeout(600)
        assert focused() == "Really delete?"
        page.keyboard.press("Enter")
        page.wait_for_function("id => !document.querySelector(`tbody a[href='#/jobs/${id}']`) && location.hash === '#/jobs'", arg=id)


def test_what_is_typed_is_checked_at_once_and_by_the_service(page, served):
    ask(page, served[1] / "model.npz")
    field = knob(page, "train.steps", "0")
    row = page.locator(".knob", has=field)
    assert "at least 1" in row.locator(".why").inner_text()
    assert field.get_attribute("aria-invalid") == "true"
    assert page.locator("button.main").is_disabled()
    row.get_by_role("button", name="as in the recipe").click()
    assert field.input_value() == "20"
    assert page.locator("button.main:enabled").count() == 1 or page.wait_for_selector("button.main:enabled")
    page.get_by_text(re.compile(r"All \d+ knobs")).click()
    page.get_by_label("Find a knob").fill("open rate")
    assert page.locator(".group .knob:visible").count() < 5
    knob(page, "budget.open", "q: 0.1")  # only the service knows that no cell has such a gate
    page.wait_for_selector("text=no cell has a gate q")
    page.locator("input[value=your-own]").check(force=True)
    page.locator("#own").fill("version: 1\ntrain:\n  stepz: 4\n")
    page.wait_for_selector("text=did you mean steps")


def test_what_is_typed_while_a_recipe_is_on_its_way_stays(page, served):
    """Its values once came late and took back what was typed meanwhile; and those of a recipe chosen before took the later one's place."""
    hold: list[Any] = []
    page.route("**/v1/recipes/smoke*", lambda route: hold.append(route))
    page.locator("input[value=smoke]").check(force=True)
    field = knob(page, "train.steps", "0")
    assert field.get_attribute("aria-invalid") == "true"
    while not hold:
        page.wait_for_timeout(20)
    with page.expect_response("**/v1/recipes/smoke*"):
        hold.pop().continue_()
    page.wait_for_function("() => document.querySelector('#knob-train-batch_size').value === '4'")
    assert (field.input_value(), field.get_attribute("aria-invalid")) == ("0", "true")
    page.locator("input[value=anneal]").check(force=True)
    page.wait_for_function("() => document.querySelector('#knob-train-steps').value === '4000'")
    page.locator("input[value=smoke]").check(force=True)
    while not hold:
        page.wait_for_timeout(20)
    page.locator("input[value=anneal]").check(force=True)
    with page.expect_response("**/v1/recipes/smoke*"):
        hold.pop().continue_()
    page.wait_for_timeout(200)
    assert field.input_value() == "4000"


def test_a_refusal_is_shown_with_its_reason(page, tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"nothing that anybody could read")
    ask(page, tmp_path / "broken.onnx")
    page.locator("button.main:enabled").click()
    shown = page.wait_for_selector(".alert li")
    assert "broken.onnx" in shown.inner_text()
    assert str(tmp_path) not in page.content()
    assert page.get_by_role("button", name="Retry").is_visible()


def test_themes_and_narrow_screens(page, served):
    background = lambda: page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    light = background()
    page.emulate_media(color_scheme="dark")
    assert background() != light
    page.locator("#theme").click()  # light, whatever the system says
    assert background() == light
    page.reload()
    page.wait_for_selector(".drop")
    assert background() == light
    page.set_viewport_size({"width": 360, "height": 800})
    page.set_input_files("#file-data", served[1] / "model.npz")
    assert page.wait_for_selector(".files .name").bounding_box()["height"] < 60  # two lines, not a letter a line
    for width in (360, 768, 1600):
        page.set_viewport_size({"width": width, "height": 800})
        for place in ("#/", "#/jobs"):
            page.goto(f"{served[0]}/{place}")
            page.wait_for_selector("h1")
            assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth"), (width, place)


def test_the_keyboard_reaches_everything(page):
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.textContent") == "Skip to the content"
    seen = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("() => document.activeElement.id || document.activeElement.name || document.activeElement.textContent"))
    assert {"file-network", "file-data", "recipe", "knob-train-steps", "theme"} <= seen
    page.locator("input[value=anneal]").focus()
    page.keyboard.press("ArrowRight")
    assert not page.locator("input[value=anneal]").is_checked()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser, served, scheme):
    from axe_playwright_python.sync_playwright import Axe

    context = browser.new_context(bypass_csp=True, color_scheme=scheme, reduced_motion="reduce")
    page = context.new_page()
    page.set_default_timeout(WAIT)
    found = []

    def check(place: str) -> None:
        result = Axe().run(page)
        found.extend((place, v["id"], [node["html"][:120] for node in v["nodes"][:3]]) for v in result.response["violations"])

    with trials.Client(served[0]) as client:
        running = client.convert(served[1] / "model.npz", recipe="smoke", set=trials.LONG)
        for event in client.events(running["id"]):
            if event["event"] == "progress" and event["data"]["measured"]:
                break
        waits = {"#/": "h1", "#/jobs": "tbody tr", f"#/jobs/{running['id']}": ".gates .meter"}
        for place, ready in waits.items():
            page.goto(f"{served[0]}/{place}")
            page.reload()
            page.wait_for_selector(ready)
            for summary in page.locator("summary:visible").all():
                summary.click()
            check(place)
        client.cancel(running["id"])
        (done,) = trials.until_ended(client, [client.convert(served[1] / "model.npz", recipe="smoke")["id"]], seconds=240)
        page.goto(f"{served[0]}/#/jobs/{done['id']}")
        page.reload()
        page.wait_for_selector("iframe")
        check("a job that is done")
        page.set_content(client.http.get(done["links"]["report"]).text)  # the frame may run nothing, and so no axe
        check("its report")
    context.close()
    assert found == []


def test_a_key_is_asked_for(browser, tmp_path):
    with trials.Process("serve", tmp_path / "home", "--port", "0", "--no-worker"):
        pass  # makes the data base
    words = [sys.executable, "-m", "rnn2bin", "serve", "--home", str(tmp_path / "home"), "keys", "add", "me"]
    token = trials.subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    with trials.Process("serve", tmp_path / "home", "--port", "0", "--no-worker") as server:
        page = browser.new_page()
        page.set_default_timeout(WAIT)
        page.goto(server.url)
        page.get_by_label("Key").fill("r2b_wrong")
        page.get_by_role("button", name="Sign in").click()
        page.wait_for_selector("text=not known here")
        page.get_by_label("Key").fill(token)
        page.get_by_role("button", name="Sign in").click()
        page.wait_for_selector("#file-network", state="attached")
        assert token not in page.evaluate("() => document.cookie + JSON.stringify(localStorage)")
        page.get_by_role("button", name="Sign out").click()
        page.wait_for_selector("#key")
        page.close()


@pytest.mark.skipif(not (DEMO / "data" / "train.npz").exists(), reason="bash scripts/demo.sh brings g2p-en and its data into demo/")
def test_g2p_from_the_shipped_file(page):
    page.set_input_files("#file-network", DEMO / "g2p-en" / "g2p_en" / "checkpoint20.npz")
    page.set_input_files("#file-data", [DEMO / "data" / f"{part}.npz" for part in ("train", "valid", "test")])
    page.get_by_text("Written for one public network").click()
    page.locator("input[value=g2p]").check(force=True)
    page.wait_for_selector(".files li >> nth=3")
    knob(page, "train.steps", "6")
    page.get_by_text(re.compile(r"All \d+ knobs")).click()
    for name, value in (("train.max_steps", "6"), ("train.evaluate_every", "3"), ("train.batch_size", "8")):
        knob(page, name, value)
    page.locator("#knob-report-controls").uncheck()
    page.locator("button.main:enabled").click()
    page.wait_for_selector("iframe", timeout=540_000)
    assert "whole sequences right" in page.locator(".figures").first.inner_text()
