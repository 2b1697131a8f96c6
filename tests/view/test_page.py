"""The page in a real browser: clicks, keys, sliders, a phone's width, and no request to anywhere else."""

import io
import json
import shutil
import tempfile
import threading
from contextlib import contextmanager

import pytest
import torch
import uvicorn
from PIL import Image

from sagan_fast.commands.view import open_port
from sagan_fast.view.server import application
from sagan_fast.view.source import View

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


@contextmanager
def served(source):
    """Yield the address of the page of `source`."""
    with open_port(0) as taken:
        config = uvicorn.Config(application(View(source, torch.device("cpu"))), log_level="warning", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
        thread.start()
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """A copy of the tiny run, which tests let go on."""
    folder = tmp_path_factory.mktemp("page") / "run"
    shutil.copytree(tiny_run, folder)
    return folder


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started, tempfile.TemporaryDirectory() as profile:
        context = started.chromium.launch_persistent_context(
            profile, executable_path=CHROMIUM, headless=True, args=FLAGS, viewport={"width": 1280, "height": 900}
        )
        yield context
        context.close()


@pytest.fixture(scope="module")
def address(run):
    with served(run) as url:
        yield url


@pytest.fixture
def page(browser, address):
    """The page, loaded; at the end nothing was asked of another host, and no script failed."""
    asked, failed = [], []
    page = browser.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.on("console", lambda message: failed.append(message.text) if message.type == "error" else None)
    page.goto(address)
    page.wait_for_selector("#strip img")
    page.wait_for_function("() => document.getElementById('found').textContent")
    page.wait_for_selector("#curves-part svg")
    yield page
    page.close()
    assert failed == []
    assert asked and all(url.startswith((address, "data:")) for url in asked)


def changes(page, selector, what, act):
    """Do `act` and wait until the property `what` of `selector` is another; return the new one."""
    before = page.eval_on_selector(selector, f"element => element.{what}")
    act()
    page.wait_for_function(f"before => document.querySelector({json.dumps(selector)}).{what} !== before", arg=before)
    return page.eval_on_selector(selector, f"element => element.{what}")


def test_the_mouse(page):
    changes(page, "#map", "src", lambda: page.locator("#picture").click(position={"x": 20, "y": 30}))
    left = page.eval_on_selector("#dot", "dot => parseFloat(dot.style.left)")
    box = page.locator("#picture-image").bounding_box()
    assert abs(left / 100 * box["width"] - 20) <= box["width"] / 16, "the dot is in the cell that was clicked"
    changes(page, "#picture-image", "src", lambda: page.locator("#grid button").nth(3).click())
    changes(page, "#network", "value", lambda: page.select_option("#network", "d"))
    page.wait_for_function("() => document.getElementById('found').textContent.includes('score')")
    page.check("input[value=b]")
    changes(page, "#ends", "textContent", lambda: page.locator("#grid button").nth(5).click())
    assert "number 6" in page.text_content("#ends")


def test_the_keyboard_alone(page):
    page.focus("#picture")
    changes(page, "#map", "src", lambda: page.keyboard.press("ArrowLeft"))
    page.focus("input[value=a]")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.id") == "0.0.1"
    changes(page, "#picture-image", "src", lambda: page.keyboard.press("Enter"))
    page.focus("#share")
    changes(page, "#frame", "src", lambda: page.keyboard.press("ArrowRight"))
    page.focus("#truncation")
    changes(page, "#grid img", "src", lambda: page.keyboard.press("Home"))
    assert page.text_content("#truncation-value") == "0.1"
    page.focus("#seed")
    changes(page, "#grid img", "src", lambda: page.keyboard.press("ArrowUp"))
    reached = set()
    page.focus(".skip")
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    assert reached >= {"class", "seed", "truncation", "picture", "network", "file", "share", "when"}


def test_a_real_image_and_what_is_none(page):
    out = io.BytesIO()
    Image.effect_noise((60, 40), 90).convert("RGB").save(out, "JPEG")
    file = {"name": "dog.jpg", "mimeType": "image/jpeg", "buffer": out.getvalue()}
    text = changes(page, "#picture-caption", "textContent", lambda: page.set_input_files("#file", file))
    assert text.startswith("dog.jpg, 60 x 40 pixels, cropped") and page.input_value("#network") == "d"
    changes(page, "#found", "textContent", lambda: page.select_option("#real-class", "4"))
    caption = changes(page, "#picture-caption", "textContent", lambda: page.click("#back"))
    assert "seed 0" in caption


def test_a_phone(page):
    page.set_viewport_size({"width": 360, "height": 780})
    wide = page.evaluate("[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > 361"
                         " && !e.closest('.scroll')).map(e => e.tagName + e.id)")  # fmt: skip
    assert page.evaluate("document.documentElement.scrollWidth") <= 360 and wide == []
    assert page.eval_on_selector_all("#grid button", "all => Math.min(...all.map(b => b.offsetWidth))") >= 24


def test_curves_go_on_with_the_run(page, run):
    def go_on():
        with (run / "log.jsonl").open("a") as log:
            log.write('{"step": 9, "d_loss": 1.0, "g_loss": 0.5}\n')
        shutil.copy(run / "samples" / "0000002.png", run / "samples" / "0000009.png")

    changes(page, "#progress", "textContent", go_on)
    page.wait_for_function("() => document.querySelector('#curves-part .at').textContent === 'at step 9'")
    page.wait_for_function("() => document.getElementById('when-value').textContent === '9'")
