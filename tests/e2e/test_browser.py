"""The page in a headless Chromium, over the two real services. Screenshots are kept under the test's folder."""

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, Route, expect

from tests.e2e.running import Up

pytestmark = [pytest.mark.slow, pytest.mark.browser]
QUESTION = "How many people live in Paris?"
ANSWER_WITHIN_MS = 30_000
WATCH_POLICY = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => window.violations.push(event.violatedDirective));
"""
WATCH_ANSWER = """
window.seen = [];
new MutationObserver(() => {
    const text = document.querySelector("#result h2")?.textContent;
    if (text !== undefined && text !== window.seen.at(-1)) window.seen.push(text);
}).observe(document.getElementById("result"), { childList: true, subtree: true, characterData: true });
"""


@dataclass
class Opened:
    """A page and what it complained about."""

    page: Page
    shots: Path
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def shot(self, name: str) -> None:
        self.page.wait_for_timeout(400)  # the bars have grown
        self.page.screenshot(path=self.shots / f"{name}.png", full_page=True)

    def ask(self, question: str) -> None:
        """As a person without a mouse does."""
        self.page.keyboard.press("/")
        self.page.keyboard.type(question)
        self.page.keyboard.press("Enter")

    def wait_for_answer(self) -> None:
        self.page.locator('#result[aria-busy="false"] .answer').wait_for(timeout=ANSWER_WITHIN_MS)


@pytest.fixture
def look() -> dict[str, Any]:
    return {"viewport": {"width": 1100, "height": 900}}


@pytest.fixture
def opened(chromium: Browser, up: Up, tmp_path: Path, look: dict[str, Any]) -> Iterator[Opened]:
    context = chromium.new_context(**look)
    page = context.new_page()
    opened = Opened(page, tmp_path)
    page.on("console", lambda message: opened.complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: opened.complaints.append(str(error)))
    page.on("request", lambda request: opened.requests.append(request.url))
    page.add_init_script(WATCH_POLICY)
    page.goto(f"{up.url}/")
    page.locator("body").click(position={"x": 2, "y": 300})  # nothing has the focus
    yield opened
    violations = page.evaluate("window.violations")
    context.close()
    assert violations == []
    assert all(url.startswith(up.url) for url in opened.requests), "something was loaded from elsewhere"


def shares(opened: Opened) -> list[float]:
    cards = opened.page.locator(".passage").all()
    return [float(card.get_attribute("data-posterior") or "nan") for card in cards]


def answer_with(page: Page, *events: tuple[str, Any]) -> None:
    """From now on the page's questions are answered with these."""
    body = "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in events)
    page.route("**/v1/answer", lambda route: route.fulfill(body=body, content_type="text/event-stream"))


@pytest.mark.parametrize(
    ("name", "look"),
    [
        ("light", {"color_scheme": "light", "viewport": {"width": 1100, "height": 900}}),
        ("dark", {"color_scheme": "dark", "viewport": {"width": 1100, "height": 900}}),
        ("narrow", {"color_scheme": "light", "viewport": {"width": 360, "height": 740}}),
    ],
    ids=["light", "dark", "narrow"],
)
def test_a_question_typed_on_the_keyboard_shows_its_answer_and_the_evidence(
    opened: Opened, name: str, paris: str
) -> None:
    opened.ask(QUESTION)
    opened.wait_for_answer()
    page = opened.page
    opened.shot(name)
    expect(page.locator(".answer h2")).to_have_text(paris)
    expect(page.locator("#announcement")).to_have_text(f"Answer: {paris}")
    best = page.locator(".passage.best")
    expect(best).to_have_count(1)
    expect(best.locator("h4")).to_contain_text("Paris")
    expect(best.locator("mark").first).to_have_text(paris)
    assert sum(shares(opened)) == pytest.approx(1, abs=1e-3)
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= page.evaluate("innerWidth"), "the page scrolls sideways"
    assert opened.complaints == []


def test_bars_are_as_long_as_the_shares_that_stand_beside_them(opened: Opened) -> None:
    opened.ask(QUESTION)
    opened.wait_for_answer()
    opened.page.wait_for_timeout(600)
    for card, share in zip(opened.page.locator(".passage").all(), shares(opened), strict=True):
        track, bar = (card.locator(css).bounding_box() for css in (".bar.posterior", ".bar.posterior > span"))
        assert track is not None
        assert (bar["width"] if bar else 0) / track["width"] == pytest.approx(share, abs=0.01)


def test_several_answers_can_be_compared_with_their_evidence(opened: Opened) -> None:
    page = opened.page
    page.get_by_text("Options").click()
    page.get_by_label("Answers").fill("3")
    page.get_by_label("Strategy").select_option("sequence")
    page.get_by_label("Passages").fill("4")
    page.keyboard.press("Tab")
    expect(page.get_by_label("Beams")).to_have_value("3")
    page.get_by_label("Ask a question").fill(QUESTION)
    page.get_by_role("button", name="Ask").click()
    opened.wait_for_answer()
    expect(page.locator(".passage")).to_have_count(4)
    radios = page.get_by_role("radio")
    assert radios.count() >= 2
    first = page.locator(".answer h2").inner_text()
    radios.first.focus()
    page.keyboard.press("ArrowDown")
    expect(page.locator(".answer h2")).not_to_have_text(first)
    assert sum(shares(opened)) == pytest.approx(1, abs=1e-3)
    opened.shot("answers")


def test_an_example_asks_itself(opened: Opened, paris: str) -> None:
    opened.page.get_by_role("button", name=QUESTION).click()
    opened.wait_for_answer()
    expect(opened.page.locator(".answer h2")).to_have_text(paris)
    expect(opened.page.get_by_label("Ask a question")).to_have_value(QUESTION)


def test_below_the_least_probability_it_says_that_it_does_not_know(opened: Opened) -> None:
    page = opened.page
    page.get_by_text("Options").click()
    page.get_by_label("Least probability").press("End")
    opened.ask("How many people live in Narnia?")
    opened.wait_for_answer()
    expect(page.locator(".answer h2")).to_have_text("I do not know.")
    expect(page.locator(".passage").first).to_be_visible()
    opened.shot("unknown")


def test_a_refused_option_is_explained_where_it_stands(opened: Opened) -> None:
    page = opened.page
    page.get_by_text("Options").click()
    page.get_by_label("Passages").fill("100000")
    opened.ask(QUESTION)
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("n_docs", timeout=ANSWER_WITHIN_MS)
    expect(alert).to_contain_text("HTTP 422")
    expect(alert).to_contain_text("request ")
    opened.shot("refused")


def test_a_service_that_has_gone_is_reported_and_can_be_asked_again(opened: Opened, paris: str) -> None:
    page = opened.page
    page.route("**/v1/answer", lambda route: route.abort())
    opened.ask(QUESTION)
    expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
    opened.shot("unreachable")
    page.unroute("**/v1/answer")
    page.get_by_role("button", name="Try again").click()
    opened.wait_for_answer()
    expect(page.locator(".answer h2")).to_have_text(paris)
    expect(page.get_by_role("alert")).to_be_empty()


def test_a_question_in_flight_can_be_stopped(opened: Opened) -> None:
    page = opened.page
    unanswered: list[Route] = []
    page.route("**/v1/answer", lambda route: unanswered.append(route))  # noqa: PLW0108  (it sets an attribute on it)
    opened.ask(QUESTION)
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_visible()
    expect(page.get_by_role("alert")).to_be_empty()
    assert len(unanswered) == 1
    unanswered[0].abort()


def test_the_answer_appears_as_it_is_written(opened: Opened, paris: str) -> None:
    opened.page.evaluate(WATCH_ANSWER)
    opened.ask(QUESTION)
    opened.wait_for_answer()
    seen = opened.page.evaluate("window.seen")
    written = [text for text in seen if text]
    assert seen[0] == "", "the passages were there before the answer"
    assert len(written) >= 2
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(written))
    assert written[-1] == paris


def test_what_goes_wrong_while_the_answer_is_written_is_reported(opened: Opened) -> None:
    page = opened.page
    begun = [("documents", {"documents": []}), ("token", {"text": "half an ans"})]
    error = {"type": "timeout", "code": "deadline_exceeded", "message": "It took too long.", "retryable": True}
    answer_with(page, *begun, ("error", {"error": {**error, "param": None, "request_id": "abc"}}))
    opened.ask(QUESTION)
    expect(page.get_by_role("alert")).to_contain_text("It took too long.")
    expect(page.get_by_role("alert")).to_contain_text("request abc")
    expect(page.locator(".answer")).to_have_count(0)
    page.unroute("**/v1/answer")
    answer_with(page, *begun)
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("alert")).to_contain_text("broke off")


def test_every_token_shows_where_it_came_from(opened: Opened, up: Up) -> None:
    page = opened.page
    opened.ask(QUESTION)
    opened.wait_for_answer()
    response = httpx.post(f"{up.url}/v1/answer", json={"question": QUESTION, "provenance": "token"}, timeout=60)
    (answer,) = response.json()["results"][0]["answers"]
    tokens = page.get_by_role("toolbar", name="Tokens of the answer").get_by_role("button")
    expect(tokens).to_have_count(len(answer["tokens"]))
    assert len(answer["tokens"]) >= 2
    whole = pytest.approx(answer["doc_posterior"], abs=1e-4)
    assert shares(opened) == whole

    tokens.first.focus()
    for token in answer["tokens"]:
        focused = page.locator(".token:focus")
        expect(focused).to_have_text(token["text"], use_inner_text=False)
        assert shares(opened) == pytest.approx(token["doc_posterior"], abs=1e-4)
        share = math.exp(token["log_prob"])
        expect(page.locator("[data-slot=token]")).to_contain_text(
            "> 99.9 %" if share > 0.999 else f"probability of {100 * share:.1f} %"
        )
        page.keyboard.press("ArrowRight")
    opened.shot("token")
    page.keyboard.press("Home")
    assert shares(opened) == pytest.approx(answer["tokens"][0]["doc_posterior"], abs=1e-4)
    page.keyboard.press("Escape")
    assert shares(opened) == whole

    tokens.nth(1).hover()
    assert shares(opened) == pytest.approx(answer["tokens"][1]["doc_posterior"], abs=1e-4)
    page.mouse.move(0, 0)
    assert shares(opened) == whole


def test_the_address_holds_the_question(opened: Opened, up: Up, paris: str) -> None:
    opened.ask(QUESTION)
    opened.wait_for_answer()
    opened.page.reload()
    opened.wait_for_answer()
    expect(opened.page.locator(".answer h2")).to_have_text(paris)


def test_passages_are_shown_as_text_whatever_they_hold(opened: Opened) -> None:
    hostile = "<img src=x onerror=alert(1)><b>bold</b>"
    document = {"id": 1, "title": hostile, "text": hostile, "score": 1, "prior": 1, "truncated": True}
    token = {"text": hostile, "log_prob": 0, "doc_posterior": [1]}
    answer = {"text": hostile, "log_prob": 0, "probability": 1, "doc_posterior": [1], "tokens": [token]}
    body = {
        "model": "m",
        "strategy": "token",
        "results": [
            {"question": hostile, "answers": [answer], "abstained": False, "documents": [document]},
        ],
        "index": None,
        "timings_ms": {hostile: 1},
    }
    draft = [("documents", {"documents": [document]}), ("token", {"text": hostile})]
    answer_with(opened.page, *draft, ("answer", body))
    opened.ask("anything")
    opened.wait_for_answer()
    expect(opened.page.locator(".answer h2")).to_have_text(hostile)
    expect(opened.page.locator("#result img, #result b")).to_have_count(0)


def test_the_button_switches_between_light_and_dark(opened: Opened) -> None:
    page = opened.page
    ground = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(ground)
    page.get_by_role("button", name="Switch between light and dark").click()
    after = page.evaluate(ground)
    assert after != before
    page.reload()
    assert page.evaluate(ground) == after
