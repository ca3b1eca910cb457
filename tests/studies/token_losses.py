"""What a model says of each token of some texts, by document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from small import make_data, make_module, make_trainer


class Seen(Callback):
    """Keeps the loss of each token by document."""

    def __init__(self) -> None:
        self.losses: dict[int, list[float]] = {}

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        for document, loss, there in zip(
            outputs["document"].tolist(), outputs["loss"], batch.mask, strict=True
        ):
            self.losses.setdefault(document, []).extend(loss[there].tolist())


def losses(
    texts: Path, *callbacks: Callback, rows: int = 1, **settings: Any
) -> dict[int, list[float]]:
    """Read texts with callbacks and without gradients being refused."""
    seen = Seen()
    trainer = make_trainer(callbacks=[*callbacks, seen], inference_mode=False)
    data = make_data(texts, eval_rows=rows)
    trainer.predict(make_module(**settings), datamodule=data, return_predictions=False)
    return seen.losses


def with_another_end(texts: Path, folder: Path) -> Path:
    """The same texts with other last 40 characters."""
    folder.mkdir()
    for file in texts.iterdir():
        text = file.read_text("utf-8")
        (folder / file.name).write_text(text[:-40] + "z" * 40, "utf-8")
    return folder
