"""A clone works from its root with the requirements installed and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from memorizing_transformers import __main__ as commands

ROOT = Path(__file__).parent.parent
IMPORT = "from memorizing_transformers import MemorizingTransformer as M; print(M.__module__)"


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a clone holds and running needs."""
    folder = tmp_path_factory.mktemp("clone") / "repository"
    folder.mkdir()
    for name in ("src", "configs"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__")
        )
    for name in ("train.py", "memorizing_transformers.py"):
        shutil.copy(ROOT / name, folder)
    return folder


def python(clone: Path, *args: str, cwd: Path | None = None, code: int = 0) -> str:
    """What Python prints in a clone, where packages are installed but this project is not.

    ``-S`` leaves out what an editable install puts on the path; the packages come back by name.
    """
    places = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    done = subprocess.run(
        [sys.executable, "-S", *args],
        cwd=cwd or clone,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_the_package_is_found_by_a_snippet_in_the_root(clone: Path) -> None:
    (clone / "snippet.py").write_text(IMPORT)
    for args in (["snippet.py"], ["-c", IMPORT]):
        assert python(clone, *args).strip() == "memorizing_transformers.pretrained.hub"
    found = python(
        clone, "-c", "import memorizing_transformers as m; print(m.__file__, m.__path__)"
    )
    package = clone / "src" / "memorizing_transformers"
    assert found.strip() == f"{package / '__init__.py'} {[str(package)]}"


def test_it_is_one_package_however_it_is_reached(clone: Path) -> None:
    code = (
        "import memorizing_transformers.errors as a, sys, importlib.util, pickle\n"
        "sys.path.insert(0, 'src')\n"
        "import memorizing_transformers.errors as b\n"
        "assert a is b and pickle.loads(pickle.dumps(a.UserError)) is b.UserError\n"
        "assert importlib.util.find_spec('memorizing_transformers').submodule_search_locations"
    )
    python(clone, "-c", code)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_train_py_runs(clone: Path, elsewhere: bool, tmp_path: Path) -> None:
    args = ["fit", "--config", str(clone / "configs" / "quickstart.yaml"), "--print_config"]
    file = str(clone / "train.py") if elsewhere else "train.py"
    for options in ([], ["-P"] if sys.version_info >= (3, 11) else []):
        found = python(clone, *options, file, *args, cwd=tmp_path if elsewhere else None)
        assert "max_steps:" in found


def test_the_commands_run(clone: Path) -> None:
    args = ["-m", "memorizing_transformers", "estimate", "--config", "configs/quickstart.yaml"]
    assert "parameters" in python(clone, *args)
    missing = ["-m", "memorizing_transformers", "estimate", "--config", "nowhere.yaml"]
    assert "error: " in python(clone, *missing, code=2)


@pytest.fixture(scope="module")
def texts(clone: Path) -> list[str]:
    """Options for a tiny model that trains for a step on texts of the clone."""
    folder = clone / "texts"
    folder.mkdir()
    for number in range(20):
        (folder / f"text{number}.txt").write_text(f"text number {number} " * 30)
    data = ["--data.source=texts", "--data.tokenizer=bytes", "--data.validation_fraction=0.2"]
    return [*data, "--data.test_fraction=0.2", "--model.d_model=16", "--model.memory.size=64"]


def test_the_workers_of_ablate_find_their_package(clone: Path, texts: list[str]) -> None:
    pairs = (option.removeprefix("--").split("=") for option in texts)
    overrides = "\n".join(f"  {key}: {value}" for key, value in pairs)
    plan = f"base: configs/quickstart.yaml\noverrides:\n{overrides}\nseeds: [0]\nout: ablation\n"
    plan += "budget: {tokens: 1024}\nvariants: [{name: smaller, overrides: {model.d_model: 8}}]\n"
    (clone / "plan.yaml").write_text(plan)
    python(clone, "-m", "memorizing_transformers", "ablate", "--plan", "plan.yaml", "--jobs", "2")
    assert "smaller" in (clone / "ablation" / "table.md").read_text()


def test_without_the_requirements_one_line_says_what_to_install(clone: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-S", "train.py", "fit"],
        cwd=clone,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: No module named ")
    assert "pip install -r requirements.txt" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_core_works_without_the_studies(clone: Path, texts: list[str], tmp_path: Path) -> None:
    core = tmp_path / "core"
    shutil.copytree(clone, core)
    with_studies = python(core, "-m", "memorizing_transformers", "--help")
    shutil.rmtree(core / "src" / "memorizing_studies")
    without = python(core, "-m", "memorizing_transformers", "--help")
    for command in ("inspect", "ablate"):
        assert command in with_studies
        assert command not in without
    config = ["--config", "configs/quickstart.yaml", *texts]
    estimate = python(core, "-m", "memorizing_transformers", "estimate", *config[:2])
    assert "parameters" in estimate
    assert python(core, "-c", IMPORT).strip() == "memorizing_transformers.pretrained.hub"
    run = ["--trainer.max_steps=1", "--trainer.limit_val_batches=1", "--final_report=false"]
    assert "training ended at step 1" in python(core, "train.py", "fit", *config, *run)


def entry(module: str) -> Any:
    return EntryPoint("extra", f"{module}:run", "memorizing_transformers.commands")


def test_commands_of_other_packages_join_and_a_deleted_one_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "extra_package.py").write_text("def run() -> None: ...")
    (tmp_path / "lacking_package.py").write_text("import a_package_that_is_not_installed")
    monkeypatch.syspath_prepend(tmp_path)
    found = {}
    for module in ("extra_package", "deleted_package", "deleted_package.commands"):
        monkeypatch.setattr(commands, "entry_points", lambda group, m=module: [entry(m)])
        found[module] = "extra" in commands.all_commands()
    assert found == {
        "extra_package": True,
        "deleted_package": False,
        "deleted_package.commands": False,
    }
    monkeypatch.setattr(commands, "entry_points", lambda group: [entry("lacking_package")])
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_installed"):
        commands.all_commands()
