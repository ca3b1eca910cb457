"""Weights that learn while they read: no document learns from another, none from its future."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from small import command, make_data, make_module, make_trainer, write_config, write_texts
from token_losses import losses, with_another_end

from memorizing_studies.rivals.test_time_training import TestTimeTraining
from memorizing_transformers.errors import ConfigError


def mean(found: dict[int, list[float]]) -> float:
    return fmean(chain.from_iterable(found.values()))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("learning") / "texts")


def test_reading_pays_and_a_step_of_zero_changes_nothing(texts: Path) -> None:
    plain = losses(texts)
    assert losses(texts, TestTimeTraining(0.0)) == plain
    assert mean(losses(texts, TestTimeTraining(0.3))) < mean(plain) - 0.1


def test_each_document_begins_with_the_trained_weights(texts: Path) -> None:
    plain, learned = losses(texts), losses(texts, TestTimeTraining(0.3))
    assert len(plain) == 3
    for document, values in plain.items():
        # Nothing was learned before a document's first segment ended.
        assert learned[document][:16] == values[:16]
        assert learned[document][16:] != values[16:]


def test_a_segment_is_predicted_before_it_is_learned(texts: Path, tmp_path: Path) -> None:
    """Another end of a text changes no loss before it."""
    other = with_another_end(texts, tmp_path / "texts")
    one, changed = (losses(folder, TestTimeTraining(0.3)) for folder in (texts, other))
    for document, values in one.items():
        assert len(values) == len(changed[document])
        assert values[:-41] == changed[document][:-41]
        assert values[-30:] != changed[document][-30:]


def test_the_trained_weights_come_back(texts: Path) -> None:
    module = make_module()
    data = make_data(texts, eval_rows=1)
    trainer = make_trainer(inference_mode=False)
    trainer.test(module, datamodule=data, verbose=False)
    before = {name: x.clone() for name, x in module.state_dict().items()}
    trainer = make_trainer(callbacks=[TestTimeTraining(0.3)], inference_mode=False)
    trainer.test(module, datamodule=data, verbose=False)
    assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())


def test_the_trained_weights_come_back_after_an_error(texts: Path) -> None:
    class Stop(Callback):
        def on_test_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
            if trainer.test_loop.batch_progress.current.ready > 3:
                raise RuntimeError("stopped here")

    module, data = make_module(), make_data(texts, eval_rows=1)
    make_trainer(inference_mode=False).test(module, datamodule=data, verbose=False)
    before = {name: x.clone() for name, x in module.state_dict().items()}
    trainer = make_trainer(callbacks=[TestTimeTraining(0.3), Stop()], inference_mode=False)
    with pytest.raises(RuntimeError, match="stopped here"):
        trainer.test(module, datamodule=data, verbose=False)
    assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())


def test_it_computes_in_the_precision_of_the_trainer(texts: Path) -> None:
    seen: list[torch.dtype] = []

    class Watch(Callback):
        def on_test_start(self, trainer: Any, pl_module: Any) -> None:
            part = pl_module.net.layers[0].feed_forward
            part.register_forward_hook(lambda *args: seen.append(args[2].dtype))

    callbacks = [Watch(), TestTimeTraining(0.1)]
    trainer = make_trainer(callbacks=callbacks, inference_mode=False, precision="bf16-mixed")
    trainer.test(make_module(), datamodule=make_data(texts, eval_rows=1), verbose=False)
    assert len(seen) > 2
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize(
    ("rows", "inference", "key"),
    [(1, True, "trainer.inference_mode = True"), (3, False, "data.eval_rows = 3")],
)
def test_what_it_cannot_do_ends_in_one_line(
    texts: Path, rows: int, inference: bool, key: str
) -> None:
    trainer = make_trainer(callbacks=[TestTimeTraining()], inference_mode=inference)
    with pytest.raises(ConfigError, match=key):
        trainer.test(make_module(), datamodule=make_data(texts, eval_rows=rows), verbose=False)


@pytest.mark.parametrize(
    ("rows", "inference", "key"),
    [(1, True, "trainer.inference_mode = True"), (3, False, "data.eval_rows = 3")],
)
def test_a_fit_is_refused_before_it_trains(
    texts: Path, rows: int, inference: bool, key: str
) -> None:
    """Its final table would be refused only after the training."""
    trainer = make_trainer(callbacks=[TestTimeTraining()], inference_mode=inference, max_steps=2)
    with pytest.raises(ConfigError, match=key):
        trainer.fit(make_module(), datamodule=make_data(texts, eval_rows=rows))
    assert trainer.global_step == 0


def test_a_validation_and_a_fit_with_gradients_are_not_refused(texts: Path) -> None:
    data = make_data(texts, eval_rows=1)
    trainer = make_trainer(callbacks=[TestTimeTraining()])
    trainer.validate(make_module(), datamodule=data, verbose=False)
    callbacks = [TestTimeTraining()]
    trainer = make_trainer(callbacks=callbacks, inference_mode=False, max_steps=2)
    trainer.fit(make_module(), datamodule=data)
    assert trainer.global_step == 2


@pytest.mark.parametrize("lr", [-1.0, float("nan"), float("inf")])
def test_a_rate_that_is_none_ends_in_one_line(lr: float) -> None:
    with pytest.raises(ConfigError, match=f"lr = {lr}"):
        TestTimeTraining(lr)


def test_from_the_command_line(texts: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", texts, tmp_path / "runs")
    assert command("fit", "--config", config, "--trainer.max_steps", 20)[0] == 0
    arguments = ["test", "--config", config, "--ckpt_path", "last", "--data.eval_rows", 1]
    rival = "--trainer.callbacks+=memorizing_studies.rivals.test_time_training.TestTimeTraining"
    code, _, err = command(*arguments, rival)
    assert code == 2
    assert "trainer.inference_mode" in err
    code, out, err = command(*arguments, rival, "--trainer.inference_mode", "false")
    assert code == 0, err
    assert "test/perplexity" in out
