"""Per-token predictions as a Parquet file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch import Callback, LightningModule, Trainer

from ...data.batch import IGNORE_INDEX

SCHEMA = pa.schema(
    [
        ("document", pa.string()),
        ("position", pa.int64()),
        ("token", pa.list_(pa.int32())),
        ("loss", pa.list_(pa.float32())),
        ("correct", pa.list_(pa.bool_())),
    ]
)


class PredictionWriter(Callback):
    """Writes one record a segment: its document, the offset of its first predicted token, and for
    every predicted token its id, its loss in nats and whether it was the most likely one.

    Args:
        path: the file; rank r > 0 writes ``stem.rank-r.parquet`` beside it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._draft = path
        self._writer: pq.ParquetWriter | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the file."""
        if trainer.global_rank:
            self.path = self.path.with_suffix(f".rank-{trainer.global_rank}.parquet")
        self._draft = self.path.with_name(f".{self.path.name}.partial")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = pq.ParquetWriter(self._draft, SCHEMA)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Append a batch's rows, without padding and idle rows."""
        datamodule: Any = getattr(trainer, "datamodule", None)
        names = getattr(datamodule, f"{datamodule.predict_split}_store").names
        records = []
        for row, document in enumerate(outputs["document"].tolist()):
            counted = outputs["target"][row] != IGNORE_INDEX
            if document < 0 or not counted.any():
                continue
            records.append(
                {
                    "document": names[document],
                    "position": int(outputs["position"][row]) + 1,
                    "token": outputs["target"][row][counted].tolist(),
                    "loss": outputs["loss"][row][counted].tolist(),
                    "correct": outputs["correct"][row][counted].tolist(),
                }
            )
        assert self._writer is not None
        if records:
            self._writer.write_table(pa.Table.from_pylist(records, schema=SCHEMA))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the file and give it its name."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self._draft.rename(self.path)
            print(f"predictions: {self.path}")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave no half of a file behind."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self._draft.unlink()
