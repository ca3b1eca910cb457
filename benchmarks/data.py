"""What it costs to make tokens of text: against `datasets.map` and datatrove, in time and RAM.

    python benchmarks/data.py --data books.train.jsonl.gz --megabytes 24

All read the same JSON lines, use the same BPE and as many processes (`prepare`: threads), and must
give the same tokens. Each measurement is made in a process of its own, imports not counted.
Contestants take turns. Also measured: RAM of `prepare` at one and ten times the text, a second
start on an unchanged corpus, and the plan of batches for a corpus of PG-19's size.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import chain, pairwise, repeat
from pathlib import Path
from typing import Any

import numpy as np
from measure import circumstances, save, summary, table

from memorizing_transformers.data import train_bpe

CHILD = Path(__file__).with_name("data_contestants.py")
SETTLED = 2.5
"""Seconds after which a file no longer counts as just changed."""
PARTS = ("speed", "ram", "again", "plan")


def made(seed: int = 0) -> Iterator[str]:
    """Texts of drawn words, some frequent and most rare, of 1 to 300 KB; endless."""
    draw = np.random.default_rng(seed)
    ends = np.cumsum(draw.integers(1, 12, size=50_000)).tolist()
    letters = (draw.integers(26, size=ends[-1], dtype=np.uint8) + ord("a")).tobytes().decode()
    words = [letters[begin:end] for begin, end in pairwise([0, *ends])]
    while True:
        size = int(np.clip(draw.lognormal(9, 1.5), 200, 60_000))
        chosen = (draw.zipf(1.3, size) - 1) % len(words)
        yield " ".join(words[number] for number in chosen.tolist())


def given_texts(file: Path) -> Iterator[str]:
    """The texts of a file of JSON lines, over and over."""
    opener: Any = gzip.open if file.suffix == ".gz" else open
    while True:
        with opener(file, "rt", encoding="utf-8") as stream:
            for line in stream:
                yield json.loads(line)["text"]


def up_to(texts: Iterator[str], size: int) -> Iterator[str]:
    """Texts of so many bytes together; the last one is cut."""
    while size > 0:
        text = next(texts)[:size]
        yield text
        size -= len(text.encode())


def write(folder: Path, texts: Iterator[str], files: int, size: int) -> None:
    """JSON lines in so many files of about one size, the texts in order."""
    folder.mkdir(parents=True)
    for number in range(files):
        with open(folder / f"part-{number:05d}.jsonl", "w", encoding="utf-8") as stream:
            for index, text in enumerate(up_to(texts, size // files)):
                stream.write(json.dumps({"id": f"{number}-{index}", "text": text}) + "\n")


class Bench:
    """Makes texts and a tokenizer in a folder, and measures on them.

    Args:
        given: the options.
        folder: where everything is written.
    """

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self.given = given
        self.folder = folder
        self.size = int(given.megabytes * 1e6)
        self.tokenizer = folder / "tokenizer"
        train_bpe(up_to(self.texts(), min(self.size, 4_000_000)), given.vocabulary).save_pretrained(
            self.tokenizer
        )

    def texts(self) -> Iterator[str]:
        """The texts, from the first one on."""
        return made() if self.given.data is None else given_texts(self.given.data)

    def corpus(self, name: str, times: int = 1, files: int | None = None) -> Path:
        """A folder of the text, so many times: the longest document stays the same."""
        folder = self.folder / name
        texts = chain.from_iterable(up_to(self.texts(), self.size) for _ in repeat(None))
        write(folder, texts, files or self.given.processes, times * self.size)
        return folder

    def child(
        self, name: str, source: Path, out: Path, parity: bool = False, imported: bool = True
    ) -> dict[str, Any]:
        """One measurement; ``imported`` leaves the imports of `prepare` out of its time."""
        return _child(name, {
            "source": str(source),
            "tokenizer": str(self.tokenizer),
            "out": str(out),
            "processes": self.given.processes,
            "batch": self.given.batch,
            "parity": parity,
            "imported": imported,
        })  # fmt: skip

    def speed(self) -> list[dict[str, Any]]:
        """Tokens per second of all that are installed, in turns."""
        source = self.corpus("texts")
        names = ["prepare", "datasets.map"]
        names += ["datatrove"] if find_spec("datatrove") else []
        taken: dict[str, list[float]] = {}
        tokens = 0
        hashes: dict[str, str] = {}
        for number in range(self.given.rounds):
            for name in names if number % 2 else reversed(names):
                out = self.folder / "out"
                found = self.child(name, source, out, parity=not number)
                shutil.rmtree(out)
                taken.setdefault(name, []).append(found["seconds"])
                if "map alone" in found:
                    taken.setdefault("datasets.map alone", []).append(found["map alone"])
                if not number:
                    hashes[name], tokens = found["hash"], found["tokens"]
            if len(set(hashes.values())) > 1:
                raise SystemExit(f"the contestants give different tokens: {hashes}")
        ours = taken["prepare"]
        rows = []
        for name in ("prepare", "datasets.map", "datasets.map alone", "datatrove"):
            seconds = taken.get(name)
            facts = summary(seconds) if seconds else None
            ratio = [b / a for a, b in zip(ours, seconds or [], strict=False)]
            rows.append({
                "from text to tokens": name if facts else f"{name}: not installed",
                "tokens": tokens if facts else None,
                "tokens/s": round(tokens / facts["median"]) if facts else None,
                "spread": facts["spread"] if facts else None,
                "prepare is so many times as fast": statistics.median(ratio) if ratio else None,
                "least": min(ratio, default=None),
                "most": max(ratio, default=None),
            })  # fmt: skip
        return rows

    def ram(self) -> list[dict[str, Any]]:
        """The most RAM of `prepare` at one and ten times the text."""
        rows: list[dict[str, Any]] = []
        for times in (1, 10):
            source = self.corpus(f"times {times}", times)
            peaks = []
            for number in range(self.given.ram_rounds):
                out = self.folder / f"out {times} {number}"
                peaks.append(self.child("prepare", source, out)["MB"])
            peak = statistics.median(peaks)
            first = rows[0]["MB at most"] if rows else peak
            rows.append({
                "text": f"{times} x {self.given.megabytes:g} MB",
                "MB at most": peak,
                "spread": summary(peaks)["spread"],
                "of the first": peak / first,
            })  # fmt: skip
        return rows

    def again(self) -> list[dict[str, Any]]:
        """Seconds of a first and a second start."""
        texts = {
            f"{self.given.megabytes:g} MB": (1, None),
            f"{10 * self.given.megabytes:g} MB": (10, None),
            f"{self.given.files:,} files": (1, self.given.files),
        }
        rows = []
        for name, (times, files) in texts.items():
            source = self.corpus(f"again {name}", times, files)
            out = self.folder / f"out again {name}"
            time.sleep(SETTLED)
            first = self.child("prepare", source, out, imported=False)["seconds"]
            begun = time.perf_counter()
            second = self.child("prepare", source, out, imported=False)["seconds"]
            process = time.perf_counter() - begun
            rows.append({
                "corpus": name,
                "first start, s": first,
                "second start, s": second,
                "its whole process, s": process,
            })  # fmt: skip
        return rows

    def plan(self) -> list[dict[str, Any]]:
        """Seconds to lay out batches of very many documents."""
        given = self.given
        asked = {"documents": given.documents, "tokens": given.tokens, "rows": 64, "segment": 512}
        rounds = [_child("plan", asked) for _ in range(given.rounds)]
        seconds = summary([found["seconds"] for found in rounds])
        return [{
            "documents": given.documents,
            "tokens": rounds[0]["tokens"],
            "steps of 64 rows": rounds[0]["steps"],
            "to train, s": seconds["median"],
            "spread": seconds["spread"],
            "to evaluate, s": statistics.median(found["evaluation"] for found in rounds),
        }]  # fmt: skip


def _child(name: str, given: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, str(CHILD), name, json.dumps(given)]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{name} failed:\n{ended.stderr}")
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure and write down."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, help="JSON lines with a text each; default: made up")
    parser.add_argument("--megabytes", type=float, default=24, help="of text")
    parser.add_argument("--vocabulary", type=int, default=8192, help="tokens of the BPE")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64, help="documents a batch of the others")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ram_rounds", type=int, default=3)
    parser.add_argument("--files", type=int, default=28_000, help="of a corpus of very many")
    parser.add_argument("--documents", type=int, default=28_000, help="of the plan")
    parser.add_argument("--tokens", type=int, default=3_000_000_000, help="of the plan")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    given = parser.parse_args()
    facts: dict[str, Any] = {"circumstances": circumstances()}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(given, Path(folder))
        for part in given.parts:
            facts[part] = getattr(bench, part)()
            print(table(facts[part]), flush=True)
    facts["options"] = {name: str(value) for name, value in vars(given).items() if name != "out"}
    facts["options"]["data"] = None if given.data is None else given.data.name
    save(given.out, "data", facts, "\n\n".join(table(facts[part]) for part in given.parts))


if __name__ == "__main__":
    main()
