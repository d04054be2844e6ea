"""The documentation site: its figures, its build, its notebook."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[2]

from benchmarks import pages  # noqa: E402
from experiments import _pages, report  # noqa: E402

TABLE = [["what", "measured"], ["a step", "1.25"]]


def test_fill_puts_tables_and_cells_between_their_marks():
    page = (
        "<!-- table: costs -->\nold\n<!-- end -->\n"
        "It takes <!-- cell: costs / a step / measured -->old<!-- end --> ms.\n"
        "<!-- table: other -->kept<!-- end -->\n"
    )
    filled = (
        "<!-- table: costs -->\n"
        "| what | measured |\n| --- | --- |\n| a step | 1.25 |\n<!-- end -->\n"
        "It takes <!-- cell: costs / a step / measured -->1.25<!-- end --> ms.\n"
        "<!-- table: other -->kept<!-- end -->\n"
    )
    tables = {"costs": lambda: TABLE}
    assert _pages.fill(page, tables) == filled
    assert _pages.fill(filled, tables) == filled


def test_a_cell_that_is_not_there_is_an_error():
    page = "<!-- cell: costs / no step / measured --><!-- end -->"
    with pytest.raises(KeyError):
        _pages.fill(page, {"costs": lambda: TABLE})


def test_ratios_have_the_figure_that_was_measured(monkeypatch):
    goal = {"measured": 1.251, "peers": {"tfa": {"measured": None}}, "parts": {}}
    monkeypatch.setattr(pages, "lines", lambda: {"lookahead-adam-jax": goal})
    _, row = pages.ratios([("lookahead-adam-{place}", "a ratio")])
    missing = pages.MISSING
    assert row == ["a ratio", missing, missing, "1.25", missing, f"tfa: {missing}"]


def test_pages_have_the_figures_of_the_results():
    """`python -m benchmarks.pages` brings them up to date."""
    assert pages.main(["--check"]) == 0


def test_marks_are_of_known_tables_and_begin_no_line_of_a_paragraph():
    """Markdown takes a comment at the beginning of a line for a paragraph's end."""
    for path in report.pages():
        page = path.read_text(encoding="utf-8")
        for _, kind, reference, _, _ in _pages.MARKED.findall(page):
            name = reference.split(" / ")[0]
            assert name in pages.TABLES or name in report.TABLES, (path, kind, name)
        assert not re.search(r"^ *<!-- cell", page, re.MULTILINE), path


def test_site_builds_without_a_warning(tmp_path):
    for module in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(module)
    # Not `--quiet`, under which mkdocs counts no warning, such as a broken link.
    build = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    run = subprocess.run(
        [*build, "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    reference = (tmp_path / "api.html").read_text(encoding="utf-8")
    assert "k steps ahead" in reference  # the docstrings came along
    assert "<math" in reference
    start = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "<!-- cell" not in start


def test_notebook_runs(monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    notebook = nbformat.read(ROOT / "docs" / "tutorial.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=180, kernel_name="python3").execute()
    (last,) = notebook.cells[-1].outputs
    assert "0.05" in last.text
