"""The page of a chain: every number is the file's, requests lead to their reports, a browser shows it. Made-up numbers."""

from __future__ import annotations

import in_browser
import pytest
from html_page import Page

from duet.pipeline.pages.chain import chain_table, render
from duet.pipeline.pages.page import FORMS, Numbers

browser = in_browser.browser  # the fixture


def score(value: float) -> dict:
    one = {"value": value, "ci95": [max(0, value - 0.1), min(1, value + 0.1)], "n": 5}
    return {"rougeL_recall": one, "distinctive_recall": one}


def chain() -> dict:
    """Three requests; a set of the second's own; what was forgotten first comes back a little."""

    def after(name: str, **scores: float) -> dict:
        sets = {"held <out>": score(0.9), **({} if name == "first" else {"second_rephrased": score(0.05)})}
        requests = {title: score(value) for title, value in scores.items()}
        report = "report.html" if name == "first" else f"chain/{name}/report.html"
        facts = {"request": name, "topic": f"{name} & all", "verdict": "suppressed until attacked", "report": report}
        return facts | {"requests": requests, "sets": sets}

    titles = ("first", "second", "third")
    return {
        "format_version": 1,
        "run": "lab",
        "student": "student:base",
        "base": {
            "requests": dict.fromkeys(titles, score(1.0)), "sets": {"held <out>": score(1.0), "second_rephrased": score(1.0)},
        },
        "after": [
            after("first", first=0.0),
            after("second", first=0.1, second=0.0),
            after("third", first=0.2, second=0.04, third=0.0),
        ],
    }  # fmt: skip


def at(found: dict, pointer: str) -> object:
    return Numbers(found).at(*(part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]))


def test_every_number_is_the_files_and_every_request_leads_to_its_report():
    found = chain()
    page = Page(render(found))
    shown = {key: (form, text) for key, form, text in page.marked if form}
    for number, step in enumerate(found["after"]):
        for part in ("requests", "sets"):
            for title in step[part]:
                assert f"/after/{number}/{part}/{title}/rougeL_recall" in shown
    for key, (form, text) in shown.items():
        assert Page(f"<p>{FORMS[form](at(found, key))}</p>").loose, key
        assert text == "".join(part for _, part in Page(f"<p>{FORMS[form](at(found, key))}</p>").loose), key
    assert page.attributes["href"] == ["report.html", "chain/second/report.html", "chain/third/report.html"]
    lines = [key for key, form, _ in page.marked if not form]
    assert {at(found, key)["value"] for key in lines} == {0.2, 0.04, 0.0, 0.9, 0.05}, "of each set the last"


def test_the_table_has_a_column_for_each_set_and_none_where_it_was_not_asked():
    table = chain_table(chain(), verbose=True)
    heads = [column.header for column in table.columns]
    assert heads == ["after", "first", "second", "third", "held <out>", "second_rephrased", "verdict"]
    assert list(table.columns[2].cells) == ["100.0 [90.0, 100.0]", "", "0.0 [0.0, 10.0]", "4.0 [0.0, 14.0]"]


@pytest.mark.skipif(bool(in_browser.MISSING), reason=f"no {', '.join(in_browser.MISSING)}")
@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_shows_it_whole(browser, tmp_path, width):
    path = tmp_path / "chain.html"
    path.write_text(render(chain()), encoding="utf-8")
    in_browser.check_page(browser, path, width, charts=2)
    assert browser.execute_script(in_browser.CONTRAST)[0] >= 4.5
