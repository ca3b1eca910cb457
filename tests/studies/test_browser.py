"""The report in a real browser: pointing at a token shows what every head retrieved for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, find_browser
from examples import identity_model, planted, report_on, small_model
from hostile import HOSTILE
from test_json_lines import copying_report

from memorizing_studies.inspection.page import render
from memorizing_studies.inspection.report import Report

PLANTS = {"alpha": (40, 1_500), "beta": (777, 2_900)}
HIDDEN = "\0\u202e\u200b\u2028\ufeff\U000e0041"
"""Characters of the hostile document that the page names instead of showing them."""


def named(char: str) -> str:
    return f"\u2039U+{ord(char):04X}\u203a"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium is installed")
    browser = Browser(program)
    yield browser
    browser.close()


@pytest.fixture(autouse=True)
def _silent(browser: Browser) -> Iterator[None]:
    browser.complaints.clear()
    browser.requests.clear()
    yield
    browser.run("0")  # fetch what is under way
    assert not browser.complaints
    assert all(url.startswith(("file:", "data:", "about:")) for url in browser.requests)


@pytest.fixture(scope="module")
def report() -> Report:
    text, words = planted(3_000, PLANTS)
    return report_on(text, identity_model(words), (500, 2_500), segment=64)


@pytest.fixture(scope="module")
def page(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "index.html"
    path.write_text(render(report), "utf-8")
    return path


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "index.html"
    name = "<script>window.hacked=1</script>\u202e.txt"
    report = report_on(HOSTILE * 3, small_model(), document=name, checkpoint=name)
    path.write_text(render(report), "utf-8")
    return path


def test_pointing_at_a_token_shows_its_retrievals(browser: Browser, page: Path) -> None:
    for name, (defined, used) in PLANTS.items():
        browser.open(page, f"#token={used + 1}")
        neighbour = f'[data-token="{used + 3}"]'
        browser.hover(neighbour)
        browser.wait(f"document.getElementById('panel').dataset.token === '{used + 3}'")
        assert f"token {used + 3:,}" in browser.text("#panel")
        browser.hover(f'[data-token="{used + 1}"]')
        browser.wait(f"document.getElementById('panel').dataset.token === '{used + 1}'")
        shown = browser.text("#panel")
        assert name.upper() in shown
        for head in (0, 1):
            place = f'#panel [data-head="{head}"] .place'
            assert f"at {defined:,} · {used - defined:,} tokens back" in browser.text(place)
            assert browser.text(f"{place} .pair").strip() == name
            assert browser.text(f"{place} .after").strip() == name.upper()
            assert browser.run(f"document.querySelector('{place} .after').classList[1]") == "same"


def test_a_retrieved_place_can_be_gone_to_and_left(browser: Browser, page: Path) -> None:
    defined, used = PLANTS["alpha"]
    browser.open(page, f"#token={used + 1}")
    browser.click("#panel .place")
    in_window = (
        "(() => { const box = document.querySelector('#text [data-token=\"%d\"]')"
        "?.getBoundingClientRect(); return box && box.top > 150 && box.bottom < innerHeight; })()"
    )
    browser.wait(in_window % defined)
    assert f"token {used + 1:,}" in browser.text("#panel")
    browser.click("#back")
    browser.wait(in_window % (used + 1))


def test_keys_go_from_token_to_token(browser: Browser, page: Path) -> None:
    browser.open(page, "#token=1000")
    for key, expected in (("ArrowRight", 1001), ("ArrowRight", 1002), ("ArrowLeft", 1001)):
        browser.press(key)
        assert browser.run("document.querySelector('.sel').dataset.token") == str(expected)
        assert browser.run("location.hash") == f"#token={expected}"
    browser.press("ArrowDown")
    below = int(browser.run("document.querySelector('.sel').dataset.token"))
    browser.press("ArrowUp")
    above = int(browser.run("document.querySelector('.sel').dataset.token"))
    assert above <= 1001 + 2 < below
    browser.press("Escape")
    assert browser.run("document.querySelector('.sel')") is None


def test_search_finds_what_the_text_holds(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.press("/")
    for char in "beta":
        browser.press(char)
    assert browser.text("#found") == "4 found"  # names and values, twice each
    for _ in range(3):
        browser.press("Enter")
    assert browser.text("#found") == "3 / 4"
    assert browser.run("document.querySelector('.sel').dataset.token") == str(PLANTS["beta"][1])


def test_the_table_ranks_tokens_by_their_gain(browser: Browser, page: Path, report: Report) -> None:
    browser.open(page)
    gains = report.gain(report.readings[-1])
    for sign, expected in ((1, np.argmax(gains)), (-1, np.argmin(gains))):
        browser.click('[data-view="table"]')
        browser.click(f'[data-sign="{sign}"]')
        row = "#rows tr"
        assert browser.run(f"document.querySelector('{row}').dataset.token") == str(expected)
        assert f"{expected:,}" in browser.text(row)
    browser.click(f"{row} .link")
    browser.wait(f"document.querySelector('#text .sel')?.dataset.token === '{expected}'")


def test_sizes_can_be_compared(browser: Browser, page: Path, report: Report) -> None:
    defined, used = PLANTS["alpha"]
    browser.open(page, f"#token={used + 1}")
    for base, reading in (("off", "500"), ("500", "2500"), ("off", "2500")):
        browser.run(
            "(() => { const box = document.querySelector('#compare select'); "
            f"box.value = '{base} {reading}'; box.dispatchEvent(new Event('change')); }})()"
        )
        traces = {trace.name: trace for trace in report.traces}
        gain = traces[base].bits[used + 1] - traces[reading].bits[used + 1]
        shown = browser.text("#panel .gain").replace("\N{MINUS SIGN}", "-")
        assert float(shown.split()[0]) == pytest.approx(gain, abs=0.011)
        assert (f"at {defined:,} " in browser.text("#panel")) == (reading == "2500")


def test_a_long_text_is_drawn_only_where_one_looks(browser: Browser, tmp_path: Path) -> None:
    report = report_on("a few words\n" * 2_000, small_model(), segment=512)
    (tmp_path / "index.html").write_text(render(report), "utf-8")
    browser.open(tmp_path / "index.html")
    drawn = "document.querySelectorAll('#text .t').length"
    last = f"document.querySelector('#text [data-token=\"{len(report.tokens) - 1}\"]')"
    browser.wait(f"{drawn} > 0")
    assert browser.run(last) is None
    assert browser.run(drawn) < 3_000
    browser.run("document.getElementById('text').scrollTop = 1e9")
    browser.wait(f"{last} !== null")
    browser.wait(f"{drawn} < 3_000")


def test_a_hostile_document_is_shown_as_it_is(browser: Browser, hostile: Path) -> None:
    browser.open(hostile)
    browser.wait("document.querySelectorAll('#text .t').length > 500")
    assert browser.run("window.hacked") is None
    shown = browser.run("document.querySelector('#text').textContent")
    expected = HOSTILE.splitlines(keepends=True)[0].replace("\n", "↵\n")
    assert shown.startswith(expected)
    for char in HIDDEN:
        assert char not in shown
        assert named(char) in shown
    assert browser.text("#title") == f"<script>window.hacked=1</script>{named(chr(0x202E))}.txt"
    # Every view, and every token of a stretch, is drawn without a complaint.
    for view in ("table", "plots", "help", "text"):
        browser.click(f'[data-view="{view}"]')
        assert browser.run(f"document.getElementById('view-{view}').hidden") is False
    for _ in range(3):
        browser.press("ArrowRight")
    tags = "[...document.querySelectorAll('#text *')].map((node) => node.tagName)"
    assert set(browser.run(tags)) == {"DIV", "SPAN"}


def test_every_character_of_a_hostile_document_is_there(browser: Browser, hostile: Path) -> None:
    browser.open(hostile)
    browser.wait("document.querySelectorAll('#text .t').length > 500")
    shown = browser.run(
        "[...document.querySelectorAll('#text .t')].map((node) => node.textContent)"
    )
    pieces = report_on(HOSTILE * 3, small_model()).pieces[: len(shown)]
    hidden = set()
    for text, piece in zip(shown, pieces, strict=True):
        if text != (piece.replace("\n", "↵\n") or "·"):
            assert text == ("\u2190" if piece == "\r" else named(piece))
            hidden.add(piece)
    assert hidden >= set(HIDDEN)


def test_dark_and_light_change_the_page(browser: Browser, page: Path) -> None:
    browser.open(page)
    background = "getComputedStyle(document.body).backgroundColor"
    before = browser.run(background)
    browser.click("#theme")
    assert browser.run(background) != before


def test_the_panel_shows_what_was_copied(browser: Browser, tmp_path: Path) -> None:
    report, first, again = copying_report()
    path = tmp_path / "index.html"
    path.write_text(render(report), "utf-8")
    browser.open(path, f"#token={again + 4}")
    assert "of the prediction" in browser.text("#panel .copies .head")
    place = browser.text("#panel .copies .place")
    assert f"at {first + 4:,} · {again - first - 1:,} tokens back" in place
