"""A server answers the client of OpenAI as the commands answer, and none reads another."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from served import free_port, save_model, serving

from memorizing_transformers.__main__ import main
from memorizing_transformers.commands.reading import Reader, open_reader
from memorizing_transformers.generation.causal_lm import SessionCache, causal_lm
from memorizing_transformers.generation.session import Session

openai = pytest.importorskip("openai")
pytest.importorskip("litserve")

SEGMENT = 32
TOKEN = "a-secret"
LIMIT = 5000
LONG = "The miller of Ávila is called Ana. " * 9
TEXTS = {"ana": LONG, "bob": "Numbers: one, two, three, four. " * 8, "odd": "x\r\n\0🎉 " * 40}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def reader(folder: Path) -> Reader:
    return open_reader(str(folder), SEGMENT, None, "cpu")


@pytest.fixture(scope="module")
def port(folder: Path) -> Iterator[int]:
    options = ["--model", folder, "--segment_length", SEGMENT, "--max_upload", LIMIT]
    with serving(*options, "--token", TOKEN, "--max_conversations", 3) as (port, _):
        yield port


@pytest.fixture
def client(port: int) -> Iterator[Any]:
    """A client; the conversations that it opens end with the test."""
    made = openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1",
        api_key=TOKEN,
        max_retries=0,
    )
    opened: list[str] = []
    create = made.conversations.create

    def remembered() -> str:
        opened.append(create().id)
        return opened[-1]

    made.begin = remembered
    yield made
    for name in opened:
        with contextlib.suppress(openai.NotFoundError):
            made.conversations.delete(name)


def upload(client: Any, conversation: str, text: str | bytes, name: str = "a.txt") -> Any:
    raw = text if isinstance(text, bytes) else text.encode()
    body = {"conversation": conversation}
    return client.files.create(file=(name, raw), purpose="user_data", extra_body=body)


def complete(client: Any, prompt: Any, conversation: str | None = None, **options: Any) -> Any:
    options = {"temperature": 0, "max_tokens": 24, **options}
    body = {"conversation": conversation, **options.pop("extra_body", {})}
    return client.completions.create(model="any", prompt=prompt, extra_body=body, **options)


def expected(reader: Reader, documents: list[str], prompt: str, count: int = 24) -> str:
    """The same without a server."""
    session = Session(reader.model, 1, SEGMENT)
    for text in documents:
        session.read(reader.ids(text))
    ids = reader.ids(prompt)
    writer: Any = causal_lm(reader.model, SEGMENT, reader.tokenizer)
    cache = SessionCache([session])
    made = writer.generate(ids, past_key_values=cache, max_new_tokens=count, do_sample=False)
    return reader.tokenizer.decode(made[0, ids.shape[1] :])


def test_an_answer_is_that_of_a_session(client: Any, reader: Reader) -> None:
    one = client.begin()
    assert complete(client, "Ana", one).choices[0].text == expected(reader, [], "Ana")
    for count, text in enumerate(TEXTS.values(), 1):
        file = upload(client, one, text)
        assert (file.tokens, file.bytes) == (len(text.encode()), len(text.encode()))
        said = complete(client, "Ana", one)
        assert said.choices[0].text == expected(reader, [*TEXTS.values()][:count], "Ana")
    assert (said.usage.prompt_tokens, said.usage.completion_tokens) == (3, 24)
    assert said.choices[0].finish_reason == "length"
    other = "A text that does not begin as the one before does, and is longer than its answer"
    assert complete(client, other, one).choices[0].text == expected(
        reader, [*TEXTS.values()], other
    )
    # What one conversation reads is not known outside of it.
    assert complete(client, "Ana").choices[0].text == expected(reader, [], "Ana")


def test_two_conversations_at_once_read_only_their_own(client: Any, reader: Reader) -> None:
    conversations = {name: client.begin() for name in TEXTS}
    prompts = [f"{start} of" for start in ("The mill", "Num", "x", "Nobody")]

    def talk(name: str) -> list[str]:
        upload(client, conversations[name], TEXTS[name])
        return [complete(client, p, conversations[name]).choices[0].text for p in prompts]

    with ThreadPoolExecutor(3) as pool:
        answers = dict(zip(TEXTS, pool.map(talk, TEXTS), strict=True))
    for name, text in TEXTS.items():
        assert answers[name] == [expected(reader, [text], prompt) for prompt in prompts]
    assert len({tuple(found) for found in answers.values()}) == 3


def test_a_chat_that_goes_on_is_as_one_read_anew(client: Any) -> None:
    one, other = client.begin(), client.begin()
    for name in (one, other):
        upload(client, name, LONG)
    messages = [{"role": "user", "content": "Who is the miller?"}]

    def chat(conversation: str) -> str:
        options = {"model": "any", "temperature": 0, "max_tokens": 40}
        body = {"conversation": conversation}
        made = client.chat.completions.create(messages=messages, extra_body=body, **options)
        return made.choices[0].message.content

    for question in ("And of Toledo?", "Really?"):
        answer = chat(one)
        messages += [
            {"role": "assistant", "content": answer},
            {"role": "user", "content": [{"type": "text", "text": question}]},
        ]
    assert chat(one) == chat(other)


def test_a_stream_gives_the_same_pieces(client: Any) -> None:
    one = client.begin()
    upload(client, one, LONG)
    whole = complete(client, "Ana", one, max_tokens=60)
    stops = [whole.choices[0].text[20:23], "never there"]
    for options in ({}, {"stop": stops}):
        whole = complete(client, "Ana", one, max_tokens=60, **options)
        usage = {"include_usage": True}
        stream = complete(
            client, "Ana", one, max_tokens=60, stream=True, stream_options=usage, **options
        )
        *pieces, end, last = stream
        assert "".join(p.choices[0].text for p in pieces) == whole.choices[0].text
        assert end.choices[0].finish_reason == whole.choices[0].finish_reason
        assert last.usage == whole.usage
    assert whole.choices[0].finish_reason == "stop"
    assert stops[0] not in whole.choices[0].text


def test_several_prompts_seeds_and_sources(client: Any, reader: Reader) -> None:
    one = client.begin()
    upload(client, one, LONG, "ana.txt")
    said = complete(client, ["Ana", "The miller"], one, extra_body={"sources": True})
    for choice, prompt in zip(said.choices, ("Ana", "The miller"), strict=True):
        assert choice.text == expected(reader, [LONG], prompt)
        assert len(choice.sources) == 24
        passages = [p for token in choice.sources for p in token["passages"]]
        assert "ana.txt" in {passage["document"] for passage in passages}
    drawn = {"temperature": 1.5, "max_tokens": 40}
    texts = [
        complete(client, "Ana", one, seed=seed, **drawn).choices[0].text for seed in (1, 1, 2, None)
    ]
    assert texts[0] == texts[1]
    assert len({*texts}) == 3
    # A field that is null was left out.
    none = {"temperature": None, "top_k": None, "n": None, "sources": None, "conversation": one}
    texts = [
        client.completions.create(model="any", prompt="Ana", seed=1, extra_body=body)
        for body in (none, {"conversation": one})
    ]
    assert texts[0].choices[0].text == texts[1].choices[0].text


def refused(kind: type[Exception], call: Any, *words: str) -> None:
    with pytest.raises(kind) as found:
        call()
    message = found.value.body["message"]
    assert "\n" not in message
    for word in words:
        assert word in message


def test_mistakes_are_refused_in_one_line(client: Any, port: int) -> None:
    one = client.begin()
    chat = client.chat.completions.create
    ask = {"model": "any", "messages": [{"role": "user", "content": "a"}]}
    bad, missing = openai.BadRequestError, openai.NotFoundError
    refused(bad, lambda: chat(**ask, n=2), "n = 2", "leave it out")
    refused(bad, lambda: chat(**ask, logprobs=True), "logprobs")
    refused(bad, lambda: chat(**ask, tools=[{"type": "function"}]), "tools")
    refused(bad, lambda: chat(**ask, temperature=-1), "temperature")
    refused(bad, lambda: chat(**ask, temperature=1e-40), "temperature = 1e-40")
    refused(bad, lambda: chat(model="any", messages=[]), "messages")
    refused(bad, lambda: complete(client, ""), "prompt")
    refused(bad, lambda: complete(client, "a", max_tokens=0), "max_tokens")
    refused(missing, lambda: complete(client, "a", "conv_none"), "conv_none", "is not open")
    refused(missing, lambda: client.models.retrieve("other"), "other")
    refused(bad, lambda: upload(client, one, b"\xff\xfe"), "a.txt", "UTF-8")
    refused(bad, lambda: upload(client, one, b""), "empty")
    refused(bad, lambda: upload(client, "", b"a"), "conversation")
    refused(missing, lambda: upload(client, "conv_none", b"a"), "conv_none")
    large = openai.APIStatusError
    refused(large, lambda: upload(client, one, b"x" * (LIMIT + 1)), "5,000")
    refused(large, lambda: upload(client, one, b"x" * 1_000_000), "large")
    upload(client, one, b"x" * LIMIT)
    for _ in range(2):
        client.begin()
    refused(openai.RateLimitError, client.begin, "3 conversations are open", "delete one")
    client.conversations.delete(one)
    refused(missing, lambda: complete(client, "a", one), "is not open")
    stranger = openai.OpenAI(base_url=client.base_url, api_key="wrong", max_retries=0)
    for call in (stranger.models.list, stranger.conversations.create, lambda: chat_of(stranger)):
        refused(openai.AuthenticationError, call, "token")


def chat_of(client: Any) -> Any:
    messages = [{"role": "user", "content": "a"}]
    return client.chat.completions.create(model="any", messages=messages)


def test_other_machines_cannot_reach_it(port: int) -> None:
    # 127.0.0.2 is this machine too, but not what 127.0.0.1 listens at.
    with pytest.raises(OSError, match="refused"), socket.create_connection(("127.0.0.2", port), 2):
        pass


def test_the_memory_of_the_server_is_read_by_all_and_signals_end_it(
    folder: Path, reader: Reader, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "memorizing_transformers"]
    document, memory = tmp_path / "ana.txt", tmp_path / "ana.memory"
    document.write_text(LONG, "utf-8")
    options = ["--model", folder, "--segment_length", SEGMENT]
    made = [*command, "remember", *options, "--document", document, "--out", memory]
    subprocess.run([*map(str, made)], check=True, capture_output=True)
    with serving(*options, "--memory", memory, "--idle_minutes", 1e-6) as (port, process):
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0
        )
        said = complete(client, "Ana")
        assert said.choices[0].text == expected(reader, [LONG], "Ana")
        name = client.conversations.create().id
        refused(openai.NotFoundError, lambda: complete(client, "Ana", name), "is not open")
        taken = [*command, "serve", *options, "--port", port]
        other = subprocess.run([*map(str, taken)], capture_output=True, text=True)
        assert other.returncode == 2
        assert other.stderr.splitlines()[-1].startswith(f"error: port = {port}: ")
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        assert process.returncode == 0
        assert process.stderr is not None
        said = process.stderr.read()  # which ends when all processes have
        assert "Traceback" not in said
        assert "Warning" not in said
    with pytest.raises(OSError, match="refused"), socket.create_connection(("127.0.0.1", port), 2):
        pass


def test_a_model_or_memory_that_is_not_there_ends_the_server(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "memorizing_transformers", "serve", "--port", free_port()]
    wrong = ["--model", folder, "--memory", tmp_path / "none.memory"]
    made = subprocess.run([*map(str, [*command, *wrong])], capture_output=True, text=True)
    assert made.returncode == 2, made.stderr
    assert made.stderr.splitlines()[-1].startswith("error: ")
    assert "none.memory" in made.stderr.splitlines()[-1]
    assert "Traceback" not in made.stderr


@pytest.mark.parametrize(
    ("option", "value"),
    [("host", "example.org"), ("port", 80), ("token", "with space"), ("max_conversations", 0)],
)
def test_a_setting_that_cannot_work_is_named(
    option: str,
    value: object,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    command = ["memorizing_transformers", "serve", "--model", str(folder)]
    monkeypatch.setattr("sys.argv", [*command, f"--{option}", str(value)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {option} = ")
