"""Writes the pictures of the chat page in the docs: `python scripts/chat_screenshot.py http://127.0.0.1:7071 PROMPT...`

Needs a running `cotune device serve`, and Playwright with a Chromium on PATH.
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

IMAGES = Path(__file__).parents[1] / "docs" / "images"
DESKTOP, PHONE = {"width": 1280, "height": 1080}, {"width": 390, "height": 844}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def write(page: Page, url: str, prompts: list[str], settings: dict[str, str]) -> None:
    """Ask each prompt and wait for its answer."""
    page.goto(url)
    page.locator("html[data-ready]").wait_for()
    is_phone = page.locator("#details-toggle").is_visible()
    if is_phone:
        page.locator("#details-toggle").click()
    for name, value in settings.items():
        page.locator(f'[data-setting="{name}"] input[value="{value}"]').check()
    page.locator("#earlier").uncheck()
    if is_phone:
        page.locator("#details-close").click()
        page.wait_for_timeout(300)
    for number, prompt in enumerate(prompts, start=1):
        page.locator("#prompt").fill(prompt)
        page.locator("#prompt").press("Enter")
        page.locator('.assistant[aria-busy="false"]').nth(number - 1).wait_for()
    page.wait_for_timeout(300)


def shoot(
    browser: Browser, url: str, prompts: list[str], path: Path, *, phone: bool, dark: bool, settings: dict[str, str]
) -> None:
    """One picture, with what a changed token says of itself."""
    context = browser.new_context(
        viewport=PHONE if phone else DESKTOP,  # type: ignore[arg-type]
        has_touch=phone,
        device_scale_factor=2,
        color_scheme="dark" if dark else "light",
    )
    page = context.new_page()
    write(page, url, prompts, settings)
    changed = page.locator(".assistant").last.locator(".token.changed", has_text=re.compile(r"\w{3}"))
    if changed.count():
        token = changed.nth(changed.count() // 2)
        token.tap() if phone else token.hover()
    page.screenshot(path=path)
    context.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--out", type=Path, default=IMAGES)
    parser.add_argument("--mode", default="spa")
    parser.add_argument("--schedule", default="gated")
    parser.add_argument("--answer", default="token")
    arguments = parser.parse_args()
    settings = {name: getattr(arguments, name) for name in ("mode", "schedule", "answer")}
    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        for name, phone, dark in (
            ("chat", False, False),
            ("chat-dark", False, True),
            ("chat-phone", True, False),
            ("chat-phone-dark", True, True),
        ):
            shoot(
                browser,
                arguments.url,
                arguments.prompts,
                arguments.out / f"{name}.png",
                phone=phone,
                dark=dark,
                settings=settings,
            )
        browser.close()


if __name__ == "__main__":
    main()
