"""The page of the server in Chromium: a person drops pictures, asks, reads, stops, copies and begins anew."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from tests.serving.conftest import ask_about
from tests.support import ROOT
from tests.support.browser import CHROMIUM, browsing

pytestmark = [
    pytest.mark.matrix,
    pytest.mark.skipif(CHROMIUM is None, reason="neither chromium nor google-chrome is installed"),
]

PICTURES = ROOT / "examples" / "images"
MIDDLE = (200, 200)
ANSWERED = "document.querySelectorAll('article.assistant .cost').length === {}"
WORDS = "[...document.querySelectorAll('article.assistant > p')].map((x) => x.textContent)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture
def page(browser, server):
    browser.resize(1600, 900, dark=False)
    browser.open(f"{server.url}/")
    browser.complaints.clear()
    yield browser
    assert browser.complaints == []


@pytest.fixture
def endless(server, monkeypatch):
    """Let no answer end by itself."""
    monkeypatch.setattr(server.service.engine, "_stop_ids", set())
    monkeypatch.setattr(server.service.engine.model.generation_config, "eos_token_id", None)


def drop(page, *names):
    page.drop([PICTURES / name for name in names], MIDDLE)
    page.wait(f"document.querySelectorAll('#pictures li').length === {len(names)}")


def ask(page, text, number=1):
    page.type(text)
    page.press("Enter")
    page.wait(ANSWERED.format(number))


def answer(server, *messages):
    return server.chat(*messages)[1]["choices"][0]["message"]["content"].strip()


def test_a_turn_shows_pictures_words_layout_and_cost(page, server):
    drop(page, "two.png")
    page.find(f"seen = new Set(); new MutationObserver(() => seen.add({WORDS}.join())).observe($('turns'), "
              "{subtree: true, childList: true, characterData: true}); 0")  # fmt: skip
    ask(page, "Describe the image.")
    said = page.find(WORDS)[0]
    assert said == answer(server, ask_about("two.png"))
    growing = page.find("[...seen]")
    assert len(growing) > 4 and all(said.startswith(words) for words in growing)  # it came word by word
    assert page.find("document.querySelector('article.user img').alt") == "two.png"
    assert page.find("document.querySelector('.layout').getAttribute('aria-label')").startswith(
        "The prompt: pictures (1)"
    )
    assert page.find("document.querySelectorAll('.layout rect').length") == 2
    cost = page.find("document.querySelector('.cost').innerText")
    assert "positions (1 of pictures)" in cost and "first word after" in cost


def test_a_second_turn_sees_the_first_and_a_new_chat_does_not(page, server):
    drop(page, "two.png")
    ask(page, "Describe the image.")
    ask(page, "How many things are there?", 2)
    first, second = page.find(WORDS)
    turns = [ask_about("two.png"), {"role": "assistant", "content": f" {first}"}]
    assert second == answer(server, *turns, {"role": "user", "content": "How many things are there?"})
    page.find("$('new').click()")
    assert page.find("document.querySelectorAll('article').length") == 0
    assert page.find("$('hint').isConnected")
    ask(page, "Hello.")
    assert page.find("messages.length") == 2


def test_an_answer_can_be_stopped_and_the_next_one_works(page, server, endless):
    page.find("$('most').value = 4000; 0")
    page.type("Go on.")
    page.press("Enter")
    page.wait(f"running && {WORDS}.join().length > 20")
    assert page.find("$('stop').hidden") is False and page.find("$('send').disabled") is True
    page.press("Escape")
    page.wait(ANSWERED.format(1))
    assert page.find("$('stop').hidden") is True
    server.wait_until(lambda: not server.service.engine.load.running)
    page.find("$('most').value = 4; 0")
    ask(page, "Hello.", 2)
    assert page.find("document.activeElement.id") == "text"


def test_a_new_chat_while_an_answer_is_written_forgets_it(page, endless):
    page.find("$('most').value = 4000; 0")
    page.type("Go on.")
    page.press("Enter")
    page.wait(f"running && {WORDS}.join().length > 20")
    page.find("$('new').click()")
    page.wait("running === null")
    assert page.find("messages.length") == 0
    page.find("$('most').value = 4; 0")
    ask(page, "Hello.")
    assert page.find("messages.map((x) => x.role)") == ["user", "assistant"]


@pytest.mark.parametrize("secure", [True, False])
def test_an_answer_is_copied(page, secure):
    drop(page, "two.png")
    ask(page, "Describe the image.")
    said = page.find(WORDS)[0]
    page.find("clipboard = navigator.clipboard; clipboard.writeText('before')")
    if not secure:  # as on a page of another machine
        page.find("Object.defineProperty(navigator, 'clipboard', {value: undefined}); 0")
    page.find("document.querySelector('.cost button').focus()")
    page.press("Enter")
    page.wait("document.querySelector('.cost button').textContent === 'Copied'")
    assert page.find("clipboard.readText()") == said


def test_everything_is_reached_by_the_keyboard_and_has_a_name(page):
    drop(page, "two.png")
    ask(page, "Describe the image.")
    drop(page, "three.png")
    controls = page.controls()
    assert all(name.strip() for _, name in controls), controls
    names = {name.strip() for _, name in controls}
    assert {"New chat", "Copy", "Remove three.png", "Your message", "Add pictures", "Send"} <= names
    reached = set()
    for _ in range(len(controls) + 2):
        page.press("Tab")
        reached.add(page.find("document.activeElement.id || document.activeElement.textContent"))
    assert {"new", "text", "file", "most", "temperature", "send", "Copy", "×"} <= reached
    page.find("document.querySelector('#pictures button').focus()")
    page.press("Enter")
    assert page.find("pictures.length") == 0 and page.find("document.activeElement.id") == "text"


def test_what_is_wrong_is_said(page, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page.drop([tmp_path / "notes.txt"], MIDDLE)
    page.wait("$('status').textContent === 'Neither a picture nor a clip: notes.txt'")
    page.drop([tmp_path / "broken.png"], MIDDLE)
    page.wait("document.querySelectorAll('#pictures li').length === 1")
    page.type("What is it?")
    page.press("Enter")
    page.wait("document.querySelector('[role=alert]')")
    assert "is not an image" in page.find("document.querySelector('[role=alert]').textContent")
    assert page.find("[$('text').value, pictures.length, messages.length]") == ["What is it?", 1, 0]  # to try again
    page.complaints[:] = [x for x in page.complaints if "status of 400" not in x]


def colours(page):
    return Image.open(io.BytesIO(page.picture())).convert("L")


@pytest.mark.parametrize("width", [360, 1600])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_and_is_readable(page, width, dark):
    page.resize(width, 740, dark=dark)
    drop(page, "two.png", "astronaut.jpg")
    ask(page, "Describe the image, and this word as well: " + "long" * 60)
    drop(page, "two.png")
    assert page.find("document.documentElement.scrollWidth") == width
    inside = "r.left >= 0 && r.right <= innerWidth && r.bottom <= innerHeight && r.width > 0"
    assert page.find(f"['new', 'text', 'most', 'temperature', 'send'].every((id) => "
                     f"{{ const r = $(id).getBoundingClientRect(); return {inside}; }})")  # fmt: skip
    shown = colours(page)
    corner = shown.getpixel((2, 2))
    assert (corner < 60) == dark and (corner > 200) != dark
    assert shown.getextrema()[1] - shown.getextrema()[0] > 180
