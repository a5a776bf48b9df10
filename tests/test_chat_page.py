"""The web page in Chromium: ask, stream, stop, retry, compare, on a desk and on a phone."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect

from fitness_dpo.bot import find, load, untuned
from fitness_dpo.conversation import Conversation
from fitness_dpo.inference import generate
from tests.conftest import served
from tests.test_infer import QUESTIONS, compose_infer

pytestmark = pytest.mark.browser
PICTURES = os.environ.get("FITNESS_DPO_PICTURES")
"""A folder for screenshots; none are taken where it is not set."""
MARKUP = "Why <b>squat</b> &lt; ![x](http://example.org/x.png) **now** <script>document.title='owned'</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def address(talker: Path) -> Iterator[str]:
    with served("chat", f"run={talker}", "sampling.max_new_tokens=12") as address:
        yield address


@pytest.fixture(scope="module")
def slow_address(talker: Path) -> Iterator[str]:
    """The page of a bot whose answers take long enough to be stopped."""
    with served("chat", f"run={talker}", "sampling.max_new_tokens=1700", "model.max_length_tokens=2048") as address:
        yield address


@pytest.fixture(scope="module")
def expected(talker: Path) -> Callable[..., str]:
    """What the terminal answers."""
    config = compose_infer(talker)
    bot = find(config)
    policy = load(bot, merged=False)

    def answer(question: str, *, base: bool = False) -> str:
        prompt = Conversation(policy, bot, config.sampling).prompt(question)[0]
        if base:
            with untuned(policy.model):
                return generate(policy, [prompt], config.sampling)[0]
        return generate(policy, [prompt], config.sampling)[0]

    return answer


@contextmanager
def opened(browser: Browser, address: str, *, width: int = 1200, height: int = 900) -> Iterator[Page]:
    """The page. It must ask for nothing from outside, and log no error."""
    outside: list[str] = []

    def refuse(route: Route) -> None:
        outside.append(route.request.url)
        route.abort()

    page = browser.new_page(viewport={"width": width, "height": height})
    page.route(lambda url: not url.startswith((address, "data:", "blob:")), refuse)
    page.on("pageerror", lambda error: outside.append(str(error)))
    page.goto(address)
    expect(page.locator("#question textarea")).to_be_visible(timeout=60_000)
    yield page
    page.close()
    assert not outside


def ask(page: Page, question: str) -> None:
    page.locator("#question textarea").fill(question)
    page.get_by_role("button", name="Ask", exact=True).click()


def answers(page: Page, chat: str = "tuned") -> Locator:
    return page.locator(f"#{chat} [data-testid=bot] .message-content")


def picture(page: Page, name: str) -> None:
    if PICTURES:
        page.screenshot(path=f"{PICTURES}/{name}.png", full_page=True)


def start_anew(page: Page) -> None:
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("[data-testid=user]")).to_have_count(0, timeout=30_000)


def test_the_page_gives_the_terminals_answers_as_text(
    browser: Browser, address: str, expected: Callable[..., str]
) -> None:
    with opened(browser, address) as page:
        expect(page.get_by_text("No medical advice.")).to_be_visible()
        for question in [*QUESTIONS, MARKUP]:
            ask(page, question)
            expect(answers(page)).to_have_text([expected(question)], timeout=30_000)
            assert page.locator("#tuned [data-testid=user]").inner_text().strip() == question
            assert page.locator("#tuned .message-content :is(b, strong, img, script)").count() == 0
            picture(page, "asked")
            start_anew(page)
        assert page.title() == "Fitness bot"


def test_base_and_tuned_side_by_side_and_again(browser: Browser, address: str, expected: Callable[..., str]) -> None:
    with opened(browser, address) as page:
        page.locator("#compare input").check()
        expect(page.locator("#untuned")).to_be_visible(timeout=30_000)
        for step in range(2):
            if step:
                page.get_by_role("button", name="Retry").click()
            else:
                ask(page, "How?")
            expect(answers(page)).to_have_text([expected("How?")], timeout=30_000)
            expect(answers(page, "untuned")).to_have_text([expected("How?", base=True)], timeout=30_000)
        picture(page, "compared")
        ask(page, "Why?")
        expect(answers(page)).to_have_count(2, timeout=30_000)
        expect(answers(page, "untuned")).to_have_count(2, timeout=30_000)


def test_stop_ends_an_answer_and_the_next_one_begins(browser: Browser, slow_address: str) -> None:
    with opened(browser, slow_address) as page:
        ask(page, "Go")
        expect(answers(page)).not_to_have_text("", timeout=30_000)
        seen: set[int] = set()
        while len(seen) < 4:  # it comes in pieces
            page.wait_for_timeout(20)
            seen.add(len(answers(page).inner_text()))
        page.get_by_role("button", name="Stop").click()
        page.wait_for_timeout(500)
        stopped = answers(page).inner_text()
        page.wait_for_timeout(1500)
        assert answers(page).inner_text() == stopped
        assert 0 < len(stopped) < 1700
        picture(page, "stopped")
        start_anew(page)
        ask(page, "Again")
        expect(answers(page)).not_to_have_text("", timeout=30_000)
        page.get_by_role("button", name="Stop").click()


def test_what_cannot_be_asked_is_said(browser: Browser, address: str) -> None:
    with opened(browser, address) as page:
        ask(page, " ")
        expect(page.get_by_text("the question is empty; ask something")).to_be_visible(timeout=30_000)
        page.locator("#question textarea").fill("x" * 100_000)
        page.locator("#question textarea").press("Enter")
        expect(page.get_by_text("leave no room for sampling.max_new_tokens=12")).to_be_visible(timeout=30_000)
        picture(page, "refused")
        assert answers(page).count() == 0


def test_on_a_phone(browser: Browser, address: str) -> None:
    with opened(browser, address, width=390, height=844) as page:
        page.locator("#compare input").check()
        expect(page.locator("#untuned")).to_be_visible(timeout=30_000)
        page.get_by_text("Example questions").click()
        page.get_by_text("What rep range builds muscle?").click()
        expect(page.locator("#question textarea")).to_have_value("What rep range builds muscle?", timeout=30_000)
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(answers(page, "untuned")).not_to_have_text("", timeout=30_000)
        picture(page, "phone")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        for name in ("Ask", "Stop", "Retry"):
            box = page.get_by_role("button", name=name, exact=True).bounding_box()
            assert box is not None
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 390
