"""The house around the code: links lead somewhere, and files speak of nobody's machine."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "data" / "README.md"]
LINK = re.compile(r"\]\(([^)\s]+)\)")

# Written in parts, so that this file does not find itself.
MACHINE = re.compile(r"(?<!\w)/" + r"work\b|/(?:home|Users)" + r"/\w")
REGISTRY = re.compile(r"pypi\." + r"org|python" + r"hosted|index" + r"-url|download\.py" + "torch")


def tracked_texts() -> dict[str, str]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listing.stdout.split("\0") if name]
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for path in paths
        if path.is_file() and b"\0" not in path.read_bytes()
    }


def anchors(page: Path) -> set[str]:
    """The names that headings can be linked by."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_local_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_no_file_names_a_private_path_or_a_registry() -> None:
    texts = tracked_texts()
    for pattern in (MACHINE, REGISTRY):
        found = [name for name, text in texts.items() if pattern.search(text)]
        assert not found, pattern.pattern


def test_paths_of_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text()
    rooms = r"(?:configs|data|docs|src|tests|benchmarks|\.ci|\.github)"
    for path in set(re.findall(rf"`({rooms}/[\w./-]+)`", text)):
        if not path.startswith("data/") or path == "data/README.md":
            assert (ROOT / path).exists(), path


def test_ci_runs_what_the_readme_says() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert {"make lint", "make type", "make test"} <= set(script.splitlines())
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
    assert ".ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert "make test" in (ROOT / "README.md").read_text()


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    # Under another make, this one would announce the folders it enters.
    alone = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    shown = subprocess.run(
        ["make", "help"], cwd=ROOT, env=alone, capture_output=True, text=True, check=True
    )
    listed = {line.split()[1] for line in shown.stdout.splitlines()}
    phony = re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)
    assert phony
    assert listed == set(phony[1].split())
