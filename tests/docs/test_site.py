"""The site builds without a warning, links point at something, and pictures and figures are those
of the result files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from urllib.parse import urlsplit

import pytest
from docs_site import DOCS, ROOT, load, pages

MAX_COLUMNS = 100
_FENCE = re.compile(r"^(`{3,}).*?^\1\s*$", re.MULTILINE | re.DOTALL)
_INLINE_CODE = re.compile(r"`[^`\n]*`")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_GENERATED = re.compile(r"<!-- (\w+): made by .*?<!-- end of \1 -->", re.DOTALL)
_TABLE = re.compile(r"^\| `(.+?)` \|", re.MULTILINE)


def links_of(text: str) -> list[str]:
    return _LINK.findall(_INLINE_CODE.sub("", _FENCE.sub("", text)))


def anchors_of(text: str) -> set[str]:
    """Slugs of the headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", text), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    done = subprocess.run(
        [*command, "-d", str(tmp_path / "doctrees"), str(DOCS), str(tmp_path / "html")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "html" / "index.html").read_text()
    # Nothing is fetched from elsewhere when a page is opened.
    assert not re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="https?://[^"]*"', page)


@pytest.mark.parametrize("page", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_point_at_files_and_headings(page):
    text = page.read_text()
    broken = []
    for link in links_of(text):
        parts = urlsplit(link)
        if parts.scheme in ("http", "https"):
            if not parts.netloc:
                broken.append(link)
            continue
        target = page if not parts.path else (page.parent / parts.path).resolve()
        if not target.exists() or (
            parts.fragment
            and target.suffix == ".md"
            and parts.fragment not in anchors_of(target.read_text())
        ):
            broken.append(link)
    assert not broken


def test_modules_that_pages_name_are_there():
    """`folder/file.py` of the package, benchmarks, tools, tests or launch; history is left out."""
    folders = {path.name for path in (ROOT / "sps2_mega").iterdir() if path.is_dir()}
    folders |= {"benchmarks", "tools", "tests", "launch", "docs", "sps2_mega"}
    roots = [ROOT, ROOT / "sps2_mega"]
    lost = []
    for page in pages():
        if page.name == "evaluation.md" or "results" in page.parts:
            continue
        text = page.read_text()
        if page.name == "vocabulary.md":
            text = text[: text.index("## Retired names")]
        for name in re.findall(r"`([\w-]+(?:/[\w-]+)*\.(?:py|sh|yaml))\b", text):
            ours = name.split("/")[0] in folders
            if ours and not any((root / name).exists() for root in roots):
                lost.append(f"{page.name}: {name}")
    assert not lost


def test_the_page_of_megatrons_settings_is_that_of_the_table():
    tool = load("tools/megatron_settings.py")
    page = tool.PAGE.read_text()
    assert page == tool.current(page), "run: python tools/megatron_settings.py"
    assert page.count("\n| `") > 100


def test_names_are_retired_once_and_have_a_successor():
    page = (DOCS / "vocabulary.md").read_text()
    part = page[page.index("## Retired names") :].split("\n## ")[0]
    rows = [line for line in part.splitlines() if line.startswith("| `")]
    retired = _TABLE.findall(part)
    assert len(rows) == len(retired) > 20
    assert len(set(retired)) == len(retired)
    assert all(row.rstrip(" |").count("|") == 2 for row in rows)


@pytest.mark.parametrize("name", ["first_token", "architecture"])
def test_pictures_are_those_of_their_scripts(name):
    script = load(f"docs/figures/{name}.py")
    assert script.PICTURE.read_text() == script.draw(), f"run: python docs/figures/{name}.py"


def test_the_readme_quotes_the_result_files():
    readme = (ROOT / "README.md").read_text()
    runs = json.loads((DOCS / "results" / "cluster.json").read_text())["runs"]
    run = next(run for run in runs if (run["shape"], run["tokens"]) == ("gqa", 8192))
    assert run["balanced_rate"] == "120mbit"
    seconds = {name: curve["120mbit"]["ttft_s"] for name, curve in run["curves"].items()}
    quoted = {
        f"**{seconds['tp-chunked-2048'] / seconds['csa-pipelined']:.1f}x**",
        f"{seconds['csa-pipelined']:.2f} s",
        f"TP {seconds['tp-chunked-2048']:.2f} s",
        f"one rank {seconds['alone']:.2f} s",
        f"(ring): {seconds['tp-chunked-2048'] / seconds['ring']:.1f}x, {seconds['ring']:.2f} s",
    }
    found = json.loads((DOCS / "results" / "accuracy.json").read_text())["settings"]
    changes = [
        100 * by["text"]["delta_bits_per_byte"] / found["dense"][length]["text"]["bits_per_byte"]
        for length, by in found["keys-d4"].items()
    ]
    quoted.add(f"**{min(changes):+.1f} to {max(changes):+.1f} %**")
    systems = json.loads((DOCS / "results" / "serving-tbt.json").read_text())["systems"]
    yielding, whole = systems["sps2"], systems["whole"]
    quoted |= {
        f"**{1e3 * yielding['disturbed_tbt_s']['p99']:.0f} ms**",
        f"{1e3 * whole['disturbed_tbt_s']['p99']:.0f} ms",
        f"{yielding['ttft_s']['p50']:.1f} s, not {whole['ttft_s']['p50']:.1f} s",
    }
    assert not [words for words in quoted if words not in readme]


@pytest.mark.parametrize("page", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_is_wrapped(page):
    if page.name in ("cli.md", "structure.md") or "results" in page.parts:
        return  # generated
    text = _GENERATED.sub("", page.read_text())
    lines = _FENCE.sub("", text).splitlines()
    long = [line for line in lines if len(line) > MAX_COLUMNS and not line.startswith(("|", "!["))]
    assert not long
