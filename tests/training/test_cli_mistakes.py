"""How the command line speaks of mistakes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from small import Run, command, make_data

from memorizing_transformers.failures import DEBUG_VARIABLE
from memorizing_transformers.training import cli
from memorizing_transformers.training.module import MemorizingLM


def error_of(*args: Any) -> str:
    """The one line that a mistake gets."""
    code, out, err = command(*args)
    assert code == 2
    assert "Traceback" not in out + err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert err.rstrip().endswith(lines[0])
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--model.memory.sise=3", "did you mean model.memory.size?"),
        ("--modle.memory.size=3", "did you mean model.memory.size?"),
        ("--trainer.max_step=3", "did you mean trainer.max_steps?"),
        ("--batch_rows=3", "did you mean data.batch_rows?"),
        ("--model.inspect_every_n_steps=3", "model.inspect_every_n_steps: was removed; list Ret"),
        ("--model.staleness_every_n_steps=3", "StalenessLogging and StepTiming, each with every_n"),
        ("--model.memory.size=big", "model.memory.size"),
        ("--model.memory.size=-1", "model.memory.size = -1: must be at least 0"),
        ("--model.memory.top_k=33", "model.memory.top_k = 33: must be at most model.memory.size"),
        ("--model.memory.layers=[2]", "model.memory.layers = [2]: each must lie between 0 and 1"),
        ("--model.num_heads=3", "model.num_heads = 3: must divide model.d_model (16)"),
        ("--model.num_kv_heads=3", "model.num_kv_heads = 3: must divide model.num_heads (2)"),
        ("--model.memory.combine=sum", "must be one of gate, fixed, content, joint"),
        ("--model.optimizer.betas=[0.9,1.5]", "model.optimizer.betas = (0.9, 1.5): each must lie"),
        ("--data.segment_length=0", "data.segment_length = 0: must be at least 1"),
        ("--data.source=nowhere.txt", "data.source = 'nowhere.txt': no such file or folder"),
        ("--trainer.devices=0", "devices='0'"),
        ("--trainer.strategy=magic", "trainer: You selected an invalid strategy name"),
        ("--trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches = 0: must be 1"),
        ("--trainer.gradient_clip_val=-1", "trainer.gradient_clip_val = -1"),
        ("--trainer.gradient_clip_val=.nan", "trainer.gradient_clip_val = nan"),
        ("--trainer.val_check_interval=0", "trainer.val_check_interval = 0: must be 1 batch"),
        ("--trainer.val_check_interval=0.0", "trainer.val_check_interval = 0.0: must be 1 batch"),
        ("--trainer.val_check_interval=-3", "trainer.val_check_interval = -3: must be 1 batch"),
        ("--trainer.check_val_every_n_epoch=0", "trainer.check_val_every_n_epoch = 0: must be 1"),
        ("--trainer.default_root_dir=null", "trainer.default_root_dir = None: must name a folder"),
        ("--trainer.default_root_dir=/dev/null/runs", "'/dev/null/runs': cannot be written"),
        ("--seed_everything=-1", "seed_everything = -1: must lie in"),
        ("--ckpt_path=nowhere.ckpt", "ckpt_path = 'nowhere.ckpt': there is no such"),
        ("--ckpt_path=last", "ckpt_path = 'last': no checkpoint in"),
        ("--config=nowhere.yaml", "File does not exist: '"),
    ],
)
def test_a_mistake_gets_one_line_and_nothing_is_written(
    config: Path, argument: str, message: str
) -> None:
    assert message in error_of("fit", "--config", config, argument)
    assert [*config.parent.iterdir()] == [config]


CALLBACKS = "lightning.pytorch.callbacks"


def callback(name: str, **arguments: Any) -> str:
    """The argument that gives a run one callback, of Lightning unless it is a full path."""
    path = name if "." in name else f"{CALLBACKS}.{name}"
    return "--trainer.callbacks=" + json.dumps([{"class_path": path, "init_args": arguments}])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (callback("LearningRateFinder"), "trainer.callbacks: LearningRateFinder: AttributeError"),
        (callback("BatchSizeFinder"), "trainer.callbacks: BatchSizeFinder: Field batch_size"),
        (callback("BackboneFinetuning"), "trainer.callbacks: BackboneFinetuning: AttributeError"),
        (callback("StochasticWeightAveraging", swa_lrs=0.01), "StochasticWeightAveraging: SWA"),
        (callback("EarlyStopping", monitor="val/x", mode="up"), "EarlyStopping: `mode` can be"),
        (callback("EarlyStopping", monitr="val/x"), "EarlyStopping: Option 'monitr' is not acc"),
        (callback("EarlyStopping", monitr="val/x"), "did you mean monitor?"),
        (callback("EarlyStopping", monitor="val/los"), "'val/los': is not logged in training; did"),
        (callback("ModelCheckpoint", monitor="val/los"), "ModelCheckpoint: monitor = 'val/los'"),
        (callback("ModelCheckpoint", monitor="train/x"), "monitor = 'train/x': is not logged"),
        (callback("EarlyStopping", monitor="test/loss"), "did you mean"),
        (callback("LearningRateMonitor", logging_interval="day"), "logging_interval = day: must"),
        (callback("Timer", duration="soon"), "trainer.callbacks: Timer: `Timer(duration='soon')`"),
        (callback("ModelCheckpoint", save_top_k=-5), "ModelCheckpoint: Invalid value for save_to"),
        (callback("GradientAccumulationScheduler", scheduling={"a": 1}), "scheduling: invalid"),
        (callback("Nothing"), "trainer.callbacks = [{'class_path': 'lightning.pytorch.callba"),
        (callback("no.such.Thing"), "No module named 'no'"),
        (callback("os.path.join"), "must be a subclass of Callback"),
        ("--trainer.devices=-1", "trainer: TypeError: `devices` selected with `CPUAccelerator`"),
        ("--trainer.strategy=ddp_spawn", "trainer.strategy: processes copied from this one"),
        ("--trainer.strategy=ddp_fork", "use trainer.strategy=ddp"),
        ("--trainer.accelerator=quantum", "trainer: You selected an invalid accelerator"),
        ("--trainer.precision=7", "trainer.precision = 7: must be 64, 32, 16"),
        ("--trainer.precision=transformer-engine", "trainer.precision: TransformerEngine"),
        ("--trainer.profiler=fast", "trainer: When passing string value for the `profiler`"),
        ("--trainer.profiler=xla", "trainer.profiler: XLAProfiler: Requirement"),
        ("--trainer.logger=WandbLogger", "trainer.logger"),
        ("--trainer.logger=TensorBoardLogger", "trainer.logger: TensorBoardLogger: the following"),
        ("--trainer.plugins=Nope", "trainer.plugins = Nope: must be"),
        ("--trainer.max_time=soon", "trainer.callbacks: Timer:"),
        ("--trainer.min_steps=many", "trainer.min_steps = many: must be int, null"),
        ("--trainer.fast_dev_run=3.5", "trainer.fast_dev_run = 3.5: must be int, bool"),
        ("--trainer.limit_val_batches=-3", "trainer: You have passed invalid value -3"),
        ("--trainer.gradient_clip_algorithm=soft", "trainer: `gradient_clip_algorithm` soft"),
        ("--model.optimizer.name=sgdx", "model.optimizer.name = 'sgdx': must be adamw, adafactor"),
        ("--trainer.max_steps=0", "trainer.max_steps = 0: cosine needs an end; give 1 or more"),
        ("--model=5", "model"),
    ],
)
def test_a_mistake_that_a_library_finds_gets_one_line(
    config: Path, argument: str, message: str
) -> None:
    line = error_of("fit", "--config", config, argument)
    assert message in line
    assert len(line) < 400


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (callback("EarlyStopping", monitor="nothing"), "trainer.callbacks: EarlyStopping: E"),
        (callback("ModelCheckpoint", monitor="nothing"), "`ModelCheckpoint(monitor='nothing')"),
        (callback("ModelCheckpoint", filename="{x"), "trainer.callbacks: ModelCheckpoint: expect"),
        (callback("ModelCheckpoint", dirpath="/dev/null/x"), "/dev/null/x"),
    ],
)
def test_a_mistake_that_shows_during_training_gets_one_line(
    config: Path, argument: str, message: str
) -> None:
    assert message in error_of("fit", "--config", config, argument, "--trainer.max_steps=8")


def test_a_fault_of_the_program_gets_one_line_and_another_exit_code(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise IndexError("off by one")

    monkeypatch.setenv(DEBUG_VARIABLE, "")
    monkeypatch.setattr(MemorizingLM, "log_training", fail)
    code, _, err = command("fit", "--config", config)
    assert code == 1
    assert err.splitlines()[-1] == "error: IndexError: off by one; --debug shows where"
    assert "Traceback" not in err
    code, _, err = command("fit", "--config", config, "--debug")
    assert code == 1
    assert "in log_training" not in err  # it is replaced
    assert "in training_step" in err
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(MemorizingLM, "configure_optimizers", fail)
    assert command("fit", "--config", config)[0] == 2


def test_callbacks_with_members_of_enumerations_work(config: Path) -> None:
    given = callback("Timer", duration="00:00:10:00")
    assert command("fit", "--config", config, given, "--trainer.max_steps=2")[0] == 0


@pytest.mark.parametrize(
    ("command_name", "key"),
    [("fit", "train"), ("validate", "val"), ("test", "test"), ("predict", "predict")],
)
def test_a_command_without_batches_says_so(config: Path, command_name: str, key: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        command(command_name, "--config", config, f"--trainer.limit_{key}_batches=0")
    said = [str(warning.message) for warning in caught]
    assert f"trainer.limit_{key}_batches = 0: {command_name} has nothing to do" in said


@pytest.mark.parametrize(("precision", "fast"), [("bf16-mixed", False), ("bf16-mixed", True),
                                                 ("32-true", False)])  # fmt: skip
def test_bfloat16_that_this_cpu_must_emulate_is_warned_of(
    config: Path, precision: str, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "has_fast_bfloat16", lambda: fast)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        given = ["--trainer.max_steps=1", f"--trainer.precision={precision}"]
        assert command("fit", "--config", config, *given)[0] == 0
    said = [x for x in caught if "no instructions for bfloat16" in str(x.message)]
    assert bool(said) == (precision != "32-true" and not fast)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {batch_rows: 2}\ndata: {seed: 3}", "data is given twice, in lines 1 and 2"),
        ("model:\n  d_ff: 8\n  d_ff: 9", "model.d_ff is given twice, in lines 2 and 3"),
        ('{"model": {"d_ff": 8,\n "d_ff": 8}}', "model.d_ff is given twice, in lines 1 and 2"),
        ("data.seed: 2\ndata: {seed: 3}", "data.seed is given twice, in lines 1 and 2"),
        ("model: {memory: {sise: 3}}", "'model.memory.sise'; did you mean model.memory.size?"),
        ("data: {bach_rows: 3}", "'data.bach_rows'; did you mean data.batch_rows?"),
        ("trainr: {max_steps: 3}", "'trainr.max_steps'; did you mean trainer.max_steps?"),
        ("model: [1", "Problems parsing config"),
    ],
)
def test_a_mistake_in_a_file_gets_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.yaml").write_text(text + "\n")
    assert message in error_of("fit", "--config", tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config: base.yaml\ntrainer: {max_steps: 3}", "give trainer.max_steps: ..."),
        ("config: base.yaml\nmodel.memory: {size: 3}", "give model.memory.size: ..."),
        ("config: base.yaml\ntrainer.callbacks+: []", "the complete list as trainer.callbacks"),
        ("trainer.max_steps: 3\nconfig: base.yaml", "first key of its file, not below trainer.max"),
        ("config: [base.yaml]", "config = ['base.yaml']: must be the path of one file"),
        ("config: nowhere.yaml", "File does not exist: '"),
        ("config: over.yaml", "loop detected"),
    ],
)
def test_what_a_base_would_lose_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "base.yaml").write_text("trainer: {devices: 1}\nmodel.memory.top_k: 3\n")
    (tmp_path / "over.yaml").write_text(text + "\n")
    assert message in error_of("fit", "--config", tmp_path / "over.yaml")


def test_no_subcommand_and_a_wrong_one_get_one_line() -> None:
    for args in ([], ["fitt"]):
        line = error_of(*args)
        assert all(name in line for name in ("fit", "validate", "test", "predict"))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--model.d_model=32", "model.d_model = 32 (checkpoint: 16)"),
        ("--model.memory.layers=[0]", "model.memory.layers = [0] (checkpoint: [1])"),
        ("--model.memory.layers=[]", "model.memory.layers = [] (checkpoint: [1])"),
        ("--model.memory.combine=joint", "model.memory.combine = joint (checkpoint: gate)"),
        ("--data.tokenizer=bpe", "model.vocab_size"),
        ("--data.test_fraction=0", "data.test_fraction = 0: there are no documents for test"),
    ],
)
def test_a_checkpoint_that_does_not_fit_gets_one_line(
    run: Run, argument: str, message: str
) -> None:
    args = ("test", "--config", run.config, "--ckpt_path", run.checkpoint, argument)
    assert message in error_of(*args)


def test_a_checkpoint_of_another_tokenizer_gets_one_line(run: Run, tmp_path: Path) -> None:
    # As many tokens, but other ids.
    swapped = make_data(run.config.parent).text_tokenizer
    folder = tmp_path / "tokenizer"
    swapped.save_pretrained(folder)
    file = folder / "tokenizer.json"
    rules = json.loads(file.read_text())
    vocabulary = rules["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(rules))
    args = ("test", "--config", run.config, "--ckpt_path", "last", f"--data.tokenizer={folder}")
    assert "data.tokenizer: not the checkpoint's tokenizer" in error_of(*args)


@pytest.mark.parametrize("name", ["file.ckpt", "folder.ckpt"])
def test_what_is_no_checkpoint_gets_one_line(config: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "file.ckpt").write_text("hello")
    (tmp_path / "folder.ckpt").mkdir()
    line = error_of("test", "--config", config, "--ckpt_path", tmp_path / name)
    assert line.startswith("ckpt_path")
    assert name in line


def test_a_loss_that_is_no_number_ends_with_one_line(config: Path) -> None:
    line = error_of("fit", "--config", config, "--model.optimizer.lr=1e30")
    assert line.startswith("train/loss = nan at step ")
    assert "model.optimizer.lr (now 1e+30)" in line


def test_cosine_without_an_end_gets_one_line(config: Path) -> None:
    args = ("--trainer.max_steps=-1", "--trainer.max_epochs=1")
    line = error_of("fit", "--config", config, *args)
    assert line.startswith("model.optimizer.total_steps = None: cosine needs an end")
