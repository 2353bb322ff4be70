"""What can be changed in the code, one place at a time, by the operators of cosmic-ray, and a sample of it."""

import ast
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.ast.ast_query import ASTQuery
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).resolve().parents[1]
# Half of the sample each.
STRATA = [("pyro_vnd/distributions",), ("pyro_vnd/infer", "pyro_vnd/nn")]
# Operators are replaced within their kind: a float shifted by bits, say, fails wherever it runs, and shows nothing.
KINDS = [
    {"Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Pow"},
    {"BitOr", "BitAnd", "BitXor"},
    {"Eq", "NotEq", "Lt", "LtE", "Gt", "GtE"},
    {"Is", "IsNot"},
]
NO_CODE = {"overload", "override", "final"}
TYPES = r"[\w.]+(\[.*\])?( \| .+)+"


@dataclass(frozen=True)
class Mutant:
    """One change of one line; `occurrence` is cosmic-ray's count of the places of an operator in the file."""

    path: str
    line: int
    operator: str
    occurrence: int
    key: str  # path, definition, the line's text and what is changed: the same while other lines change


@cache
def source(path: str) -> str:
    """The text of a file of the checkout, as it was when this run began."""
    return (ROOT / path).read_text()


def wanted(operator: str) -> bool:
    """Whether an operator of cosmic-ray is used."""
    if operator.endswith("_Not"):
        return operator.endswith("_Delete_Not")  # a number has no `not`
    if match := re.fullmatch(r"core/Replace(?:Binary|Comparison)Operator_(\w+?)_(\w+)", operator):
        return any(set(match.groups()) <= kind for kind in KINDS)
    return operator.startswith("core/")


class _NoCode(ast.NodeVisitor):
    """Collects the parts of a module whose change would change no program."""

    def __init__(self) -> None:
        self.parts: list[ast.AST] = []

    def visit(self, node: ast.AST) -> None:
        decorators = getattr(node, "decorator_list", [])
        names = {ast.unparse(entry).rpartition(".")[2] for entry in decorators}
        called = ast.unparse(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else None
        left_out = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        if isinstance(node, ast.Raise | ast.Assert) or "overload" in names or called in {"warn", "TypeVar"}:
            left_out.append(node)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            left_out.append(node)
        if names & NO_CODE:
            left_out += decorators
        if called == "cast":
            left_out.append(node.args[0])
        if called == "zip":  # `strict` is an assertion
            left_out += node.keywords
        if isinstance(node, ast.Module):  # aliases such as `Law = OrderedMask | Length`
            assigned = [entry for entry in node.body if isinstance(entry, ast.Assign)]
            left_out += [entry for entry in assigned if re.fullmatch(TYPES, ast.unparse(entry.value))]
        self.parts += filter(None, left_out)
        self.generic_visit(node)

    def holds(self, line: int, column: int) -> bool:
        return any(
            (part.lineno, part.col_offset) <= (line, column) < (part.end_lineno, part.end_col_offset)
            for part in self.parts
        )


def places(path: str) -> Iterator[list[Mutant]]:
    """For each place of a module that can be changed the mutants there."""
    lines = source(path).splitlines()
    no_code = _NoCode()
    no_code.visit(ast.parse(source(path)))
    found: dict[tuple[int, int], list[tuple[str, int, str]]] = defaultdict(list)
    nodes = list(ast_nodes(get_ast(source(path))))
    for name in filter(wanted, operator_names()):
        if (operator := get_operator(name)).arguments():
            continue
        positions = ((node, *position) for node in nodes for position in operator().mutation_positions(node))
        for occurrence, (node, start, _) in enumerate(positions):
            found[start].append((name.removeprefix("core/"), occurrence, ASTQuery(node).get_definition_name() or ""))
    repeated: Counter[str] = Counter()
    for (line, column), changes in sorted(found.items()):
        if no_code.holds(line, len(lines[line - 1][:column].encode())):
            continue
        mutants = []
        for operator, occurrence, definition in changes:
            key = f"{path} | {definition} | {lines[line - 1].strip()} | {operator}"
            repeated[key] += 1
            key += f" {repeated[key]}" * (repeated[key] > 1)
            mutants.append(Mutant(path, line, operator, occurrence, key))
        yield mutants


def mutate(mutant: Mutant) -> str | None:
    """The changed source; None if it is no other program."""
    before = source(mutant.path)
    changed = mutate_code(before, get_operator(f"core/{mutant.operator}")(), mutant.occurrence)
    try:
        return None if ast.dump(ast.parse(changed)) == ast.dump(ast.parse(before)) else changed
    except SyntaxError:
        return None


def sample(number: int, seed: int) -> list[Mutant]:
    """Places are drawn evenly, half of them in each stratum, and at each place one change."""

    def draw(*what: object) -> str:
        return hashlib.sha256(repr((seed, *what)).encode()).hexdigest()

    drawn = []
    for part, rooms in enumerate(STRATA):
        paths = [path.relative_to(ROOT).as_posix() for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]
        found = [place for path in paths for place in places(path)]
        print(f"{' and '.join(rooms)}: {len(found)} places to change")
        found.sort(key=lambda place: draw(*(mutant.key for mutant in place)))
        shuffled = (sorted(place, key=lambda mutant: draw(mutant.key)) for place in found)
        some = (mutant for place in shuffled if (mutant := next(filter(mutate, place), None)))
        drawn += [mutant for mutant, _ in zip(some, range((number + part) // len(STRATA)), strict=False)]
    return drawn
