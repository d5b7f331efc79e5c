"""The chat page in a headless Chromium: what a person sees and does.

`pytest tests/device/serve/test_page.py`; the pictures in the docs come from `scripts/chat_screenshot.py`.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clouds import in_a_thread
from offline_folders import write_onnx_folder
from serving import Service, endless_model, serving, serving_source
from toy import STOP, ToyBackbone, toy_model
from toy_plugin import toy_plugin

from cotune.device.offline.model import OfflineSettings
from cotune.device.offline.runtimes import load_offline_model
from cotune.device.offline.writer import OfflineWriter
from cotune.device.reach import ReachConfig
from cotune.device.runtime import GenerationOptions
from cotune.device.serve.offline_source import OfflineSource
from cotune.device.serve.personal_source import PersonalSource
from cotune.device.serve.server import ServeConfig
from cotune.device.serve.wishes import OfflineOptions
from cotune.generation.reference import generate
from cotune.ledger import EgressLedger
from cotune.wire.transport import Connection
from cotune.wire.websocket import connect

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH"),
]
PHONE = {"width": 360, "height": 740}
PROMPT = "w5 w9 w30"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        launched = running.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def service() -> Iterator[Service[PersonalSource]]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def slow_service() -> Iterator[Service[PersonalSource]]:
    """About 60 ms a token."""
    with serving(model=endless_model(), rtt_ms=60, schedule="blocking", max_new_tokens=200) as running:
        yield running


@pytest.fixture
def open_page(browser: Any) -> Iterator[Any]:
    """Opens a page; at the end nothing may have been written to its console, and nothing asked of another place."""
    complaints: list[str] = []
    contexts: list[Any] = []

    def open_it(url: str, *, allow: str = "^$", **options: Any) -> Any:
        context = browser.new_context(**options)
        context.set_default_timeout(10_000)
        contexts.append(context)
        page = context.new_page()

        def note(message: str) -> None:
            if not re.search(allow, message):
                complaints.append(message)

        page.on("console", lambda message: note(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: note(f"error: {error}"))
        page.on("request", lambda request: request.url.startswith((url, "data:")) or note(f"asks {request.url}"))
        page.add_init_script(
            "document.addEventListener('securitypolicyviolation', e => console.error('CSP ' + e.violatedDirective))"
        )
        page.goto(url)
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert complaints == []


def ready(page: Any) -> Any:
    page.locator("html[data-ready]").wait_for()
    return page


def send(page: Any, text: str = PROMPT) -> None:
    page.get_by_label("Your message").fill(text)
    page.get_by_label("Your message").press("Enter")


def finished(page: Any, number: int = 1) -> Any:
    """The answer with that number, when it is complete."""
    answer = page.locator('.assistant[aria-busy="false"]').nth(number - 1)
    answer.wait_for()
    return answer


def reference(service: Service[PersonalSource], **options: Any) -> Any:
    device = service.source.device
    wanted = GenerationOptions(**{"max_new_tokens": 12, **options})
    return generate(ToyBackbone(), device.personal, device.request_for(device.format_prompt(PROMPT), wanted, (STOP,)))


def test_a_prompt_becomes_coloured_tokens(service: Service[PersonalSource], open_page: Any) -> None:
    page = ready(open_page(service.url))
    send(page)
    answer = finished(page)
    expected = reference(service)
    texts = answer.locator(".token").all_inner_texts()
    assert "".join(texts).strip() == service.source.device.text.decode(expected.token_ids)
    classes = [token.get_attribute("class").split()[1] for token in answer.locator(".token").all()]
    who = ["changed" if decision.changed else "agreed" for decision in expected.decisions]
    assert classes == who
    assert {"agreed", "changed"} <= set(classes)
    # The metrics are those of this answer.
    for name in ("M", "ms_per_token", "bytes_up", "bytes_down"):
        assert re.match(r"^\d", page.locator(f'dd[data-metric="{name}"]').inner_text())
    share = round(100 * sum(name == "changed" for name in who) / len(who))
    assert abs(int(page.locator('[data-share="changed"]').inner_text().split()[0]) - share) <= 1
    # And so is what left the device.
    page.locator('#ledger [data-kind="correct"]').wait_for()
    assert "Requests, with their prompts" in page.locator("#ledger").inner_text()


def test_hovering_tells_who_decided_and_how_likely_it_was(service: Service[PersonalSource], open_page: Any) -> None:
    page = ready(open_page(service.url))
    tip = page.locator("#tip")
    send(page)
    finished(page, 1).locator(".token.changed").first.hover()
    assert "The device changed it" in tip.inner_text() and "The cloud alone: “w" in tip.inner_text()
    assert "not known here" in tip.inner_text()
    page.mouse.move(2, 2)
    tip.wait_for(state="hidden")
    page.locator('[data-setting="answer"] input[value="token"]').check()
    assert "Probabilities are shown" in page.locator("#setting-note").inner_text()
    page.locator("#new").click()
    send(page)
    finished(page, 1).locator(".token.agreed").first.hover()
    assert re.search(r"The device agreed\s+Probability (over |under )?\d+ %", tip.inner_text())


def test_a_tap_tells_the_same_on_a_phone_without_scrolling_sideways(
    service: Service[PersonalSource], open_page: Any
) -> None:
    page = ready(open_page(service.url, viewport=PHONE, has_touch=True, is_mobile=True))

    def is_narrow() -> bool:
        widths = "[document.documentElement.scrollWidth, document.body.scrollWidth]"
        return max(page.evaluate(widths)) <= PHONE["width"]

    assert is_narrow()
    page.get_by_label("Your message").fill(PROMPT)
    page.get_by_role("button", name="Send").tap()
    answer = finished(page)
    page.locator(".strip [data-metric='M']", has_text=re.compile(r"\d")).wait_for()
    for token in (answer.locator(".token").first, answer.locator(".token").last):
        token.tap()
        box = page.locator("#tip").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"] and box["y"] >= 0
    page.locator(".user").tap()
    page.locator("#tip").wait_for(state="hidden")
    page.get_by_role("button", name="Settings and details").tap()
    page.locator('[data-setting="schedule"] label', has_text="blocking").tap()
    assert page.locator('[data-setting="schedule"] input[value="blocking"]').is_checked()
    assert is_narrow()
    page.get_by_role("button", name="Close").tap()
    page.locator("#details").wait_for(state="hidden")
    for target in page.locator("header button:visible, .field button:visible").all():
        box = target.bounding_box()
        assert box["width"] >= 44 and box["height"] >= 44


def test_switches_reach_the_device(service: Service[PersonalSource], open_page: Any) -> None:
    page = ready(open_page(service.url))
    bodies: list[Any] = []
    page.on("request", lambda request: request.method == "POST" and bodies.append(request.post_data_json))
    for name, value in (("mode", "spa"), ("schedule", "gated"), ("answer", "token")):
        page.locator(f'[data-setting="{name}"] input[value="{value}"]').check()
    page.locator("#temperature").fill("0.7")
    page.locator("#seed").fill("11")
    page.locator("#max-tokens").fill("6")
    send(page)
    answer = finished(page)
    (body,) = bodies
    assert (
        body["cotune"].items()
        >= {
            "mode": "spa",
            "schedule": "gated",
            "answer": "token",
            "temperature": 0.7,
            "seed": 11,
            "max_tokens": 6,
        }.items()
    )
    assert answer.locator(".token").count() <= 6
    who = {token.get_attribute("class").split()[1] for token in answer.locator(".token").all()}
    assert "cloud" in who  # the gate does not ask the device everywhere
    # The next turn knows of this one, a new conversation does not.
    send(page, "w8")
    finished(page, 2)
    assert [message["role"] for message in bodies[1]["messages"]] == ["user", "assistant", "user"]
    page.locator("#earlier").uncheck()
    send(page, "w9")
    finished(page, 3)
    assert bodies[2]["messages"] == [{"role": "user", "content": "w9"}]
    page.get_by_role("button", name="New conversation").click()
    assert page.locator(".turn").count() == 0 and page.locator("#welcome").is_visible()


def test_stop_ends_a_text_in_the_middle(slow_service: Service[PersonalSource], open_page: Any) -> None:
    page = ready(open_page(slow_service.url))
    send(page)
    page.locator(".assistant .token").nth(2).wait_for()
    # It streams: costs are shown while the text grows.
    assert page.locator('dd[data-metric="M"]').inner_text() == "1.00"
    page.get_by_role("button", name="Stop").click()
    answer = finished(page)
    assert "stopped" in answer.locator(".meta").inner_text()
    count = answer.locator(".token").count()
    assert 3 <= count < 100
    page.locator('#ledger [data-kind="close"]').wait_for()
    assert page.get_by_role("button", name="Send").is_visible() and page.locator(".problem").count() == 0
    assert answer.locator(".token").count() == count


def test_the_keyboard_alone_is_enough(service: Service[PersonalSource], open_page: Any) -> None:
    page = ready(open_page(service.url))
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type("w5 w9")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("w30")
    assert page.locator("#prompt").input_value() == "w5 w9\nw30"
    page.keyboard.press("Enter")
    answer = finished(page)
    assert page.locator(".user p").inner_text() == "w5 w9\nw30"
    answer.locator(".text").focus()
    page.keyboard.press("ArrowRight")
    assert "Token 1" in page.locator("#tip").inner_text()
    page.keyboard.press("ArrowRight")
    assert "Token 2" in page.locator("#announcer").inner_text()
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()


def test_text_is_never_markup(service: Service[PersonalSource], open_page: Any) -> None:
    page = ready(open_page(service.url))
    attack = "<img src=x onerror=alert(1)><b>bold</b>"
    send(page, attack)
    finished(page)
    assert page.locator(".user p").inner_text() == attack and page.locator(".turn img, .turn b").count() == 0


def test_errors_are_told_in_plain_words_and_can_be_retried(service: Service[PersonalSource], open_page: Any) -> None:
    page = ready(open_page(service.url, allow="Failed to load resource"))
    send(page, "w7 " * 600)
    problem = page.get_by_role("alert").filter(has_text="context")
    problem.wait_for()
    assert "shorten it, or begin a new one" in problem.inner_text()
    page.get_by_role("button", name="New conversation").click()
    page.context.set_offline(True)
    send(page)
    page.get_by_text("does not answer. Is `cotune device serve` still running?").wait_for()
    page.context.set_offline(False)
    page.get_by_role("button", name="Try again").click()
    assert finished(page).locator(".token").count() > 0 and page.locator(".problem").count() == 0


def test_a_token_is_asked_for_where_one_is_needed(tmp_path: Path, open_page: Any) -> None:
    (tmp_path / "keys").write_text("s3cret\n")
    with serving(ServeConfig(port=0, token_file=tmp_path / "keys", grace_s=1)) as guarded:
        page = open_page(guarded.url, allow="status of 401")
        page.get_by_label("Token", exact=True).fill("wrong")
        page.get_by_role("button", name="Continue").click()
        page.get_by_text("That token is not accepted.").wait_for()
        page.get_by_label("Token", exact=True).fill("s3cret")
        page.get_by_label("Token", exact=True).press("Enter")
        ready(page)
        send(page)
        assert finished(page).locator(".token").count() > 0
        page.context.close()


def test_another_page_cannot_reach_the_service(service: Service[PersonalSource], browser: Any) -> None:
    """From another origin: no reading, no writing, no frame."""
    context = browser.new_context()
    page = context.new_page()
    page.route("http://other.example/", lambda route: route.fulfill(body="<p>other</p>", content_type="text/html"))
    page.goto("http://other.example/")
    asked = len(service.ledger.totals())
    for options in (
        "{}",
        "{mode: 'no-cors'}",
        "{method: 'POST', mode: 'no-cors', body: '{}'}",
        "{method: 'POST', headers: {'Content-Type': 'application/json'}, body: '{}'}",
    ):
        outcome = page.evaluate(
            f"fetch('{service.url}/v1/models', {options}).then(r => r.type + r.status, e => 'failed')"
        )
        assert outcome in ("failed", "opaque0")
    framed = page.evaluate(
        f"""new Promise(done => {{
            const frame = document.createElement('iframe');
            frame.onload = () => done(frame.contentDocument ? 'readable' : 'closed');
            frame.src = '{service.url}/';
            document.body.append(frame);
        }})"""
    )
    assert framed == "closed" and len(service.ledger.totals()) == asked
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_their_ground(service: Service[PersonalSource], open_page: Any, scheme: str) -> None:
    """WCAG AA: a contrast of at least 4.5 for all text, of tokens too."""
    page = ready(open_page(service.url, color_scheme=scheme))
    send(page)
    finished(page)
    contrasts = page.evaluate(
        """() => {
            const parse = c => c.match(/[\\d.]+/g).map(Number);
            const over = ([r, g, b, a = 1], under) => [r, g, b].map((x, i) => a * x + (1 - a) * under[i]);
            const ground = node => {
                if (!node) return [255, 255, 255];
                const own = parse(getComputedStyle(node).backgroundColor);
                return own[3] === 0 ? ground(node.parentElement) : over(own, ground(node.parentElement));
            };
            const light = c => c.map(x => x / 255).map(x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4)
                .reduce((sum, x, i) => sum + x * [.2126, .7152, .0722][i], 0);
            return ['.token.agreed', '.token.changed', '.meta', '.user p', '.note', '.metrics dt', '.model', '.hint',
                    '.segments span', '.ledger .size'].map(where => {
                const node = document.querySelector('#log .assistant ' + where) || document.querySelector(where);
                const a = light(over(parse(getComputedStyle(node).color), [0, 0, 0])), b = light(ground(node));
                return [where, (Math.max(a, b) + .05) / (Math.min(a, b) + .05)];
            });
        }"""
    )
    assert [(where, round(ratio, 2)) for where, ratio in contrasts if ratio < 4.5] == []


def test_an_offline_model_alone_shows_what_it_has(tmp_path_factory: pytest.TempPathFactory, open_page: Any) -> None:
    folder = write_onnx_folder(tmp_path_factory.mktemp("offline") / "model")
    writer = OfflineWriter(load_offline_model(folder, OfflineSettings(num_threads=1)))
    source = OfflineSource(writer, model_id="small", defaults=OfflineOptions(max_new_tokens=6))
    with serving_source(source, EgressLedger(None)) as alone:
        page = ready(open_page(alone.url))
        assert page.locator("#model").inner_text() == "small on this device"
        assert page.get_by_text("Written here.").is_visible() and not page.get_by_text("Written by two.").is_visible()
        assert page.locator(".segments:visible").count() == 0 and page.locator("#reach").is_hidden()
        send(page)
        answer = finished(page)
        assert {token.get_attribute("class") for token in answer.locator(".token").all()} == {"token local"}
        assert page.locator('[data-share="local"]').inner_text() == "100 %"
        answer.locator(".token").first.hover()
        assert re.search(
            r"The device wrote it alone\s+Probability (over |under )?\d+ %", page.locator("#tip").inner_text()
        )
        assert page.locator("#ledger-total").inner_text() == "0 B"


def test_tokens_of_an_outage_are_marked_and_the_page_says_so(
    tmp_path_factory: pytest.TempPathFactory, open_page: Any
) -> None:
    folder = write_onnx_folder(tmp_path_factory.mktemp("offline") / "model")
    writer = OfflineWriter(load_offline_model(folder, OfflineSettings(num_threads=1)))
    urls = ["ws://127.0.0.1:9"]

    async def connector() -> Connection:
        return await connect(urls[0])

    source = PersonalSource(
        toy_plugin(),
        connector,
        model_id="mine",
        defaults=GenerationOptions(max_new_tokens=6),
        offline=writer,
        reach_config=ReachConfig(first_wait_s=0.02, max_wait_s=0.02),
    )
    with serving_source(source, EgressLedger(None)) as service:
        page = ready(open_page(service.url))
        assert page.locator("#reach").is_visible() and "out of reach" in page.locator("#reach").inner_text()
        send(page)
        answer = finished(page, 1)
        assert answer.locator(".token.local").count() == answer.locator(".token").count() == 6
        assert "6 of them by this device alone" in answer.locator(".meta").inner_text()
        with in_a_thread(toy_model()) as urls[0]:
            assert source.fallback is not None
            until_s = time.monotonic() + 10
            while source.fallback.reach.is_away and time.monotonic() < until_s:
                time.sleep(0.02)
            send(page, "w7")
            answer = finished(page, 2)
            assert answer.locator(".token.local").count() == 0 < answer.locator(".token").count()
            page.locator("#reach").wait_for(state="hidden")
