"""The house's arrows: a package imports only packages below it, and no file grows past a screenful."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "draft_opd"
# From the bottom up. Packages in one line do not import each other.
LAYERS = (
    {"utils"},
    {"models"},
    {"drafters"},
    {"losses"},
    {"decoding"},
    {"data"},
    {"hindsight"},
    {"training"},
    {"evaluation"},
    {"serving"},
    {"report"},
    {"pipelines"},
    {"cli"},
)


def package_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).parts
    return parts[0] if len(parts) > 1 else ""


def imports_of(path: Path) -> set[str]:
    """Modules of ours that a file imports, also inside functions; not those for type checkers."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    modules = {".".join(p.relative_to(SOURCE.parent).with_suffix("").parts) for p in SOURCE.rglob("*.py")}
    return found & modules


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(SOURCE)) for p in FILES])
def test_arrows_point_down(path):
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    mine = package_of(path)
    if mine not in level:  # the package's front door, and the shipped data
        return
    for module in imports_of(path):
        _, name, *_ = module.split(".")
        if name in level and name != mine:
            assert level[name] < level[mine], f"{path} imports {module}"


def test_there_is_no_circle_of_files():
    names = {".".join(p.relative_to(SOURCE.parent).with_suffix("").parts): p for p in FILES}
    edges = {name: imports_of(path) - {name} for name, path in names.items()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name not in done:
            for other in edges[name]:
                visit(other, (*above, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_no_file_is_longer_than_400_lines():
    longer = {str(p): n for p in FILES if (n := len(p.read_text().splitlines())) > 400}
    assert not longer
