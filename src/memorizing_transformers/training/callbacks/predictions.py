"""Per-token predictions and per-document figures as Parquet files."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ...data.batch import IGNORE_INDEX

TOKENS = {
    "document": pa.string(),
    "position": pa.int64(),
    "token": pa.list_(pa.int32()),
    "loss": pa.list_(pa.float32()),
    "correct": pa.list_(pa.bool_()),
}
NEIGHBOURS = {
    "share": pa.list_(pa.float32()),
    "head": pa.list_(pa.int32()),
    "neighbour": pa.list_(pa.int64()),
    "distance": pa.list_(pa.int64()),
    "weight": pa.list_(pa.float32()),
}
"""For each memory layer, as ``layer2_share`` etc.: fields of ``BestNeighbour``."""
DOCUMENTS = {
    "document": pa.string(),
    "tokens": pa.int64(),
    "loss": pa.float64(),
    "perplexity": pa.float64(),
    "bits_per_byte": pa.float64(),
    "accuracy": pa.float64(),
}


def part_of(path: Path, rank: int) -> Path:
    """The file that a rank writes: rank r > 0 writes ``stem.rank-r.parquet`` next to rank 0's."""
    return path.with_suffix(f".rank-{rank}.parquet") if rank else path


class PartFile:
    """A Parquet file that gets its name once it is complete.

    Args:
        path: the file; its folder is made.
        columns: names and types.
    """

    def __init__(self, path: Path, columns: dict[str, pa.DataType]) -> None:
        self.path = path
        self.schema = pa.schema(columns)
        self._draft = path.with_name(f".{path.name}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = pq.ParquetWriter(self._draft, self.schema)

    def write(self, records: list[dict[str, Any]]) -> None:
        """Append records."""
        if records:
            self._writer.write_table(pa.Table.from_pylist(records, schema=self.schema))

    def finish(self) -> None:
        """Close the file and give it its name."""
        self._writer.close()
        self._draft.rename(self.path)

    def discard(self) -> None:
        """Remove what was written."""
        self._writer.close()
        self._draft.unlink(missing_ok=True)


class DocumentSums:
    """Sums over the tokens of a document."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)

    def add(self, record: dict[str, Any], num_bytes: float) -> None:
        """Add one segment's record."""
        self.sums["tokens"] += len(record["loss"])
        self.sums["bytes"] += num_bytes
        for name, values in record.items():
            if name in ("loss", "correct") or name.endswith("_share"):
                self.sums[name] += math.fsum(values)

    def record(self) -> dict[str, Any]:
        """The document's figures, by the names of the columns."""
        sums, tokens = self.sums, self.sums["tokens"]
        loss = sums["loss"] / tokens
        shares = {name: sums[name] / tokens for name in sums if name.endswith("_share")}
        return {
            "tokens": int(tokens),
            "loss": loss,
            "perplexity": math.exp(loss),
            "bits_per_byte": sums["loss"] / math.log(2) / sums["bytes"],
            "accuracy": sums["correct"] / tokens,
            **shares,
        }


class PredictionWriter(Callback):
    """Writes one record per segment into one file and one record per document into another.

    A segment's record holds its document, the offset of its first predicted token, and lists with
    one entry per predicted token: its id, its loss in nats, whether it was the most likely token,
    and for each memory layer the neighbour that contributed most to the token before it, which
    predicts it (``BestNeighbour``). A document is on one rank, so it has one record.

    ``train.py predict`` adds it without a config, since its files are all that prediction makes.

    Args:
        path: the file of segments; the file of documents is ``documents.parquet`` next to it. Each
            rank writes its own part of both.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._layers: list[int] = []
        self._documents: dict[int, DocumentSums] = {}
        self._file: PartFile | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Open the file of segments."""
        self._layers = pl_module.memory_layers
        self._documents = {}
        columns = {
            f"layer{layer}_{name}": kind
            for layer in self._layers
            for name, kind in NEIGHBOURS.items()
        }
        self._file = PartFile(part_of(self.path, trainer.global_rank), {**TOKENS, **columns})

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Append the rows of a batch, without padding and without idle rows."""
        lists: dict[str, Tensor] = {
            "token": outputs["target"],
            "loss": outputs["loss"],
            "correct": outputs["correct"],
        }
        for layer in self._layers:
            best = outputs["best"][layer]
            lists |= {f"layer{layer}_{name}": getattr(best, name) for name in NEIGHBOURS}
        lists = {name: tensor.cpu() for name, tensor in lists.items()}
        names = self._names(pl_module)
        records = []
        for row, document in enumerate(outputs["document"].tolist()):
            counted = lists["token"][row] != IGNORE_INDEX
            if document < 0 or not counted.any():
                continue
            record = {
                "document": names[document],
                "position": int(outputs["position"][row]) + 1,
                **{name: tensor[row][counted].tolist() for name, tensor in lists.items()},
            }
            sums = self._documents.setdefault(document, DocumentSums())
            sums.add(record, float(outputs["num_bytes"][row]))
            records.append(record)
        assert self._file is not None
        self._file.write(records)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the file of segments and write that of documents."""
        assert self._file is not None
        self._file.finish()
        print(f"predictions: {self._file.path}")
        self._file = None
        shares = {f"layer{layer}_share": pa.float64() for layer in self._layers}
        path = part_of(self.path.with_name("documents.parquet"), trainer.global_rank)
        documents, names = PartFile(path, {**DOCUMENTS, **shares}), self._names(pl_module)
        documents.write(
            [{"document": names[i], **sums.record()} for i, sums in self._documents.items()]
        )
        documents.finish()
        print(f"documents: {path}")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Remove an incomplete file."""
        if self._file is not None:
            self._file.discard()
            self._file = None

    @staticmethod
    def _names(module: Any) -> list[str]:
        data = module.datamodule
        names: list[str] = getattr(data, f"{data.predict_split}_store").names
        return names
