"""Tutorials run as they are written, block by block; the 100K-token one with fewer tokens."""

from __future__ import annotations

import pytest
from docs_site import DOCS, load

PAGES = DOCS / "tutorials"
TIMEOUT_S = 600.0


@pytest.fixture(scope="module")
def tutorial():
    return load("tools/run_tutorial.py")


@pytest.mark.parametrize(
    ("page", "variables"),
    [
        pytest.param("bring-a-megatron-checkpoint", {}, id="megatron"),
        pytest.param("evaluate-a-checkpoint", {}, id="evaluate"),
        pytest.param("two-nodes", {}, id="two-nodes", marks=pytest.mark.netns),
        pytest.param(
            "first-100k-prompt", {"TOKENS": "6000"}, id="long-prompt", marks=pytest.mark.slow
        ),
    ],
)
def test_a_tutorial_runs_as_written(tutorial, page, variables):
    code, output = tutorial.run(PAGES / f"{page}.md", variables, TIMEOUT_S)
    assert code == 0, output


def test_every_tutorial_is_run_and_listed(tutorial):
    pages = {path.stem for path in PAGES.glob("*.md")} - {"index"}
    marks = test_a_tutorial_runs_as_written.pytestmark[0].args[1]
    assert pages == {case.values[0] for case in marks}
    index = (PAGES / "index.md").read_text()
    assert all(f"({page}.md)" in index for page in pages)


def test_blocks_files_expectations_and_cleanup_are_found(tutorial, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```python\n# say.py\nprint('  spaced   out')\n```\n"
        "```bash\npython say.py\n```\n<!-- expect: spaced out -->\n"
        "```python\nnot_run()\n```\n```text\nnot run\n```\n"
        "```bash\nfalse\necho unreached\n```\n"
        "<!-- cleanup -->\n```bash\necho cleaned up\n```\n"
    )
    code, output = tutorial.run(page, {}, 60.0)
    assert code == 1
    assert "spaced   out" in output
    assert "cleaned up" in output
    assert "unreached" not in output


def test_a_text_that_was_expected_and_not_said_fails_the_page(tutorial, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```bash\necho one $WORD\n```\n<!-- expect: one two -->\n")
    assert tutorial.run(page, {"WORD": "two"}, 60.0)[0] == 0
    code, output = tutorial.run(page, {"WORD": "three"}, 60.0)
    assert code == 1
    assert "the block of line 1 should have said 'one two'" in output
