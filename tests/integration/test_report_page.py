"""The page of a report in a real browser: it shows its figures, and asks for nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from browser import Browser
from studies import make_run

from mapo_lightning.run.report import main

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here"),
]


def test_the_page_shows_its_figures_and_asks_for_nothing(tmp_path: Path) -> None:
    for method, score in (("mapo", 30.0), ("apv", 20.0)):
        for seed in range(3):
            make_run(tmp_path / "runs" / f"{method}+seed={seed}", "env=toy", f"method={method}",
                     f"seed={seed}", score=score + seed, success=0.5,
                     curve=[(2000, 3.0), (4800, score + seed)])  # fmt: skip
    make_run(tmp_path / "runs/late", "env=toy", "method=apv", "seed=9", mark=False)
    out = tmp_path / "out"
    assert main([str(tmp_path / "runs"), f"out={out}", "title=A <b>study</b> & more"]) == 0
    assert CHROMIUM is not None
    with Browser(CHROMIUM) as page:
        page.go((out / "report.html").as_uri())
        page.until("document.readyState == 'complete'")
        assert page.value("document.querySelector('h1').textContent") == "A <b>study</b> & more"
        sizes = page.value("[...document.images].map((i) => i.naturalWidth)")
        assert len(sizes) == 4  # two of curves, returns, comparisons
        assert min(sizes) > 300
        assert page.value("performance.getEntriesByType('resource').map((e) => e.name)"
                          ".filter((name) => !name.startsWith('data:'))") == []  # fmt: skip
        assert page.value("document.documentElement.scrollWidth <= innerWidth")
        words = page.value("document.body.innerText")
        assert "6 finished runs, 2 methods, 1 task. 1 more do not count" in words
        assert "late\tunfinished\tapv\ttoy/disc\t9\tno checkpoint yet" in words
        assert "31.0 [28.5, 33.5]" in words  # mean of 30, 31, 32: 4.303 * 1 / sqrt(3)
        link = page.value("document.querySelector('td a').href")
        assert link == (tmp_path / "runs/mapo+seed=0").as_uri() + "/"
        assert page.troubles == []
