"""Plans: what is refused before anything runs, and how variants differ from the base."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from memorizing_studies.ablation.plan import build, check
from memorizing_studies.ablation.plan_file import load_plan
from memorizing_transformers.__main__ import main
from memorizing_transformers.errors import UserError
from memorizing_transformers.model import Transformer

ROOT = Path(__file__).parent.parent.parent
PLANS = sorted((ROOT / "configs" / "ablations").glob("*.yaml"))
GOOD: dict[str, Any] = {
    "budget": {"tokens": 640},
    "variants": [{"name": "small", "overrides": {"model.memory.size": 8}}],
}


def variant(**fields: Any) -> dict[str, Any]:
    return {"variants": [{"name": "x", **fields}]}


def write(path: Path, base: Path, /, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump({"base": str(base), **GOOD, **changes}))
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"variants": []}, "variants = []"),
        ({"varaints": []}, "varaints"),
        ({"base": "nowhere.yaml"}, "nowhere.yaml"),
        ({"budget": {}}, "budget"),
        ({"budget": {"tokens": 10, "minutes": 1}}, "budget"),
        ({"budget": {"tokens": 0}}, "budget"),
        ({"budget": {"hours": 1}}, "hours"),
        ({"budget": {"tokens": 10}}, "less than one step (64)"),
        ({"seeds": [0, 0]}, "seeds"),
        ({"seeds": [-1]}, "seeds"),
        ({"split": "train"}, "split"),
        ({"reference": "nobody"}, "reference"),
        ({"overrides": {"data.seed": 3}}, "data.seed"),
        (variant(overides={}), "overides"),
        (variant(overrides={"model.memory.sise": 8}), "model.memory.size"),
        (variant(overrides={"model.memory.size": -1}), "model.memory.size = -1"),
        (variant(overrides={"model.memory.size": "many"}), "many"),
        (variant(overrides={"model.memory.size": 2}), "model.memory.top_k"),
        (variant(overrides={"trainer.max_steps": 9}), "trainer.max_steps"),
        (variant(run="test"), "run"),
        (variant(**{"from": "nobody"}), "nobody"),
        (variant(**{"from": "x"}), "circular"),
        (variant(budget={"tokens": 640}), "budget"),
        ({"variants": [{"name": "base"}]}, "base"),
        ({"variants": [{"name": "x"}, {"name": "x"}]}, "twice"),
        ({"variants": [{"name": "../x"}]}, "../x"),
        ({"variants": [{"name": False}]}, "in quotes"),
        ({"variants": [{"name": ".."}]}, ".."),
        ({"variants": [{"name": "x" * 300}]}, "xxx"),
        ({"variants": [{"name": "tensorboard"}]}, "tensorboard"),
        ({"variants": [{"name": "x"}, {"name": "X"}]}, "twice"),
        ({"budget": {"minutes": float("inf")}}, "inf"),
        ({"budget": {"minutes": 0.001}}, "0.001"),
        ({"seeds": [2**32]}, "4294967296"),
        (variant(**{"from": ["base"]}), "['base']"),
        (variant(overrides={"trainer": {"max_epochs": 1}}), "overrides.trainer.max_epochs"),
        (variant(overrides={"data": {"seed": 3}}), "overrides.data.seed"),
        (variant(overrides={"data.source": date(2020, 1, 1)}), "quotes"),
        (variant(overrides={"print_config": True}), "print_config"),
        ({"overrides": {"data.test_fraction": 0.0}}, "data.test_fraction"),
        (variant(overrides={"data.test_source": "/nowhere"}), "data.test_source = '/nowhere'"),
        (variant(overrides={"data.source": "/nowhere"}), "data.source = '/nowhere'"),
        ({"variants": [{"overrides": {}}]}, "name"),
        (variant(overrides={"model.d_ff": 8, "model": {"d_ff": 16}}), "model.d_ff is given twice"),
        (variant(overrides={"model": {"d_ff": 16}, "model.d_ff": 8}), "model.d_ff is given twice"),
        ({"variants": [{"name": "\u8a9e" * 100}]}, "200 bytes"),
        ({"seeds": [0.0]}, "seeds = [0.0]"),
        ({"seeds": [True]}, "seeds = [True]"),
        ({"base": "a\0b"}, "base = 'a\\x00b'"),
    ],
)
def test_bad_plans_are_refused_before_anything_runs(
    changes: dict[str, Any],
    said: str,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = write(tmp_path / "plan.yaml", base, **changes)
    command = ["ablate", "--plan", str(plan), "--jobs", "0", "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["memorizing_transformers", *command])
    with pytest.raises(SystemExit) as left:
        main()
    error = capsys.readouterr().err
    assert left.value.code == 2
    assert len(error.strip().splitlines()) == 1
    assert said in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"budget: {tokens: 640}\nbudget: {tokens: 1280}\n", "budget is given twice"),
        ("variants: [{name: \u00e9}]".encode("latin-1"), "UTF-8"),
        (b"a: " + b"{b: " * 2000 + b"}" * 2000, r"nested too deeply|nesting depth"),
    ],
)
def test_bad_files_are_refused(text: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_bytes(text)
    with pytest.raises(UserError, match=said):
        load_plan(tmp_path / "plan.yaml")


def test_mappings_that_contain_themselves_are_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(
        f"base: {base}\nbudget: {{tokens: 640}}\n"
        "variants: [{name: a, overrides: &a {model: *a}}]\n"
    )
    with pytest.raises(UserError, match="nested too deeply"):
        load_plan(tmp_path / "plan.yaml")


@pytest.mark.parametrize("content", [b"\xff\xfe", b""])
def test_a_base_that_is_not_a_config_is_named(content: bytes, base: Path, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"base = '.*base\.yaml': "):
        load_plan(write(tmp_path / "plan.yaml", tmp_path / "base.yaml"))


def test_a_key_may_replace_one_of_a_merged_mapping(base: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(
        f"base: {base}\nbudget: {{tokens: 640}}\nvariants:\n"
        "  - {name: a, overrides: &a {model.d_model: 8, model.d_ff: 8}}\n"
        "  - {name: b, overrides: &b {<<: *a, model.d_ff: 16}}\n"
        "  - {name: c, overrides: {<<: *b, model.d_ff: 32}}\n"
    )
    plan = load_plan(tmp_path / "plan.yaml")
    assert [plan.variant(name).overrides["model.d_ff"] for name in "abc"] == [8, 16, 32]


@pytest.mark.parametrize("overrides", ["data.source=texts", [1], {3: 4}])
def test_overrides_that_are_no_mapping_are_refused(
    overrides: Any, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"overrides = .*must map keys to values"):
        load_plan(write(tmp_path / "plan.yaml", base), overrides)


@pytest.mark.parametrize("out", [3, "", "a\0b"])
def test_a_folder_that_is_no_path_is_refused(out: object, base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="out = "):
        load_plan(write(tmp_path / "plan.yaml", base, out=out))
    if out == "a\0b":
        with pytest.raises(UserError, match="out = "):
            load_plan(write(tmp_path / "plan.yaml", base), out=out)
        with pytest.raises(UserError, match="plan = "):
            load_plan(out)


def test_nested_overrides_are_dotted_ones(base: Path, tmp_path: Path) -> None:
    nested = {"model": {"memory": {"size": 16}, "d_ff": 8}}
    plan = write(tmp_path / "plan.yaml", base, variants=[{"name": "x", "overrides": nested}])
    assert load_plan(plan).variant("x").overrides == {"model.memory.size": 16, "model.d_ff": 8}


def test_a_base_with_a_limit_of_its_own_is_refused(base: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(base.read_text())
    config["trainer"]["max_epochs"] = 1
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"trainer\.max_epochs = 1"):
        check(load_plan(write(tmp_path / "plan.yaml", tmp_path / "base.yaml")))


def test_overrides_of_the_command_replace_those_of_the_plan(base: Path, tmp_path: Path) -> None:
    plan = write(tmp_path / "plan.yaml", base, overrides={"model.d_model": 32, "model.d_ff": 16})
    loaded = load_plan(plan, {"model.d_ff": 24})
    resolved = check(loaded)["small"]
    assert (resolved["model.d_model"], resolved["model.d_ff"]) == (32, 24)
    assert resolved["model.memory.size"] == 8


def test_a_budget_of_minutes_limits_the_time(base: Path, tmp_path: Path) -> None:
    loaded = load_plan(write(tmp_path / "plan.yaml", base, budget={"minutes": 90.5}))
    assert check(loaded)["small"]["trainer.max_time"] == "00:01:30:30"


@pytest.mark.parametrize(
    ("change", "run", "said"),
    [
        ({"model.memory.combine": "joint-bias"}, "evaluate", "'joint-bias' (there: 'evidence')"),
        ({"model.value_residual": True}, "evaluate", "model.value_residual = True (there: False)"),
        ({"model.d_model": 48}, "train", "model.d_model = 48 (there: "),
        ({"model.memory.copy": ["repeats"]}, "evaluate", "lacks"),
        ({"model.activation": "relu2"}, "evaluate", "model.activation = 'relu2' (there: 'relu')"),
        ({"model.activation": "relu2"}, "train", "model.activation = 'relu2' (there: 'relu')"),
        ({"model.relative_max_distance": 256}, "train", "model.relative_max_distance = 256"),
        ({"model.vocab_size": 999}, "train", "another shape of embedding.weight"),
    ],
    ids=["meaning", "base", "shape", "copies", "function", "trained", "distance", "vocabulary"],
)
def test_weights_that_a_variant_cannot_take_over_are_named_before_any_training(
    base: Path, tmp_path: Path, change: dict[str, Any], run: str, said: str
) -> None:
    first = {"name": "first", "overrides": {"model.memory.combine": "evidence"}}
    variants = [first, {"name": "x", "from": "first", "overrides": change, "run": run}]
    plan = load_plan(write(tmp_path / "plan.yaml", base, variants=variants))
    with pytest.raises(UserError) as caught:
        check(plan)
    assert str(caught.value).startswith("variants.x.from: ")
    assert said in str(caught.value)
    # What trains keeps its start where the base has no such weights.
    variants[1].update(run="train", overrides={"model.memory.copy": ["repeats"]})
    check(load_plan(write(tmp_path / "plan.yaml", base, variants=variants)))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_variants_build_and_change_only_their_overrides(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    plan = load_plan(path)
    base: dict[str, Any] = {}
    for one in plan.variants:
        cli, config = build(plan, one, plan.seeds[0])
        base = base or config
        assert config.keys() == base.keys()
        changed = {key for key in config if config[key] != base[key]}
        # The budget is other steps if a step reads more tokens, or if the budget is smaller.
        allowed = {"trainer.max_steps"} if one.budget is not None else set()
        assert changed - allowed <= set(one.overrides), one.name
        assert changed or not one.overrides, one.name
        cli.model.config.vocab_size = 512
        with torch.device("meta"):
            Transformer(cli.model.config)


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_header_names_the_command(path: Path) -> None:
    command = f"ablate --plan {path.relative_to(ROOT).as_posix()}"
    assert command in path.read_text()


def test_seeds_change_only_weights_and_document_order(base: Path, tmp_path: Path) -> None:
    plan = load_plan(write(tmp_path / "plan.yaml", base, seeds=[0, 1]))
    one, other = (build(plan, plan.variants[1], seed)[1] for seed in plan.seeds)
    assert {k for k in one if one[k] != other[k]} == {"seed_everything", "data.seed"}


def test_an_unreadable_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        load_plan(tmp_path / "nowhere.yaml")
    (tmp_path / "plan.yaml").write_text("a: [")
    with pytest.raises(UserError, match="not valid YAML"):
        load_plan(tmp_path / "plan.yaml")
