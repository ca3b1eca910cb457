"""``python -m memorizing_transformers tasks``: from a model and documents to tables and plots."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from memorizing_transformers.data.tokens.tokenizers import fingerprint_tokenizer
from memorizing_transformers.errors import ConfigError
from memorizing_transformers.training.checkpoint.opening import AnyModel, open_for_use, place

from ..out_folder import out_folder
from .arms import cautions, check_places, score_all
from .far_copies import hashes
from .items import ItemSet, Sheet, digest_of, load, save
from .outcome import Outcome, overview, write_outcome
from .scoring import Arm
from .suite import TASKS
from .summary import summarize
from .task import Settings
from .texts import CHARACTERS_PER_TOKEN, Texts, find_texts, open_texts

ITEMS, SCORES = "items.json", "scores.json"


@dataclass(frozen=True)
class Request:
    """What the command was asked for; its help describes the options."""

    model: str
    data: Sequence[str]
    control: str | None
    reference: str | None
    out: str
    tasks: Sequence[str] | None
    items: str | None
    background: Sequence[str]
    settings: Settings
    max_documents: int
    text_column: str
    segment_length: int | None
    memory_size: int | None
    device: str | None

    def check(self) -> None:
        """Refuse what cannot work before anything is opened.

        Raises:
            ConfigError: naming the option.
        """
        if not self.data:
            raise ConfigError("data", None, "give at least one file of documents")
        for name in self.tasks or ():
            if name not in TASKS:
                raise ConfigError("tasks", name, f"must be among {', '.join(TASKS)}")
        for key, least in (("questions", 1), ("candidates", 2), ("min_distance", 1)):
            value = getattr(self.settings, key)
            if value < least:
                raise ConfigError(key, value, f"must be at least {least}")
        if self.max_documents < 1:
            raise ConfigError("max_documents", self.max_documents, "must be at least 1")
        least, given = 2 * self.settings.min_distance, self.settings.max_tokens
        if given < least:
            remedy = f"must be at least twice min_distance ({least})"
            raise ConfigError("max_tokens", given, remedy)


def open_arms(request: Request) -> list[Arm]:
    """The model with its memory, without it, and the control.

    A model without memory is read once, as ``no memory``.

    Raises:
        ConfigError: where a model cannot be opened.
    """
    model, segment = open_for_use(request.model, request.segment_length, request.memory_size)
    place(with_tokenizer(model, "model", request.model), request.device)
    arms = [Arm("no memory", model, segment)]
    if model.config.memory_layers and model.config.memory.size:
        arms = [Arm("memory on", model, segment), Arm("memory off", model, segment, 0)]
    if request.control is not None:
        arms.append(open_other(request, "control", request.control))
    return arms


def with_tokenizer(model: AnyModel, key: str, name: str) -> AnyModel:
    """The same model.

    Args:
        model: as it was opened.
        key: the option that names it.
        name: its value.

    Raises:
        ConfigError: where it has no tokenizer.
    """
    if model.tokenizer is None:
        remedy = "holds no tokenizer; set model.tokenizer and save the model again"
        raise ConfigError(key, name, remedy)
    return model


def open_other(request: Request, key: str, name: str) -> Arm:
    """The control, read without a memory even where it could have one, or the reference model.

    Args:
        request: where it shall compute, and so on.
        key: the option that names it.
        name: its value.

    Raises:
        ConfigError: where it cannot be opened.
    """
    try:
        model, segment = open_for_use(name, request.segment_length, None)
    except ConfigError as error:
        raise ConfigError(key, name, str(error).partition(": ")[2]) from error
    place(with_tokenizer(model, key, name), request.device)
    # A pretrained model is opened with a memory, and a control has none.
    return Arm(key, model, segment, 0 if key == "control" else None)


def documents(request: Request, tokenizer: Any) -> Texts:
    """The documents that items are made of.

    Raises:
        ConfigError: where none can be used.
    """
    texts = open_texts(
        request.data,
        tokenizer,
        request.settings.max_tokens,
        2 * request.settings.min_distance,
        request.max_documents,
        request.text_column,
    )
    if not texts.texts:
        reasons = ", ".join(f"{count} {reason}" for reason, count in texts.skipped.items())
        reasons = reasons or "there is none"
        remedy = f"no document can be used ({reasons}); give others, or longer ones"
        raise ConfigError("data", " ".join(request.data), remedy)
    return texts


def make_items(request: Request, texts: Texts, tokenizer: Any) -> ItemSet:
    """The items of all tasks that were asked for."""
    settings, others = request.settings, Texts([])
    if request.background:
        others = open_texts(
            request.background, tokenizer, 2**62, 1, 2**62, request.text_column, "background"
        )
        # Cut alike, so that a document that is there too is not taken for another text.
        most, own = settings.max_tokens * CHARACTERS_PER_TOKEN, {*texts.digests().values()}
        apart = [text for text in others.texts if digest_of(text.text[:most]) not in own]
        texts.background = [hashes(text.tokens.ids) for text in apart]
        others.skipped["also in --data"] += len(others.texts) - len(apart)
        texts.notes += others.notes
    if request.reference is not None:
        texts.reference = open_other(request, "reference", request.reference)
        if not texts.reference.model.config.memory_layers:
            remedy = "has no memory, so no token gains by it; give a model with one"
            raise ConfigError("reference", request.reference, remedy)
    tasks: dict[str, Sequence[Sheet]] = {}
    skipped = {"documents": dict(texts.skipped), "background": dict(+others.skipped)}
    for name in request.tasks or TASKS:
        reasons: Counter[str] = Counter()
        tasks[name] = TASKS[name].build(texts, settings, settings.random(name), reasons)
        skipped[name] = {reason: count for reason, count in reasons.items() if count}
    facts = {**asdict(settings), "tokenizer": fingerprint_tokenizer(tokenizer)}
    return ItemSet(tasks, skipped, facts, texts.digests())


def saved_items(request: Request, known: ItemSet, texts: Texts) -> ItemSet:
    """Items of an earlier run, of the same documents.

    Raises:
        ConfigError: where documents are missing or differ, or a task is not in the file.
    """
    assert request.items is not None
    digests = texts.digests()
    for name, digest in known.digests.items():
        if digests.get(name) != digest:
            remedy = f"asks about document {name!r}, which --data does not hold or holds otherwise"
            raise ConfigError("items", request.items, remedy)
    names = request.tasks or [*known.tasks]
    for name in names:
        if name not in known.tasks or name not in TASKS:
            raise ConfigError("tasks", name, f"is not in {request.items}; leave it out")
    return ItemSet(
        {name: known.tasks[name] for name in names}, known.skipped, known.settings, known.digests
    )


def run(request: Request) -> None:
    """Do what the command says.

    Raises:
        UserError: where an option cannot work.
    """
    request.check()
    known = None if request.items is None else load(Path(request.items))
    arms = open_arms(request)
    tokenizer = arms[0].model.tokenizer
    if known is None:
        settings = request.settings
        texts = documents(request, tokenizer)
        items = make_items(request, texts, tokenizer)
    else:
        names = set(asdict(request.settings))
        settings = Settings(**{k: v for k, v in known.settings.items() if k in names})
        texts = find_texts(
            request.data, tokenizer, settings.max_tokens, known.digests, request.text_column
        )
        items = saved_items(request, known, texts)
    asked = {name: [i for s in sheets for i in s.items] for name, sheets in items.tasks.items()}
    if not any(asked.values()):
        remedy = (
            "no task finds an item in these documents; give longer ones or a smaller min_distance"
        )
        raise ConfigError("data", " ".join(request.data), remedy)
    check_places(arms, items, texts)
    out = out_folder(request.out)
    # The file that was read can hold more tasks than were asked for.
    if request.items is None or Path(request.items).resolve() != (out / ITEMS).resolve():
        save(items, out / ITEMS)
    scores = score_all(arms, items, texts)
    whole = {n: {a: [asdict(s) for s in of] for a, of in by.items()} for n, by in scores.items()}
    if (out / SCORES).exists():  # of an earlier run, which can have drawn other tasks
        for name in TASKS:
            (out / f"{name}.png").unlink(missing_ok=True)
    (out / SCORES).write_text(json.dumps(whole), "utf-8")
    rows = [row for name, own in asked.items() if own for row in summarize(name, own, scores[name])]
    facts = {
        "model": request.model,
        "control": request.control or "none",
        "reference": request.reference or "none",
        "data": " ".join(request.data),
        "documents": len(texts.texts),
        "segment length": ", ".join(dict.fromkeys(str(arm.segment) for arm in arms)),
        "memory size": arms[0].model.config.memory.size if arms[0].name == "memory on" else 0,
        **{key.replace("_", " "): value for key, value in asdict(settings).items()},
    }
    tasks = [TASKS[name] for name, own in asked.items() if own]
    notes = cautions(arms, items, settings.min_distance)
    outcome = Outcome(facts, tasks, rows, items.skipped, notes)
    write_outcome(outcome, out)
    for task in tasks:
        Console().print(overview(task, outcome.of(task)))
    for line in [*texts.notes, *outcome.cautions, *outcome.skips()]:
        print(line)
    print(f"results: {out / 'index.html'}")
