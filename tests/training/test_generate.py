"""The commands ``remember`` and ``generate`` on a checkpoint, an export and a pretrained model."""

from __future__ import annotations

from pathlib import Path

import pytest
from small import SEGMENT, Run

from memorizing_transformers.__main__ import main

TEXT = "Ana Muñoz visitó Ávila 🎉.\r\nShe wrote\0 to Ana. " * 12


class Command:
    """Runs a command and gives what it printed."""

    def __init__(self, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        self.patch, self.capsys = patch, capsys

    def __call__(self, *args: object) -> str:
        self.patch.setattr("sys.argv", ["memorizing_transformers", *map(str, args)])
        self.capsys.readouterr()
        main()
        return self.capsys.readouterr().out

    def error(self, *args: object) -> str:
        """The one line of a mistake."""
        with pytest.raises(SystemExit) as stop:
            self(*args)
        assert stop.value.code == 2
        said = self.capsys.readouterr().err.splitlines()
        (line,) = [line for line in said if line.startswith("error: ")]
        assert said[-1] == line
        return line


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Command:
    return Command(monkeypatch, capsys)


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "ana.txt"
    path.write_bytes(TEXT.encode())
    return path


def test_a_remembered_document_answers_as_one_that_is_read(
    command: Command, run: Run, document: Path, tmp_path: Path
) -> None:
    export, memory = tmp_path / "model", tmp_path / "ana.memory"
    command("export", "--ckpt_path", run.checkpoint, "--out", export)
    said = command("remember", "--model", run.checkpoint, "--document", document, "--out", memory)
    assert f"tokens: {len(TEXT.encode())}" in said
    assert f"memory: {memory}" in said
    assert "of them in the memory: the last" in said
    small = ["remember", "--model", run.checkpoint, "--document", document, "--out", memory]
    assert "of them" not in command(*small, "--memory_size", 4096)
    command("remember", "--model", run.checkpoint, "--document", document, "--out", memory)
    ask = ["--prompt", "Ana M", "--max_new_tokens", SEGMENT + 3]
    answers = []
    for model in (run.checkpoint, export):
        common = ["generate", "--model", model, *ask, "--segment_length", SEGMENT]
        answers.append(command(*common, "--document", document))
        answers.append(command(*common, "--memory", memory))
    assert len({*answers}) == 1
    assert answers[0].startswith("Ana M")
    common = ["generate", "--model", export, *ask, "--sources", "--memory", memory]
    assert "ana.txt" in command(*common)
    assert "ana.txt" not in command(*common, "--memory_size", 0)
    common = ["generate", "--model", export, *ask]
    assert command(*common, "--memory", tmp_path) == answers[0]  # a folder of one
    assert command(*common, "--memory", memory, "--seed", 1) != answers[0]
    sure = command(*common, "--memory", memory, "--temperature", 0)
    assert sure == command(*common, "--memory", memory, "--temperature", 0, "--seed", 1)


def test_sources_name_documents_and_places(
    command: Command, run: Run, document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    other = tmp_path / "other.txt"
    other.write_text("Numbers: " + "one two three " * 20, "utf-8")
    files = []
    for path in (document, other):
        files.append(path.with_suffix(".memory"))
        remember = ["remember", "--model", run.checkpoint, "--document", path]
        command(*remember, "--out", files[-1])
    options = ["--prompt", "Ana", "--max_new_tokens", 9, "--temperature", 0, "--sources"]
    said = command("generate", "--model", run.checkpoint, "--memory", *files, *options)
    table = said[said.index("Where each token") :]
    rows = [line for line in table.splitlines() if ".txt" in line]
    assert len(rows) == 9
    assert "%" in rows[0]


def test_a_stop_text_ends_an_answer(command: Command, run: Run) -> None:
    ask = ["generate", "--model", run.checkpoint, "--prompt", "Ana", "--max_new_tokens", 30]
    whole = command(*ask).rstrip("\n")
    stop = whole[8:10]
    found = command(*ask, "--stop", stop, "~~~").rstrip("\n")
    assert whole.startswith(found)
    assert found.endswith(stop)


def test_a_pretrained_model_is_given_a_memory(
    command: Command, tmp_path: Path, document: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from memorizing_transformers.data.tokens.tokenizers import byte_tokenizer

    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = ["--model", tmp_path / "base", "--segment_length", 32, "--memory_size", 256]
    command("remember", *model, "--document", document, "--out", tmp_path / "a.memory")
    ask = ["generate", *model, "--prompt", "Ana", "--max_new_tokens", 5]
    answers = {
        command(*ask, "--memory", tmp_path / "a.memory"),
        command(*ask, "--document", document),
    }
    assert len(answers) == 1
    long = ["generate", *model[:2], "--prompt", "Ana", "--segment_length", 4096]
    assert "segment_length = 4096" in command.error(*long)
    # What follows a file with another XL cache would not be what follows the document.
    command("remember", *model, "--document", document, "--index", tmp_path / "all")
    for memory in ("a.memory", "all"):
        other = ["generate", *model[:2], "--prompt", "Ana", "--memory", tmp_path / memory]
        assert "--segment_length 32" in command.error(*other)


def test_every_mistake_is_told_in_one_line(
    command: Command, run: Run, document: Path, tmp_path: Path
) -> None:
    memory = tmp_path / "a.memory"
    read = ["remember", "--model", run.checkpoint]
    command(*read, "--document", document, "--out", memory)
    ask = ["generate", "--model", run.checkpoint, "--prompt", "x"]
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "none").mkdir()
    (tmp_path / "bad.memory").write_bytes(memory.read_bytes()[:-9])
    # What cannot be written is found before the document is read.
    unread = [*read, "--document", tmp_path / "nowhere"]
    for args, named in (
        ([*unread, "--out", tmp_path], "out = "),
        ([*unread, "--out", "."], "out = "),
        ([*unread, "--out", memory / "a.memory"], "out = "),
        ([*unread, "--out", memory, "--capacity", 9], "capacity = 9"),
        ([*read, "--document", tmp_path / "nowhere", "--out", memory], "document = "),
        ([*read, "--document", tmp_path / "latin", "--out", memory], "document = "),
        ([*read, "--document", tmp_path / "empty", "--out", memory], "document = "),
        ([*read, "--document", document, "--out", tmp_path / "none"], "out = "),
        ([*read, "--document", document, "--out", memory, "--segment_length", 0], "segment_length"),
        ([*read, "--document", document, "--out", memory, "--memory_size", -1], "memory_size"),
        ([*read, "--document", document, "--out", memory, "--device", "moon"], "device = "),
        (
            ["remember", "--model", tmp_path / "no", "--document", document, "--out", "x"],
            "model = ",
        ),
        (["generate", "--model", tmp_path / "none", "--prompt", "x"], "model = "),
        ([*ask[:-1], ""], "prompt = "),
        ([*ask, "--memory", tmp_path / "none"], "memory = "),
        ([*ask, "--memory", tmp_path / "nowhere.memory"], "memory = "),
        ([*ask, "--memory", memory, tmp_path / "bad.memory"], "memory = "),
        ([*ask, "--max_new_tokens", 0], "max_new_tokens = 0"),
        ([*ask, "--temperature", -1], "temperature = "),
        ([*ask, "--temperature", "1e-40"], "temperature = 1e-40: must be 0"),
        ([*ask, "--temperature", ".inf"], "temperature = inf: must be 0"),
        ([*ask, "--repetition_penalty", "1e-320"], "repetition_penalty = 1e-320: must lie"),
        ([*ask, "--repetition_penalty", ".inf"], "repetition_penalty = inf: must lie"),
        ([*ask, "--top_p", 2], "top_p = "),
        ([*ask, "--top_k", -1], "top_k = "),
        ([*ask, "--repetition_penalty", 0], "repetition_penalty = "),
        ([*ask, "--seed", -1], "seed = -1"),
        ([*ask, "--seed", 2**32], "seed = "),
        ([*ask, "--stop", "a", ""], "stop = "),
        ([*ask, "--memory_size", 1], "memory_size = 1"),
        ([*ask, "--nonsense", 1], "nonsense"),
    ):
        assert named in command.error(*args), args


def test_an_index_collects_documents(
    command: Command, run: Run, document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    index, other = tmp_path / "all", tmp_path / "other.txt"
    other.write_text("Numbers: " + "one two three " * 20, "utf-8")
    add = ["remember", "--model", run.checkpoint, "--index", index, "--document"]
    ask = ["generate", "--model", run.checkpoint, "--prompt", "Ana", "--max_new_tokens", 9]
    ask += ["--temperature", 0, "--sources"]
    assert f"documents in {index}: 1 with" in command(*add, document, "--capacity", 2000)
    one = command(*ask, "--memory", index)
    assert f"documents in {index}: 2 with" in command(*add, other)
    both = command(*ask, "--memory", index)
    assert "ana.txt" in one
    assert "other.txt" not in one
    assert "other.txt" in both
    for mistake, words in (
        ([*add, document, "--out", tmp_path / "a.memory"], "--index"),
        ([*add[:3], "--document", document], "--index"),
        ([*add, document, "--capacity", 0], "capacity"),
        ([*ask, "--memory", index, index], "alone"),
        ([*add, document, "--capacity", 2001], "was begun with 2000"),
        ([*add, document, "--segment_length", SEGMENT + 1], f"was begun with {SEGMENT}"),
        (
            ["remember", "--model", run.checkpoint, "--index", tmp_path, "--document", document],
            "new folder",
        ),
    ):
        assert words in command.error(*mistake)
    large = tmp_path / "large.txt"
    large.write_text("x" * 2000, "utf-8")
    assert "--capacity" in command.error(*add, large)
    assert command(*ask, "--memory", index) == both
