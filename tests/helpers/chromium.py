"""Debian's Chromium without a screen, and a page in it as a person sees it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1200,860",
    "--force-color-profile=srgb",
)
PATIENCE_S = 20


def start_chromium(profile: Path) -> webdriver.Chrome:
    """A browser with a new profile; skips the test where there is none."""
    if not (CHROMIUM.exists() and DRIVER.exists()):
        pytest.skip("needs Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))


class BrowserPage:
    """A page whose elements are reached by their ids."""

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver = driver
        driver.get_log("browser")  # forget what earlier pages said
        driver.get(url)
        driver.execute_script("sessionStorage.clear()")
        driver.refresh()

    def __getitem__(self, name: str) -> WebElement:
        return self.driver.find_element(By.ID, name)

    def until(self, condition: Callable[[], Any], patience_s: float = PATIENCE_S) -> Any:
        """What ``condition`` says once it is true."""
        return WebDriverWait(self.driver, patience_s, 0.05).until(lambda _: condition())

    def complaints(self) -> list[str]:
        """What the browser's console holds against the page, its own policy included."""
        return [line["message"] for line in self.driver.get_log("browser")]

    @property
    def sideways(self) -> int:
        """By how many pixels it is wider than its window."""
        width = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        return int(self.driver.execute_script(width))
