"""Every recipe of docs/extending.md, applied to a copy of the repository and run."""

from __future__ import annotations

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
RECIPES = {
    title: text for title, text in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
}
LONGEST = 15
SHORT = [
    "--trainer.max_steps=2",
    "--trainer.limit_val_batches=1",
    "--trainer.log_every_n_steps=1",
    "--final_report=false",
    "--model.d_model=16",
    "--model.memory.size=64",
    "--data.tokenizer=bytes",
    "--data.validation_fraction=0.2",
    "--data.test_fraction=0.2",
]


def blocks(language: str, recipe: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", RECIPES[recipe], re.M | re.S)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A copy with texts in it, and a table of texts for the recipe that reads tables."""
    for name in ("src", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.egg-info"))
    shutil.copy(ROOT / "train.py", tmp_path)
    texts = [f"text number {number} " * 30 for number in range(20)]
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    with (tmp_path / "books.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["name", "body"], *enumerate(texts)])
    return tmp_path


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_short_and_works(recipe: str, repository: Path) -> None:
    code = blocks("python", recipe)
    if code:
        (file,) = re.findall(r"^(?:.* )?`(src/[\w/]+\.py)`:$", RECIPES[recipe], re.M)
        assert len([line for line in code[0].split("\n") if line.strip()]) <= LONGEST
        with (repository / file).open("a") as source:
            source.write("\n\n" * (source.tell() > 0) + code[0])
    (command,) = blocks("bash", recipe)
    arguments = shlex.split(command)
    assert arguments[:2] == ["python", "train.py"]
    source = [] if "--data.source" in arguments else ["--data.source=texts"]
    done = subprocess.run(
        [sys.executable, "train.py", *arguments[2:], *SHORT, *source],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": "src", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "training ended at step 2" in done.stdout + done.stderr


def test_the_page_has_the_five_recipes() -> None:
    assert len(RECIPES) == 5
    assert "docs/extending.md" in (ROOT / "README.md").read_text(encoding="utf-8")
