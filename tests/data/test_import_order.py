"""Isabelle theories in the order of their imports, from headers as they are in the archive."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from memorizing_transformers.data.sources.columns import RecordRules
from memorizing_transformers.data.sources.documents import Origin, Source
from memorizing_transformers.data.sources.import_order import imports_of, in_import_order
from memorizing_transformers.data.sources.local import open_files
from memorizing_transformers.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "imports"),
    [
        ("theory A imports Main begin end", ["Main"]),
        ("theory A\n  imports Main B\nbegin", ["Main", "B"]),
        ('theory "CoreC++"\nimports Determinism Annotate\nbegin', ["Determinism", "Annotate"]),
        ('theory A imports "HOL-Library.Multiset" B begin', ["HOL-Library.Multiset", "B"]),
        ('theory A\nimports"../Helper"\nbegin', ["../Helper"]),
        ('theory %invisible A imports B "c/D"\nbegin', ["B", "c/D"]),
        ('theory A imports B keywords "x" :: thy_decl begin', ["B"]),
        ('theory A imports B abbrevs "x" = "y" begin', ["B"]),
        ("(* theory Z imports Y begin *)\ntheory A imports B begin", ["B"]),
        ("(* one (* two *)\ntheory Z imports Y begin *)\ntheory A imports B begin", ["B"]),
        ("text \\<open>\ntheory Z imports Y begin\\<close>\ntheory A imports B begin", ["B"]),
        ("text \u2039\ntheory Z imports Y begin\u203a\ntheory A imports B begin", ["B"]),
        ("header {*\ntheory Z imports Y begin*}\ntheory A imports B begin", ["B"]),
        ("theory A imports B (* begin with C *) D begin", ["B", "D"]),
        ("section \\<open>X\\<close>\n(*<*) theory A imports B begin end (*>*)", ["B"]),
        ("chapter \\<open>X\\<close> theory A imports B begin", ["B"]),
        ("theory A imports Beginning begin", ["Beginning"]),
        ('theory Pure\nkeywords "!!" begin', []),
        ('lemma x: "y"\n', []),
        ("", []),
        ("theory A imports", []),
    ],
)
def test_imports_are_those_of_the_header(text: str, imports: list[str]) -> None:
    assert imports_of(text) == imports


def header(name: str, *imports: str) -> str:
    return f"theory {name}\nimports Main {' '.join(imports)}\nbegin\nend\n"


def order(theories: dict[str, str]) -> list[str]:
    return in_import_order([*theories], theories.__getitem__)


def test_a_theory_comes_after_its_imports_and_else_in_path_order() -> None:
    theories = {
        "A.thy": header("A", "Z"),
        "B.thy": header("B"),
        "C.thy": header("C", "A", "D"),
        "D.thy": header("D"),
        "ROOT": "theory X imports Z begin",
        "Z.thy": header("Z"),
    }
    assert order(theories) == ["B.thy", "D.thy", "ROOT", "Z.thy", "A.thy", "C.thy"]


def test_imports_by_path_by_session_and_from_elsewhere() -> None:
    theories = {
        "a/Base.thy": header("Base", '"../z/Base"'),
        "a/Top.thy": header("Top", '"My_Session.Mid"', "Base"),
        "m/Mid.thy": header("Mid", '"HOL-Library.Multiset"', '"Other/Base"'),
        "z/Base.thy": header("Base"),
    }
    found = order(theories)
    assert found.index("z/Base.thy") < found.index("a/Base.thy") < found.index("a/Top.thy")
    assert found.index("m/Mid.thy") < found.index("a/Top.thy")


@pytest.mark.parametrize(("here", "there"), [("a", "b"), ("b", "a")])
def test_of_two_theories_of_one_name_the_nearer_one_is_meant(here: str, there: str) -> None:
    theories = {
        f"{here}/Top.thy": header("Top", '"Session.Base"'),
        f"{here}/z/Base.thy": header("Base"),
        f"{there}/Base.thy": header("Base", '"Session.Top"'),
    }
    assert order(dict(sorted(theories.items()))) == [
        f"{here}/z/Base.thy",
        f"{here}/Top.thy",
        f"{there}/Base.thy",
    ]


def test_a_theory_that_has_the_name_of_its_import_does_not_import_itself() -> None:
    assert order({"List.thy": header("List", '"HOL.List"')}) == ["List.thy"]


def test_a_theory_of_the_library_is_not_the_one_of_its_name_here() -> None:
    library = 'theory Extra imports "HOL-Library.Multiset" begin'
    own = "theory Multiset imports Extra begin"
    texts = {"E/Extra.thy": library, "E/Multiset.thy": own}
    assert in_import_order(sorted(texts, reverse=True), texts.__getitem__) == [*texts]
    plain = {
        "Library/Multiset.thy": "theory Multiset imports Main begin",
        "Library/Extra.thy": library,
    }
    for order in (sorted(plain), sorted(plain, reverse=True)):
        assert in_import_order(order, plain.__getitem__) == [*plain]


def test_unclosed_prose_takes_no_longer_the_longer_it_is() -> None:
    text = "{* " * 40_000 + "\ntheory A imports B begin"
    start = time.perf_counter()
    assert imports_of(text) == []
    assert time.perf_counter() - start < 2


def test_a_long_chain_in_any_order() -> None:
    names = [f"T{n:04d}" for n in range(600)]
    shuffled = random.Random(0).sample(names, len(names))
    follows = dict(zip(shuffled[1:], shuffled, strict=False))
    theories = {f"{n}.thy": header(n, *filter(None, [follows.get(n)])) for n in sorted(names)}
    assert order(theories) == [f"{name}.thy" for name in shuffled]


def opened(root: Path, group: str = "isabelle") -> Source:
    return open_files(Origin("data.source", str(root)), RecordRules(), group)  # type: ignore[arg-type]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Two entries and a file next to them."""
    texts = {
        "thys/One/A.thy": header("A", "B"),
        "thys/One/B.thy": header("B", '"sub/C"'),
        "thys/One/ROOT": "session One = HOL +\n",
        "thys/One/sub/C.thy": header("C", '"HOL-Library.Multiset"'),
        "thys/Two/A.thy": header("A"),
        "thys/ROOTS": "One\nTwo\n",
    }
    for name, text in texts.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "thys"


def test_an_entry_is_a_document_in_import_order(archive: Path) -> None:
    documents = {d.name: d.text for d in opened(archive).documents(lambda name: True)}
    assert [*documents] == ["One", "ROOTS", "Two"]
    lines = [line for line in documents["One"].splitlines() if line.startswith(("theory", "ses"))]
    assert lines == ["session One = HOL +", "theory C", "theory B", "theory A"]
    assert documents["Two"] == header("A")


def test_a_glob_takes_theories_alone(archive: Path) -> None:
    documents = {d.name: d.text for d in opened(archive / "**/*.thy").documents(lambda name: True)}
    assert [*documents] == ["One", "Two"]
    assert documents["One"].startswith("theory C")


def test_the_order_is_part_of_the_fingerprint(archive: Path) -> None:
    assert opened(archive).fingerprint() != opened(archive, "folder").fingerprint()


def test_theories_that_import_each_other_are_told(archive: Path) -> None:
    (archive / "Two" / "A.thy").write_text(header("A", "B"))
    (archive / "Two" / "B.thy").write_text(header("B", "A"))
    with pytest.raises(ConfigError) as caught:
        opened(archive)
    message = str(caught.value)
    assert "theories of Two import each other (" in message
    assert message.endswith("A.thy); mend them, or set data.group to 'folder'")
    assert "\n" not in message
