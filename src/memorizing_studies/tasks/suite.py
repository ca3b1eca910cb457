"""The tasks, by name."""

from __future__ import annotations

from .far_copies import FarCopies
from .key_tokens import KeyTokens
from .key_values import KeyValues
from .many_documents import ManyDocuments
from .name_recall import IdentifierRecall, LabelRecall, LemmaRecall
from .new_function import NewFunction
from .task import Task
from .variables import VariableTracking

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        FarCopies(),
        LabelRecall(),
        IdentifierRecall(),
        LemmaRecall(),
        KeyValues(),
        KeyTokens(),
        NewFunction(),
        ManyDocuments(),
        VariableTracking(),
    )
}
