"""The annotation page in a browser: choose a picture, point at things, read their labels."""

from pathlib import Path

from chromium import BrowserPage
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

PATIENCE_S = 60


class AnnotationPage(BrowserPage):
    """The page as a person sees it."""

    def choose(self, field: str, path: Path) -> None:
        self[field].send_keys(str(path))

    def open(self, path: Path) -> None:
        self.choose("image", path)
        self.until(lambda: self["frame"].get_attribute("data-state") == "shown")

    def look_for(self, mode: str) -> None:
        self.driver.find_element(By.CSS_SELECTOR, f"input[value={mode}] + span").click()

    def point(self, x: float, y: float, *, shift: bool = False) -> None:
        """Click at a place of the picture, 0 to 1 each way."""
        actions = ActionChains(self.driver)
        if shift:
            actions.key_down(Keys.SHIFT)
        actions.move_to_element_with_offset(self["stage"], *self._offset(x, y)).click()
        if shift:
            actions.key_up(Keys.SHIFT)
        actions.perform()

    def drag(self, x0: float, y0: float, x1: float, y1: float) -> None:
        start, end = self._offset(x0, y0), self._offset(x1, y1)
        ActionChains(self.driver, duration=50).move_to_element_with_offset(
            self["stage"], *start
        ).click_and_hold().move_to_element_with_offset(self["stage"], *end).release().perform()

    def _offset(self, x: float, y: float) -> tuple[int, int]:
        """From the middle of the picture, in pixels of the screen."""
        size = self["stage"].size
        return round((x - 0.5) * size["width"]), round((y - 0.5) * size["height"])

    def colour(self, x: float, y: float) -> list[int]:
        """Of the place, as red, green and blue."""
        script = """
            const canvas = document.getElementById("stage");
            const pixel = document.createElement("canvas");
            pixel.width = pixel.height = 1;  // of its own: Chromium complains of many looks at one
            const context = pixel.getContext("2d");
            const [x, y] = [arguments[0] * canvas.width, arguments[1] * canvas.height];
            context.drawImage(canvas, -Math.floor(x), -Math.floor(y));
            return [...context.getImageData(0, 0, 1, 1).data.slice(0, 3)];
        """
        return list(self.driver.execute_script(script, x, y))

    @property
    def labels(self) -> list[str]:
        """In one look, for the list may be written anew at any moment."""
        script = "return [...document.querySelectorAll('#labels li')].map((one) => one.innerText)"
        return list(self.driver.execute_script(script))

    @property
    def stage_pixels(self) -> bytes:
        """What the canvas shows; equal bytes are the same view."""
        return self["stage"].screenshot_as_png

    def label(self) -> None:
        self["start"].click()
        self.until(lambda: self["step"].text == "done" or self["error"].text, PATIENCE_S)
