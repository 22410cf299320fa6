# SPDX-License-Identifier: Apache-2.0
"""The house stands as docs/decisions describe it: who may import whom, how large a room may be, what is never done."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import deepfusion

SOURCE = Path(deepfusion.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
FLOORS = [
    set(rooms.split())
    for rooms in (
        "errors registry schema types state_dicts robust training scores fused losses progress statistics membership "
        "sharding spread",
        "artifacts data devices moe federation",
        "stages",
        "methods",
        "config",
        "run record measure spending plan inference distilling merging catalogue report fleet market audit",
        "app comparing",
        "api cli __main__",
    )
]
FLOORS[-1].add("")
"""Rooms from the ground up; a room imports from its own floor or from below. "" is the package itself."""


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports_of(path: Path) -> set[str]:
    """Modules that a file imports, ours without the leading `deepfusion.`, others as `!name`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            names = [f"{base}.{alias.name}" for alias in node.names] if base.startswith("deepfusion") else [base]
        for name in names:
            found.add(name.removeprefix("deepfusion.") if name.startswith("deepfusion.") else f"!{name}")
    return found


def floor_of(room: str) -> int:
    return next(level for level, rooms in enumerate(FLOORS) if room in rooms)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_room_stands_on_the_floors_below(path: Path) -> None:
    room = name_of(path).split(".")[0]
    for imported in imports_of(path):
        if not imported.startswith("!"):
            other = imported.split(".")[0]
            level = floor_of(other) if any(other in rooms for rooms in FLOORS) else floor_of("")
            assert level <= floor_of(room), f"{name_of(path)} imports {imported} from a floor above"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_flower_stays_in_its_rooms(path: Path) -> None:
    uses_flower = any(name.startswith("!flwr") for name in imports_of(path))
    assert not uses_flower or name_of(path).split(".")[0] in {"federation", "app"}


def test_no_stage_imports_another_stage() -> None:
    for path in (SOURCE / "stages").rglob("*.py"):
        own = name_of(path).split(".")[1] if "." in name_of(path) else ""
        others = {i.split(".")[1] for i in imports_of(path) if i.startswith("stages.")} - {own}
        assert not others, f"{name_of(path)} imports the stages {others}"


def test_no_method_imports_another_method() -> None:
    shared = {
        "arrivals",
        "assembly",
        "base",
        "beginning",
        "budget",
        "exchange",
        "gathering",
        "holding",
        "learning",
        "reading",
        "rounds",
        "selective",
        "warm_start",
    }
    for path in (SOURCE / "methods").glob("*.py"):
        if path.stem in {"__init__", *shared}:
            continue
        others = {i.split(".")[1] for i in imports_of(path) if i.startswith("methods.")} - shared
        assert not others, f"{name_of(path)} imports the methods {others}"


def test_nothing_but_the_command_line_imports_the_market_and_it_knows_nothing_of_the_pipeline() -> None:
    pipeline = {"run", "app", "config", "methods", "stages", "federation", "plan", "comparing", "measure", "api"}
    for path in FILES:
        room, imported = name_of(path).split(".")[0], {name.split(".")[0] for name in imports_of(path)}
        assert "market" not in imported or room in {"market", "cli"}, f"{name_of(path)} imports the market"
        assert room != "market" or not imported & pipeline, f"{name_of(path)} imports {imported & pipeline}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_stay_small_and_say_what_they_are(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    if not lines:
        return
    assert lines[0] == "# SPDX-License-Identifier: Apache-2.0"
    assert len(lines) <= 320, f"{len(lines)} lines: two rooms?"
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "no docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno
            assert length <= 60, f"{node.name}: {length} lines"
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            owner_is_public = node.col_offset == 0
            assert not owner_is_public or ast.get_docstring(node), f"{node.name} has no docstring"


@pytest.mark.parametrize(
    "word", ["pickle", "torch.load(", "trust_remote_code=True", "TODO", "FIXME", "NotImplementedError"]
)
def test_what_is_never_done(word: str) -> None:
    def code_of(path: Path) -> str:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):  # docstrings may say that we never do it
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value.value = ""
        return ast.unparse(tree)

    import_line = f"import {word}"
    offenders = [name_of(p) for p in FILES if (import_line if word == "pickle" else word) in code_of(p)]
    assert offenders == []


def test_the_public_names_are_ten_at_most_and_all_there() -> None:
    assert len(deepfusion.__all__) <= 10
    for name in deepfusion.__all__:
        assert getattr(deepfusion, name) is not None
