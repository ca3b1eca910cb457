"""The tasks, by name."""

from __future__ import annotations

from .far_copies import FarCopies
from .key_values import KeyValues
from .name_recall import IdentifierRecall, LabelRecall, LemmaRecall
from .task import Task

TASKS: dict[str, Task] = {
    task.name: task
    for task in (FarCopies(), LabelRecall(), IdentifierRecall(), LemmaRecall(), KeyValues())
}
