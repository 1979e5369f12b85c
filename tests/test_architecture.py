"""Imports run one way, from the commands down to the ground floor, and never in a circle."""

import ast
from collections.abc import Iterator

from src.configuration import PROJECT

# from the ground up; a module imports from its own floor and those below
FLOORS = (
    (
        "src.errors",
        "src.event_writer",
        "src.files",
        "src.image_size",
        "src.memory",
        "src.randomness",
        "src.collectives",
        "src.schedules",
        "src.checkpoint_io",
    ),
    (
        "src.composition",
        "src.configuration",
        "src.value_types",
        "src.loggers",
        "src.optim",
        "src.sharding",
        "src.sync_batchnorm",
    ),
    ("src.datamodules",),
    ("src.models",),
    ("src.evaluation",),
    ("src.callbacks",),
    (
        "src.runs",
        "src.stored",
        "src.trained",
        "src.panels",
        "src.train",
        "src.resume",
        "src.submit",
        "src.show_config",
        "src.listing",
    ),
    ("src.finetuning", "src.evaluation_config", "src.evaluation_results", "src.evaluate", "src.export"),
    ("src.measure",),
    ("src.claims", "src.gauntlet"),
    ("src.methods_page", "src.new"),
    ("benchmarks",),
)
# what never needs a configuration file or a run
NO_CONFIGURATION = ("src.datamodules.", "src.models.", "src.evaluation.", "src.callbacks.")


def modules() -> Iterator[tuple[str, ast.Module]]:
    for folder in ("src", "benchmarks"):
        for path in sorted((PROJECT / folder).rglob("*.py")):
            name = ".".join(path.relative_to(PROJECT).with_suffix("").parts)
            yield name, ast.parse(path.read_text())


def imported(tree: ast.Module, names: set[str]) -> set[str]:
    """The project's modules that a file imports, at its top or in a function."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
            found.add(node.module)
    return {name for name in found if name in names}


def graph() -> dict[str, set[str]]:
    trees = dict(modules())
    return {name: imported(tree, set(trees)) - {name} for name, tree in trees.items()}


def floor(module: str) -> int:
    floors = [
        number
        for number, names in enumerate(FLOORS)
        for name in names
        if module == name or module.startswith(f"{name}.")
    ]
    assert len(floors) == 1, f"{module} stands on no floor, or on several: put it into FLOORS"
    return floors[0]


def test_imports_run_down():
    upwards = [
        f"{name} imports {other}" for name, others in graph().items() for other in others if floor(other) > floor(name)
    ]
    assert upwards == []


def test_claims_gauntlet_and_benchmarks_do_not_know_each_other_upwards():
    for name, others in graph().items():
        for other in others:
            assert not (name.startswith("src.claims") and other.startswith("src.gauntlet")), (name, other)
            assert not (name.startswith("src.gauntlet") and other.startswith("src.claims")), (name, other)
            assert not (name.startswith("src.") and other.startswith("benchmarks")), (name, other)


def test_nothing_that_is_built_knows_the_configuration():
    for name, others in graph().items():
        if name.startswith(NO_CONFIGURATION):
            assert not others & {"src.configuration", "src.composition", "src.runs", "src.train"}, name


def test_no_method_is_imported_by_what_it_is_built_of():
    """Heads, losses, layers, text towers and backbones know no method."""
    parts = tuple(f"src.models.{part}" for part in ("heads", "losses", "layers", "text", "backbones"))
    families = tuple(
        f"src.models.{f}" for f in ("masked", "joint_embedding", "supervised", "image_text", "video", "downstream")
    )
    for name, others in graph().items():
        if name.startswith(parts):
            assert not [other for other in others if other.startswith(families)], name


def test_no_file_imports_itself_in_a_circle():
    edges, state = graph(), {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle: {' -> '.join([*path, name])}"
        if state.get(name):
            return
        for other in edges[name]:
            visit(other, (*path, name))
        state[name] = True

    for name in edges:
        visit(name, ())
