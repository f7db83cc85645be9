"""The house's walls: what the engine never imports, never names, and that no import goes round."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENGINE = ROOT / "dmd_train"
FILES = sorted(ENGINE.rglob("*.py"))
OF_THE_TERMINAL = {"rich", "typer", "matplotlib"}
OF_COMFYUI = re.compile(r"comfy\w*|nodes|folder_paths")
PLAIN_WORDS = {"Note"}
"""Names of stock nodes that are plain English, too."""

Graph = dict[str, set[str]]


def dotted(file: Path) -> str:
    """The name that a module or a package is imported by."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(file): file for file in FILES}


def at_import(node: ast.AST) -> Iterator[ast.stmt]:
    """The imports below a node that run when its module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for statement in child.orelse:
                yield from at_import(ast.Module([statement], []))
        elif not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from at_import(child)


def named(statement: ast.stmt, file: Path) -> set[str]:
    """Full names of what an import names: the modules, and what is taken out of them."""
    if isinstance(statement, ast.Import):
        return {alias.name for alias in statement.names}
    assert isinstance(statement, ast.ImportFrom)
    source = statement.module or ""
    if statement.level:
        package = file.relative_to(ROOT).parent.parts
        kept = package[: len(package) - statement.level + 1]
        source = ".".join((*kept, source)).strip(".")
    return {f"{source}.{alias.name}" for alias in statement.names}


def module_of(name: str) -> str | None:
    """The module of the engine that a full name is, or is in."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def imports() -> Graph:
    """Module -> the modules of the engine that are imported with it."""
    graph: Graph = {}
    for module, file in MODULES.items():
        statements = at_import(ast.parse(file.read_text()))
        found = {module_of(name) for statement in statements for name in named(statement, file)}
        graph[module] = {other for other in found if other and other != module}
    return graph


def room(module: str) -> str:
    """A folder of the engine, or a module beside the folders."""
    return ".".join(module.split(".")[:2])


def rooms() -> Graph:
    graph: Graph = {}
    for module, others in imports().items():
        graph.setdefault(room(module), set()).update(map(room, others))
    return {name: others - {name} for name, others in graph.items()}


def circle(graph: Graph) -> list[str]:
    """One way round, if there is any."""
    done: set[str] = set()

    def follow(path: list[str]) -> list[str]:
        for following in sorted(graph[path[-1]]):
            if following in path:
                return [*path[path.index(following) :], following]
            if following not in done and (found := follow([*path, following])):
                return found
        done.add(path[-1])
        return []

    return next((found for name in sorted(graph) if (found := follow([name]))), [])


def node_names() -> set[str]:
    """Ids and display names of our nodes, and every type of node in an example workflow."""
    ours = json.loads((ROOT / "locales/en/nodeDefs.json").read_text())
    names = {*ours, *(node["display_name"] for node in ours.values())}
    for file in (ROOT / "workflows").glob("*.json"):
        names |= {node["type"] for node in json.loads(file.read_text())["nodes"]}
    return names - PLAIN_WORDS


def test_the_loop_imports_nothing_of_the_terminal() -> None:
    code = f"import dmd_train.distil, sys; print(*{OF_THE_TERMINAL} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_the_engine_names_no_node_of_comfyui() -> None:
    names = "|".join(map(re.escape, sorted(node_names(), key=len, reverse=True)))
    found = {dotted(file): re.findall(rf"\b(?:{names})\b", file.read_text()) for file in FILES}
    assert {module: named for module, named in found.items() if named} == {}


def test_no_module_of_the_engine_imports_itself_by_way_of_others() -> None:
    assert circle(imports()) == []


def test_no_room_of_the_engine_imports_itself_by_way_of_others() -> None:
    assert circle(rooms()) == []


def test_a_circle_is_found_where_there_is_one() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_the_engine_imports_neither_comfyui_nor_its_nodes() -> None:
    for file in FILES:
        for statement in ast.walk(ast.parse(file.read_text())):
            if isinstance(statement, (ast.Import, ast.ImportFrom)):
                firsts = {name.partition(".")[0] for name in named(statement, file)}
                assert [name for name in firsts if OF_COMFYUI.fullmatch(name)] == [], file
