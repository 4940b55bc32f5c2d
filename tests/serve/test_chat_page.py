"""The page of the server in headless Chromium, used by the keyboard."""

import json
import re

import pytest

from ..programs.environments import install_chromium
from .conftest import LETTERS, running, write_tiny

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.slow

MARKDOWN = """# Rivers of *France*

The **Loire** has `1,012 km`, see [the list](https://example.org/a) or [bad](javascript:alert(1)).

3. Loire
4. Seine
   - from Burgundy

```python
length("<b>")
```

| river | km |
|---|---|
| Loire | 1012 |

> of *two*

<img src=x onerror=alert(1)> & 2 * 3 * 4, a_b_c
"""


@pytest.fixture(scope="module")
def browser():
    chromium = install_chromium()
    if chromium is None:
        pytest.skip("chromium is not installed; PASTKEY_INSTALL=1 installs Debian's")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser):
    with browser.new_context(viewport={"width": 390, "height": 800}, color_scheme="dark") as context:
        context.set_default_timeout(60_000)
        yield context.new_page()


def opened(page, served):
    page.goto(f"http://127.0.0.1:{served.port}/")
    page.locator("#ask").wait_for()


def ask(page, text):
    """Types a message, and waits for the whole answer."""
    count = page.locator("article").count()
    page.keyboard.type(text)
    page.keyboard.press("Enter")
    page.locator(f"#log[aria-busy=false] article:nth-of-type({count + 2})").wait_for()


def texts(page):
    return page.locator("article .content").all_text_contents()


def answers(page, text, tokens=60):
    """Answers the next questions instead of the model."""
    pieces = [{"choices": [{"delta": {"content": text[at : at + 7]}}]} for at in range(0, len(text), 7)]
    last = [
        {"choices": [{"delta": {}, "finish_reason": "stop"}]},
        {"choices": [], "usage": {"completion_tokens": tokens}},
    ]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in [*pieces, *last]) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))


def test_a_conversation_by_the_keyboard_is_that_of_the_model(page, served):
    chat = served.model.chat("set")
    expected = [chat.ask(text, max_new_tokens=8).text for text in ("hi", "so")]
    opened(page, served)
    assert page.locator("#name").text_content() == "tiny"
    for key in ("Tab", "Tab", "Enter", "Tab"):  # send, settings, its fields
        page.keyboard.press(key)
    page.keyboard.type("set")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.type("8")
    page.locator("#text").focus()
    for text in ("hi", "so"):
        ask(page, text)
    quoted = [text.lstrip(">") for text in expected]  # this model begins with Markdown's mark of a quotation
    assert texts(page) == ["hi", quoted[0], "so", quoted[1]]
    assert re.fullmatch(r"8 tokens(, [\d.]+ per second)?, as many as allowed", page.locator("#speed").text_content())
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("document.activeElement.id") == "text"


def test_an_answer_is_stopped_tried_again_and_its_question_edited(page, served):
    opened(page, served)
    page.keyboard.type("hi")
    page.keyboard.press("Enter")
    page.locator(".assistant .content", has_text=re.compile("....")).wait_for()
    page.keyboard.press("Escape")
    page.locator("#speed", has_text=re.compile("stopped|allowed")).wait_for()
    assert texts(page)[0] == "hi"
    answers(page, "again")
    page.locator("button", has_text="Try again").press("Enter")
    page.locator(".content", has_text="again").wait_for()
    page.locator("button", has_text="Edit").press("Enter")
    assert page.locator("#text").input_value() == "hi"
    assert page.locator(".replaced").count() == 2
    page.keyboard.press("Escape")
    assert (page.locator("#text").input_value(), page.locator(".replaced").count()) == ("", 0)
    page.locator("button", has_text="Edit").press("Enter")
    page.keyboard.press("End")
    page.keyboard.type("s")
    answers(page, "for his")
    page.keyboard.press("Enter")
    page.locator(".content", has_text="for his").wait_for()
    assert texts(page) == ["his", "for his"]
    page.locator("#new").press("Enter")
    assert page.locator("article").count() == 0


def test_markdown_is_shown_and_html_of_the_model_is_text(page, served):
    errors = []
    page.on("pageerror", lambda error: errors.append(error))
    opened(page, served)
    answers(page, MARKDOWN)
    ask(page, "rivers")
    answer = page.locator(".assistant .content")
    found = {
        name: answer.locator(name).all_text_contents() for name in ("h3 em", "strong", "ol > li > ul > li", "pre", "td")
    }
    assert found == {
        "h3 em": ["France"], "strong": ["Loire"], "ol > li > ul > li": ["from Burgundy"], "pre": ['length("<b>")'],
        "td": ["Loire", "1012"],
    }  # fmt: skip
    assert answer.locator("ol").get_attribute("start") == "3"
    links = answer.locator("a")
    assert [links.get_attribute(name) for name in ("href", "rel")] == ["https://example.org/a", "noopener noreferrer"]
    assert answer.locator("> p").last.text_content() == "<img src=x onerror=alert(1)> & 2 * 3 * 4, a_b_c"
    assert (answer.locator("img, script, b").count(), links.count(), errors) == (0, 1, [])


def test_a_key_is_asked_for_and_a_question_that_fails_is_not_lost(page, bundle):
    with running(bundle, keys=("sesame",)) as served:
        page.goto(f"http://127.0.0.1:{served.port}/")
        page.locator("#unlock").wait_for()
        assert page.locator("#error").text_content() == ""
        for key in ("wrong", "sesame"):
            page.keyboard.type(key)
            page.keyboard.press("Enter")
            page.locator({"wrong": "#error:has-text('does not know this key')", "sesame": "#ask"}[key]).wait_for()
        assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
        page.keyboard.type("€")  # a character that this model's tokenizer lacks
        page.keyboard.press("Enter")
        page.locator("#error", has_text="€").wait_for()
        assert (page.locator("#text").input_value(), page.locator("article").count()) == ("€", 0)
        page.context.set_offline(True)
        page.keyboard.press("Enter")
        page.locator("#error", has_text="The server does not answer").wait_for()
        assert page.locator("#text").input_value() == "€"


def test_a_model_without_a_chat_template_continues_a_text(page, tmp_path):
    path = write_tiny(tmp_path / "plain", tokenizer_config={})
    with running(path, names=("plain",)) as served:
        opened(page, served)
        assert page.locator("#what").text_content() == "Text to continue"
        ask(page, "hi")
        expected = served.model.generate("hi", max_new_tokens=16).text
        assert texts(page) == ["hi", expected.lstrip(">")]
        assert set(expected) <= set(LETTERS)
