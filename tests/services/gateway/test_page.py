"""The first page in a real Chromium: type a prompt, see progress, get the picture."""

from collections.abc import Iterator
from typing import Any

import pytest
from chromium import BrowserPage, start_chromium
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

pytestmark = [pytest.mark.browser, pytest.mark.broker]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    driver = start_chromium(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


class Page(BrowserPage):
    """The first page as a person sees it."""

    def paint(self, prompt: str) -> None:
        self["prompt"].clear()
        self["prompt"].send_keys(prompt, Keys.ENTER)

    @property
    def shows_picture(self) -> bool:
        """Is the final picture there, decoded, in its real size?"""
        state = self["canvas"].get_attribute("data-state")
        return state == "done" and self.driver.execute_script(
            "const i = document.getElementById('picture'); return i.complete && i.naturalWidth > 0"
        )


@pytest.fixture
def page(chromium: webdriver.Chrome, server: Any) -> Page:
    page = Page(chromium, server.url)
    page.until(lambda: page["status"].text == "ready")
    page.until(lambda: page["model"].get_attribute("value") == "sana-tiny")
    return page


def test_a_prompt_becomes_a_picture_with_progress_on_the_way(page: Page) -> None:
    page.paint("slowly, a red apple")
    page.until(lambda: page["step"].text.startswith("step 2"))
    assert page["progress"].is_displayed()
    assert page["cancel"].is_displayed()
    page.until(lambda: page["canvas"].get_attribute("data-state") == "painting")
    page.until(lambda: page.shows_picture)
    assert page["step"].text.startswith("done in")
    assert page["use-seed"].text.isdigit()
    assert page["picture"].get_attribute("alt") == "slowly, a red apple"
    assert page["download"].get_attribute("href").startswith("data:image/png;base64,")
    page.driver.find_element(By.CSS_SELECTOR, "#made summary").click()
    assert "flow-dpm-solver" in page["provenance"].text
    assert not page["suggestions"].is_displayed()
    assert page.complaints() == []


def test_the_seed_can_be_used_again_and_gives_the_same_picture(page: Page) -> None:
    page.paint("a red apple")
    page.until(lambda: page.shows_picture)
    first = page["picture"].get_attribute("src")
    seed = page["use-seed"].text
    page["use-seed"].click()
    page.paint("a red apple")
    page.until(lambda: len(page["shelf"].find_elements(By.TAG_NAME, "li")) == 2)
    assert page["use-seed"].text == seed
    assert page["picture"].get_attribute("src") == first


def test_suggestions_appear_for_an_unknown_subject_and_paint_when_clicked(page: Page) -> None:
    page.paint("an unheard of thing")
    page.until(lambda: page.shows_picture)
    idea = page["suggestions"].find_elements(By.TAG_NAME, "button")[1]
    assert idea.text == "a yellow star"
    idea.click()
    page.until(lambda: page["prompt"].get_attribute("value") == "a yellow star")
    page.until(lambda: page.shows_picture and not page["suggestions"].is_displayed())


def test_all_models_that_draw_can_be_chosen_and_draw(page: Page) -> None:
    choice = Select(page["model"])
    names = ["sana-tiny", "hart-tiny", "vilau-tiny", "vila-u-7b-256", "from-a-folder"]
    assert [option.text for option in choice.options] == names
    choice.select_by_visible_text("hart-tiny")
    page.paint("a red apple")
    page.until(lambda: page.shows_picture)
    page.driver.find_element(By.CSS_SELECTOR, "#made summary").click()
    assert "hart-tiny" in page["provenance"].text


def test_a_question_about_the_picture_is_answered_under_it(page: Page) -> None:
    assert not page["ask"].is_displayed()
    page.paint("a red apple")
    page.until(lambda: page.shows_picture)
    page["question"].send_keys("slowly, what is this?", Keys.ENTER)
    page.until(lambda: page["answer"].text.startswith("A picture"))
    page.until(lambda: page["answer"].text.startswith("A picture of 64 by 64, mostly"))
    page["question"].clear()
    page["question"].send_keys("too large", Keys.ENTER)
    page.until(lambda: "show fewer pictures" in page["answer"].text)
    page.paint("a green apple")
    page.until(lambda: page.shows_picture and page["answer"].text == "")
    assert page.complaints() == []


def test_a_failure_is_a_sentence_and_the_next_picture_works(page: Page) -> None:
    page.paint("too large")
    page.until(page["error"].is_displayed)
    assert page["error"].text == "the picture does not fit; try a smaller size"
    page.paint("a red apple")
    page.until(lambda: page.shows_picture)
    assert not page["error"].is_displayed()


def test_stop_withdraws_the_job(page: Page, http: Any) -> None:
    page.driver.find_element(By.CSS_SELECTOR, "form summary").click()
    page["steps"].send_keys("90")
    page.paint("slowly, a tortoise")
    page.until(lambda: page["step"].text.startswith("step 1"))
    page["cancel"].click()
    page.until(lambda: page["step"].text == "stopped")
    assert not page["error"].is_displayed()

    def newest() -> str:
        jobs = http.get("/v1/jobs", params={"limit": 1}).json()["data"]
        return str(jobs[0]["status"])

    page.until(lambda: newest() == "cancelled")


def test_a_closed_server_asks_for_a_key_and_takes_it(
    chromium: webdriver.Chrome, start_gateway: Any
) -> None:
    page = Page(chromium, start_gateway(api_keys="open sesame").url)
    page.until(page["key-box"].is_displayed)
    page["key"].send_keys("wrong", Keys.TAB)
    page.until(lambda: "not known here" in page["error"].text)
    page["key"].clear()
    page["key"].send_keys("open sesame", Keys.TAB)
    page.until(lambda: page["model"].get_attribute("value") == "sana-tiny")
    page.paint("a red apple")
    page.until(lambda: page.shows_picture)


def test_it_fits_a_telephone(page: Page) -> None:
    page.driver.set_window_size(390, 844)
    assert page.sideways == 0
    page.driver.set_window_size(1200, 860)
