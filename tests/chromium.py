"""A Chromium without a window, for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

from tests.processes import standing, strays, wait_until_only


@contextmanager
def chromium() -> Iterator[Browser]:
    """Give a browser until the block is left. It starts processes when it likes: they are no test's leftovers."""
    before = strays()
    with sync_playwright() as playwright:
        (driver,) = strays() - before
        flags = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        with (
            standing(driver.pid),
            playwright.chromium.launch(executable_path="/usr/bin/chromium", args=flags) as browser,
        ):
            yield browser
    assert wait_until_only(before, 5.0) == set(), "the browser is gone, with all its processes"
