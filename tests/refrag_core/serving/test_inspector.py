"""The inspector in a real headless Chromium: a question typed, tokens that stream, chunks shaded, a silent console."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from refrag_core import inspector
from refrag_core.runtime import AskOptions, Runtime
from tests.browser import NO_BROWSER, find_browser
from tests.command_line import call
from tests.served import Brake, Running, served_with_brakes
from tests.small_index import SmallIndex

QUESTION = "Which river is the capital of the northern island?"
POSITIONS = 512


@pytest.fixture(scope="module")
def brakes() -> list[Brake]:
    return []


@pytest.fixture(scope="module")
def server(runtime: Runtime, brakes: list[Brake]) -> Iterator[Running]:
    with served_with_brakes(runtime, brakes, slots=2, max_positions=POSITIONS, allow_untrained=True) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = find_browser()
    if found is None:
        pytest.skip(NO_BROWSER)
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=flags)
        yield browser
        browser.close()


class Visit:
    """A page, what it said on its console, and what it asked for."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.console: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.console.append(message.text))
        page.on("pageerror", lambda error: self.console.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def cards(self) -> Any:
        """The answers' cards."""
        return self.page.locator("section.answer")


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    with browser.new_context(viewport={"width": 1200, "height": 900}) as context:
        yield Visit(context.new_page())


@pytest.fixture(scope="module")
def answer(runtime: Runtime) -> Any:
    options = AskOptions(top_k=3, policy="perplexity", expansion_fraction=0.4, max_new_tokens=12, explain=True)
    return runtime.ask(QUESTION, options)


def screenshot(page: Page, name: str) -> None:
    """Kept where REFRAG_SCREENSHOTS says, to be looked at."""
    if folder := os.environ.get("REFRAG_SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


SHIFTS = """
window.shifts = [];
new PerformanceObserver((list) => window.shifts.push(...list.getEntries().map((entry) => entry.value)))
  .observe({ type: "layout-shift", buffered: true });
"""


def shades(card: Any) -> list[bool]:
    """Of each chunk in a card, whether it is shown as expanded."""
    found = card.locator("p.chunks .chunk").evaluate_all("all => all.map(one => one.className)")
    assert set(found) <= {"chunk expanded", "chunk compressed"}
    return [name == "chunk expanded" for name in found]


def test_a_question_is_typed_and_its_answer_streams(
    visit: Visit, server: Running, brakes: list[Brake], answer: Any
) -> None:
    page, brake = visit.page, brakes[-1]
    page.add_init_script(SHIFTS)
    page.goto(server.url)
    expect(page.locator("#about")).to_contain_text("generation 2")
    expect(page.locator("#question")).to_be_focused()
    page.locator("#settings-a select").select_option("perplexity")
    page.locator("#settings-a input").fill("0.4")
    page.locator("#top-k").fill("3")
    page.locator("#max-tokens").fill("12")
    brake.on()
    page.locator("#question").press_sequentially(QUESTION)
    page.keyboard.press("Enter")
    card = visit.cards().first
    expect(card.locator("p.chunks")).to_have_count(3)  # the passages are there before the answer
    expect(card.locator(".text")).not_to_be_empty()  # and its first token before the second
    partial = card.locator(".text").text_content()
    brake.off()
    expect(card.locator(".status")).to_contain_text("tokens")
    text = card.locator(".text").text_content()
    assert (text.strip(), text.startswith(partial), len(partial) < len(text)) == (answer.answer, True, True)
    expanded = [chunk.expanded for passage in answer.passages for chunk in passage.chunks]
    assert shades(card) == expanded
    assert {True, False} == set(expanded)
    assert card.locator("p.chunks").all_text_contents() == ["".join(c.text for c in p.chunks) for p in answer.passages]
    facts = card.locator(".facts").text_content()
    stats = answer.stats
    saved = stats.context_tokens - round(stats.context_tokens / stats.compression)
    for shown in (f"Decoder positions{stats.decoder_positions}", f"Positions saved{saved}", f"{stats.num_expanded} of"):
        assert shown in facts
    assert "prefill" in card.locator(".bar").get_attribute("aria-label")
    assert f"1. {answer.passages[0].doc_id}" in card.locator("h3").first.text_content()
    scores = [f"{chunk.score:.2f}" for chunk in answer.passages[0].chunks]
    assert card.locator("table").first.locator("td:nth-child(4)").all_text_contents() == scores
    screenshot(page, "answer")
    assert sum(page.evaluate("window.shifts")) == 0
    assert visit.console == []
    assert {httpx.URL(url).host for url in visit.requests} == {"127.0.0.1"}


def test_two_settings_and_the_full_context_stand_beside_each_other(visit: Visit, server: Running) -> None:
    page = visit.page
    page.goto(server.url)
    expect(page.locator("#about")).to_contain_text("generation 2")
    page.locator("#settings-a select").select_option("learned")
    page.locator("#settings-a input").fill("0.2")
    page.get_by_label("Setting B, beside").check()
    page.locator("#settings-b select").select_option("none")
    page.get_by_label("Full context, beside").check()
    page.locator("#max-tokens").fill("8")
    page.locator("#question").fill(QUESTION)
    page.get_by_role("button", name="Ask").click()
    cards = visit.cards()
    expect(cards).to_have_count(3)
    expect(cards.nth(2).locator(".status")).to_contain_text("tokens")
    assert cards.locator("h2").all_text_contents()[1].startswith("none")
    assert [sorted(set(shades(cards.nth(at)))) for at in range(3)] == [[False, True], [False], [True]]
    tops = [cards.nth(at).bounding_box()["y"] for at in range(3)]
    assert len(set(tops)) == 1  # side by side
    screenshot(page, "compared")
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    screenshot(page, "narrow")
    assert visit.console == []


def test_it_stops_by_escape_and_says_what_is_wrong(visit: Visit, server: Running, brakes: list[Brake]) -> None:
    page, brake = visit.page, brakes[-1]
    page.goto(server.url)
    expect(page.locator("#about")).to_contain_text("generation 2")
    brake.on()
    page.locator("#max-tokens").fill("60")
    page.locator("#question").fill(QUESTION)
    page.keyboard.press("Enter")
    expect(visit.cards().locator(".text")).not_to_be_empty()
    page.keyboard.press("Escape")
    expect(visit.cards().locator(".status")).to_have_text("stopped")
    server.until(lambda: server.answering.in_flight == 0)
    brake.off()
    page.locator("#filter").fill("nothing = 1")
    page.get_by_role("button", name="Ask").click()
    expect(visit.cards().locator(".text.error")).to_contain_text("nothing")
    assert [text for text in visit.console if "400" not in text] == []  # the browser itself notes a failed request


def contrast(page: Page, selector: str) -> float:
    """Of an element's text against what is behind it (WCAG 2)."""
    colors = page.locator(selector).first.evaluate(
        """element => {
          const color = getComputedStyle(element).color;
          let behind = element, found = "";
          do { found = getComputedStyle(behind).backgroundColor; behind = behind.parentElement; }
          while (behind && found === "rgba(0, 0, 0, 0)");
          return [color, found];
        }"""
    )
    lights = sorted(luminance(*map(int, re.findall(r"\d+", color)[:3])) for color in colors)
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def luminance(*rgb: int) -> float:
    linear = [(c / 255 / 12.92) if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_of_one_answer_stands_alone(browser: Browser, answer: Any, tmp_path: Path, scheme: Any) -> None:
    path = tmp_path / "out.html"
    inspector.write_answer(answer, path)
    with browser.new_context(offline=True, color_scheme=scheme, viewport={"width": 900, "height": 900}) as context:
        visit = Visit(context.new_page())
        visit.page.goto(path.as_uri())
        card = visit.cards().first
        assert card.locator(".text").text_content() == answer.answer
        assert shades(card) == [chunk.expanded for passage in answer.passages for chunk in passage.chunks]
        for selector in (".chunk.compressed", ".chunk.expanded", ".soft", ".note", "h1", "dt", ".steps li", "summary"):
            assert contrast(visit.page, selector) >= 4.5, (scheme, selector)
        screenshot(visit.page, f"alone-{scheme}")
        assert (visit.console, visit.requests) == ([], [path.as_uri()])


def test_what_stands_in_an_index_is_never_markup(answer: Any) -> None:
    evil = replace(answer, answer="</script><script>alert(1)</script>", question="<img src=x onerror=alert(1)>")
    page = inspector.answer_page(evil)
    assert len(re.findall("<script", page)) == 2
    assert len(re.findall("</script", page)) == 2
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page)[1])  # type: ignore[index]
    assert (data["answer"], data["question"]) == (evil.answer, evil.question)


def test_numbers_that_json_has_not_become_null(answer: Any) -> None:
    odd = replace(answer.passages[0], metadata={"weight": float("nan"), "list": [float("inf"), 1.5]})
    assert '"metadata": {"weight": null, "list": [null, 1.5]}' in inspector.answer_page(
        replace(answer, passages=(odd,))
    )


def test_the_command_writes_it(library: SmallIndex, own_cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "answer.html"
    done = call("ask", library.path, QUESTION, "--top-k", 2, "--max-new-tokens", 3, "--html", path, "--json")
    assert done.code == 0, done.err
    page = path.read_text()
    assert done.json["passages"][0]["doc_id"] in page
    assert [found.name for found in tmp_path.glob("answer*")] == [path.name]


def test_the_server_allows_its_own_files_alone(server: Running) -> None:
    with httpx.Client(base_url=server.url) as client:
        for path, kind in (("/", "text/html"), ("/inspector.css", "text/css"), ("/inspector.js", "text/javascript")):
            found = client.get(path)
            assert found.headers["content-type"].startswith(kind)
            assert "default-src 'none'" in found.headers["content-security-policy"]
        assert set(re.findall(r'(?:src|href)="([^"#]+)"', client.get("/").text)) == {
            "data:,",
            "inspector.css",
            "inspector.js",
        }
