"""All that a first run on a GPU touches, on a pretended device: nothing mixed, same figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended import SAVED, STEPS, make
from small import SEGMENT, Losses, make_data, make_module, scalars
from two_devices import AWAY, CPU, send_away, two_devices

from memorizing_studies.inspection.trace import read_document
from memorizing_transformers.training import final_table as report
from memorizing_transformers.training.callbacks import PredictionWriter
from memorizing_transformers.training.checkpoint.export import load_model

EVERYTHING = {"combine": "content", "position_bias": "t5", "xl_cache": SEGMENT}
STALE = {"refresh_every_n_steps": 3, "drop_after_n_steps": 5, "drop_below_cosine": 0.5}
CASES = [
    pytest.param("cuda", EVERYTHING, id="cuda"),
    pytest.param(
        "mps",
        EVERYTHING,
        id="mps",
    ),
    pytest.param("xpu", {"search": "bucketed", "size": 256}, marks=pytest.mark.slow, id="bucketed"),
    pytest.param("cuda", {"search": "auto", **STALE}, marks=pytest.mark.slow, id="stale"),
    pytest.param(
        "xpu",
        {"dtype": "int8", "activation_checkpointing": True, "combine": "joint"},
        marks=pytest.mark.slow,
        id="int8, recomputed",
    ),
    pytest.param("cuda", {"device": "cpu", "xl_cache": SEGMENT}, marks=pytest.mark.slow, id="host"),
]


def run(root: Path, texts: Path, where: torch.device, **settings: Any) -> dict[str, Any]:
    """Train, resume, validate, test, predict, report; what was seen on the way."""
    torch.manual_seed(0)
    module, data, losses = make_module(**settings), make_data(texts), Losses()
    trainer = make(root, where)
    trainer.callbacks.append(losses)
    trainer.fit(module, datamodule=data)
    report.final_report(trainer, module, data)
    logged = scalars(Path(trainer.log_dir))
    rows = json.loads(Path(trainer.log_dir, "report.json").read_text())["rows"]
    (first, *_) = sorted(Path(trainer.log_dir).rglob(f"*step={SAVED}.ckpt"))
    again, more = make_module(**settings), Losses()
    resumed = make(root / "again", where)
    resumed.callbacks.append(more)
    resumed.fit(again, datamodule=make_data(texts), ckpt_path=str(first))
    writer = PredictionWriter(root / "predictions.parquet")
    make(root / "predict", where, callbacks=[writer]).predict(again, datamodule=make_data(texts))
    model, ids = load_model(first), torch.randint(0, 250, (70,))
    read: Any = read_document.__wrapped__  # the second device knows no inference mode
    with torch.no_grad():
        exported = model(ids[None]).logits
        if where == AWAY:
            send_away(model)
        trace = read(model, ids.numpy(), SEGMENT, 24, 2)
    return {
        "losses": losses.values,
        "resumed": more.values,
        "logged": {
            name: values
            for name, values in logged.items()
            if not name.startswith(("time/", "throughput/"))
        },
        "report": [[row[name] for name in report.METRICS] for row in rows],
        "exported": exported,
        "inspected": [torch.from_numpy(x) for x in (trace.nats, trace.shares)],
    }


@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_a_run_on_another_device_gives_the_same_figures(
    kind: str, settings: dict[str, Any], texts: Path, tmp_path: Path
) -> None:
    """Build, train, validate, log, save, report, resume, predict, export, inspect."""
    here = run(tmp_path / "here", texts, CPU, **settings)
    with two_devices(kind):
        away = run(tmp_path / "away", texts, AWAY, **settings)
    assert len(here["losses"]) == STEPS
    assert here["resumed"] == here["losses"][SAVED:]
    assert away["resumed"] == away["losses"][SAVED:]
    assert away["logged"].keys() == here["logged"].keys() >= {"val/loss", "memory/fill/layer1"}
    torch.testing.assert_close(away, here, rtol=5e-3, atol=5e-3)
