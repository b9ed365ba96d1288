"""Counts the import arrows inside our packages: python tools/count_arrows.py [--edges PACKAGE]

A room is a sub-folder or a file on a package's top level. An arrow is one file that imports another file in another
room of the same package; all imports count, those under TYPE_CHECKING and in functions too. A circle is a set of
rooms, or of files, each of which imports itself through the others.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER_OF = {
    "moe_serve": "moe_serve",
    "expert_cache": "expert_cache",
    "placement": "placement",
    "predictors": "predictors",
    "moe_serve_base": "moe_serve_base",
    "moe_serve_kernels": "kernels/moe_serve_kernels",
}
"""Package -> its folder."""
COUNTED = ("expert_cache", "moe_serve.parallel", "moe_serve.server", "moe_serve_kernels")
Graph = Mapping[str, set[str]]
"""Module or room -> those that it imports."""


@dataclass(frozen=True)
class Import:
    """`module` (ours) names `target` on `line`. `at_load`: it happens when `module` is imported."""

    module: str
    target: str
    line: int
    at_load: bool

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


def module_files(root: Path) -> dict[str, Path]:
    """Every module of ours by its import name."""
    found = {}
    for package, folder in FOLDER_OF.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def read_imports(root: Path) -> list[Import]:
    """All imports of our modules, in the order of the files."""
    found = []
    for module, path in module_files(root).items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node, at_load in _nodes(tree.body, True):
            for target in _targets(node, module, path.name == "__init__.py"):
                found.append(Import(module, target, getattr(node, "lineno", 0), at_load))
    return found


def _is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _nodes(body: Iterable[ast.AST], at_load: bool) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes below `body`, each with whether it runs when the module loads."""
    for node in body:
        yield node, at_load
        deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and _is_type_checking(node):
            yield from _nodes(node.body, False)
            yield from _nodes(node.orelse, at_load)
        else:
            yield from _nodes(ast.iter_child_nodes(node), at_load and not deferred)


def _targets(node: ast.AST, module: str, is_package: bool) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        parents = module.split(".")[: None if is_package and node.level == 1 else -node.level + is_package]
        base = ".".join([*parents, *([base] if base else [])])
    return [f"{base}.{alias.name}" for alias in node.names]


def file_graph(imports: Iterable[Import], modules: Iterable[str]) -> dict[str, set[str]]:
    """Which of our modules imports which; a name in a module stands for the module."""
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for item in imports:
        target = item.target if item.target in graph else item.target.rpartition(".")[0]
        if target in graph and target != item.module:
            graph[item.module].add(target)
    return graph


def room_of(module: str, package: str) -> str | None:
    """The room of a module: "" is the package's own __init__, None another package."""
    if module == package:
        return ""
    return module[len(package) + 1 :].split(".")[0] if module.startswith(package + ".") else None


def arrows(graph: Graph, package: str) -> list[tuple[str, str]]:
    """(importing file, imported file) in different rooms of a package."""
    found = []
    for module, targets in sorted(graph.items()):
        for target in sorted(targets):
            rooms = room_of(module, package), room_of(target, package)
            if None not in rooms and rooms[0] != rooms[1]:
                found.append((module, target))
    return found


def room_graph(graph: Graph, package: str) -> dict[str, set[str]]:
    """Which room of a package imports which."""
    rooms: dict[str, set[str]] = {room: set() for module in graph if (room := room_of(module, package)) is not None}
    for module, target in arrows(graph, package):
        rooms[room_of(module, package) or ""].add(room_of(target, package) or "")
    return rooms


def circles(graph: Graph) -> list[list[str]]:
    """Groups of nodes each of which reaches all others of its group, in alphabetical order."""
    reach = {node: _reached(graph, node) for node in graph}
    groups = {tuple(sorted(other for other in reach[node] if node in reach[other])) for node in graph}
    return [list(group) for group in sorted(groups) if len(group) > 1]


def _reached(graph: Graph, start: str) -> set[str]:
    seen: set[str] = set()
    queue = [start]
    while queue:
        for target in graph[queue.pop()] - seen:
            seen.add(target)
            queue.append(target)
    return seen


def _report(graph: Graph, package: str) -> Iterator[str]:
    own = {module: targets for module, targets in graph.items() if room_of(module, package) is not None}
    rooms = room_graph(own, package)
    num_rooms = len(rooms.keys() - {""})
    yield f"{package}: {len(own)} files, {num_rooms} rooms, {len(arrows(own, package))} arrows between rooms"
    yield from (f"  circle of rooms: {', '.join(circle)}" for circle in circles(rooms))
    inner = {module: targets & own.keys() for module, targets in own.items()}
    yield from (f"  circle of files: {', '.join(circle)}" for circle in circles(inner))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edges", metavar="PACKAGE", help="print every arrow of this package instead")
    args = parser.parse_args()
    graph = file_graph(read_imports(ROOT), module_files(ROOT))
    if args.edges:
        print("\n".join(f"{module} -> {target}" for module, target in arrows(graph, args.edges)))
        return
    for package in COUNTED:
        print("\n".join(_report(graph, package)))


if __name__ == "__main__":
    main()
