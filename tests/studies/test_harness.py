"""lm-evaluation-harness with a memory: its figures are those of reading each request alone."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from served import save_model
from task_texts import code, latex
from torch import Tensor

from memorizing_studies.tasks.items import Item
from memorizing_transformers.data.tokens.tokenized_text import tokenizing
from memorizing_transformers.data.tokens.tokenizers import train_bpe
from memorizing_transformers.errors import ConfigError
from memorizing_transformers.generation.session import Session

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

from memorizing_studies.harness.memorizing_lm import MemorizingLM
from memorizing_studies.harness.prefixes import sessions_after, shared
from memorizing_studies.harness.yaml import saved_items

TEXT = "the ring of the sea is a field of the sea and the ring is "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("harness") / "model")


@pytest.fixture(scope="module")
def judge(folder: Path) -> MemorizingLM:
    return MemorizingLM(str(folder), device="cpu")


def requests(*pairs: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=pair) for pair in pairs]


def alone(judge: MemorizingLM, ids: list[int]) -> Tensor:
    """Log-probabilities (N, V) of a document that is read by itself, token by token."""
    session = Session(judge.reader.model, 1, judge.reader.segment_length)
    rows = [session.read(torch.tensor([[one]]))[0] for one in ids]
    return torch.stack(rows).log_softmax(-1)


def test_endings_are_scored_as_if_each_were_a_document_of_its_own(judge: MemorizingLM) -> None:
    long = TEXT * 4
    pairs = [(long, "open"), (long, "a closed field"), (TEXT, "open"), (long + "x", "y z")]
    pairs += [(long[:-9], long[-9:]), ("", "the sea"), (TEXT, " ")]
    found = judge.loglikelihood(requests(*pairs), disable_tqdm=True)
    greedy = set()
    for (context, ending), (score, is_greedy) in zip(pairs, found, strict=True):
        if context:
            first, second = judge._encode_pair(context, ending)
        else:
            first, second = [judge.eot_token_id], judge.tok_encode(ending)
        scores = alone(judge, [*first, *second])[len(first) - 1 : -1]
        targets = torch.tensor(second)
        expected = scores.gather(1, targets[:, None]).sum()
        assert score == pytest.approx(float(expected), abs=2e-3)
        assert is_greedy == bool((scores.argmax(-1) == targets).all())
        greedy.add(is_greedy)


def test_an_answer_of_the_model_is_greedy_and_another_is_not(judge: MemorizingLM) -> None:
    context = judge.tok_encode(TEXT * 3)
    best = int(alone(judge, context)[-1].argmax())
    asked = [(("", ""), context, [best]), (("", ""), context, [(best + 1) % 100])]
    (_, first), (_, second) = judge._loglikelihood_tokens(asked, disable_tqdm=True)
    assert (first, second) == (True, False)


def test_shared_beginnings_are_read_once(judge: MemorizingLM) -> None:
    beginning = [*range(40)]
    contexts = [[*beginning, 7], [*beginning, 8, 9], beginning, [*beginning, 8, 9, 9], [3]]
    read = []

    def begin() -> Session:
        session = Session(judge.reader.model, 1, 16)
        session.observer = lambda _, part, output: read.append(part.shape[1])
        return session

    seen = {}
    for number, session, logits in sessions_after(contexts, begin, torch.device("cpu")):
        seen[number] = logits
        assert session.count == len(contexts[number])
        session.read(torch.tensor([[5, 5, 5]]))  # what one goes on to read, no other one knows
    assert sum(read) - 3 * len(contexts) <= 40 + 1 + 3 + 1 + 1 + 1
    for number, logits in seen.items():
        expected = alone_in(judge, contexts[number])
        torch.testing.assert_close(logits[0], expected, atol=1e-4, rtol=1e-4)


def alone_in(judge: MemorizingLM, ids: list[int]) -> Tensor:
    return Session(judge.reader.model, 1, 16).read(torch.tensor([ids]))[0]


def test_common_beginnings_are_counted() -> None:
    assert [shared(*x) for x in (([], [1]), ([1, 2], [1, 2, 3]), ([1, 3], [1, 2]))] == [0, 2, 1]


def test_whole_texts_are_scored_without_a_limit(judge: MemorizingLM) -> None:
    text = TEXT * 6
    (found,) = judge.loglikelihood_rolling(requests((text,)), disable_tqdm=True)
    ids = [judge.eot_token_id, *judge.tok_encode(text)]
    scores = alone(judge, ids)[:-1]
    expected = scores.gather(1, torch.tensor(ids[1:])[:, None]).sum()
    assert found == pytest.approx(float(expected), rel=1e-4)


def test_answers_are_the_models_and_end_before_a_stop_text(judge: MemorizingLM) -> None:
    whole, cut = judge.generate_until(
        requests((TEXT, {"max_gen_toks": 12}), (TEXT, {"max_gen_toks": 12, "until": ["zzz", ""]})),
        disable_tqdm=True,
    )
    assert whole == cut
    stop = whole[3:5]
    (short,) = judge.generate_until(
        requests((TEXT, {"max_gen_toks": 12, "until": [stop], "do_sample": False})),
        disable_tqdm=True,
    )
    assert short == whole[: whole.find(stop)]


def test_the_size_of_the_memory_is_an_argument(folder: Path) -> None:
    assert MemorizingLM(str(folder), memory=0, device="cpu").reader.model.config.memory.size == 0
    with pytest.raises(ConfigError, match=r"model_args\.memmory = 3: is not known"):
        MemorizingLM(str(folder), memmory=3)


TASK = """\
task: fields
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


def test_the_command_line_runs_a_task_of_its_own(folder: Path, tmp_path: Path) -> None:
    lines = [{"text": TEXT * n, "choices": [" open", " closed"], "answer": n % 2} for n in (1, 2)]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "fields.yaml").write_text(TASK.format(data=data))
    command = [sys.executable, "-m", "memorizing_studies.harness", "--model", "memorizing"]
    command += [
        "--model_args",
        f"pretrained={folder},memory=64",
        "--device",
        "cpu",
        "--tasks",
        "fields",
    ]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr[-2000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    assert 0 <= json.loads(file.read_text())["results"]["fields"]["acc,none"] <= 1


def methods(seed: int) -> str:
    """Code whose names begin in the middle of a token: ``self._make_…``."""
    return code(seed).replace("make_", "_make_").replace("= _make", "= self._make")


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_our_tasks_give_the_accuracy_of_the_command_tasks(kind: str, tmp_path: Path) -> None:
    texts = [latex(seed, 4) if kind == "bytes" else methods(seed) for seed in (0, 1)]
    tokenizer = train_bpe(texts, 400) if kind == "bpe" else None
    folder = save_model(tmp_path / "model", tokenizer)
    data = tmp_path / "texts.jsonl"
    records = [{"title": str(seed), "text": text} for seed, text in enumerate(texts)]
    data.write_text("\n".join(map(json.dumps, records)))
    names = ["label-recall" if kind == "bytes" else "identifier-recall", "key-values"]
    command = [sys.executable, "-m", "memorizing_transformers", "tasks", "--model", str(folder)]
    command += ["--data", str(data), "--tasks", *names, "--questions", "6"]
    command += ["--min_distance", "48", "--max_tokens", "1024", "--out", str(tmp_path / "tasks")]
    subprocess.run(command, check=True, capture_output=True, text=True)
    facts = json.dumps({"items": str(tmp_path / "tasks" / "items.json"), "data": str(data)})
    command = [sys.executable, "-m", "memorizing_studies.harness", "--model", "memorizing"]
    command += ["--model_args", f"pretrained={folder}", "--device", "cpu", "--metadata", facts]
    theirs = [f"memorizing_{name.replace('-', '_')}" for name in names]
    command += ["--tasks", ",".join(theirs), "--output_path", str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr[-2000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(file.read_text())["results"]
    scores = json.loads((tmp_path / "tasks" / "scores.json").read_text())
    for ours, other in zip(names, theirs, strict=True):
        right = [score["right"] for score in scores[ours]["memory on"]]
        assert len(right) > 2
        assert found[other]["acc,none"] == pytest.approx(sum(right) / len(right))


def test_no_token_between_context_and_ending_is_left_out(judge: MemorizingLM) -> None:
    text = methods(0)[:400] + " größer"
    other = copy.copy(judge)
    other._tokenized = tokenizing(train_bpe([text] * 3, 400))
    whole = other.tok_encode(text)
    for place in range(1, len(text)):
        context, ending = other._encode_pair(text[:place], text[place:])
        head = [] if context == [other.eot_token_id] else context
        assert head + ending == whole
        assert ending


def test_a_question_and_its_answers_meet_at_white_space() -> None:
    whole = "def _a(self):\n    pass\n\nx = y + self._b(3)"
    place = whole.index("_b(3)")
    item = Item(place, 9, 9, 0.5, candidates=("_a", "_b"), answer=1, after="(")
    asked = saved_items._question(item, whole)
    assert asked["context"] == whole[: place - len("self.")]
    assert asked["choices"] == ["self._a(", "self._b("]
    asked = saved_items._question(dataclasses.replace(item, before="\n  "), whole)
    assert asked["choices"] == ["_a(", "_b("]


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ("{}", "give --metadata"),
        ('{"items": "none.json", "data": "x.txt"}', "items = 'none.json'"),
    ],
)
def test_our_tasks_say_what_they_need(facts: str, words: str, folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "memorizing_studies.harness", "--model", "memorizing"]
    command += ["--model_args", f"pretrained={folder}", "--device", "cpu", "--metadata", facts]
    command += ["--tasks", "memorizing_key_values"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 2
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert words in line


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "memorizing_studies.harness", "--model", "memorizing"]
    command += ["--model_args", f"pretrained={tmp_path}", "--tasks", "lambada_openai"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert str(tmp_path) in line
    assert "Traceback" not in ended.stderr
