"""`make new METHOD=mine FROM=mae`: a method of your own, begun as a runnable, tested copy of one that is here."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from src import configuration, listing
from src.configuration import PROJECT
from src.errors import UserError, nearest


@dataclass(frozen=True)
class Names:
    """How a method is called in file names and keys, and as a class: ("mae", "MAE")."""

    key: str
    title: str


def main(argv: Sequence[str]) -> int:
    words = dict(word.split("=", 1) for word in argv if "=" in word)
    made = create(PROJECT, method=words.get("method", ""), source=words.get("from", ""))
    listing.write_readme(PROJECT)
    print("\n".join(f"  {path.relative_to(PROJECT)}" for path in made))
    first = next(path.stem for path in made if path.parent.name == "experiment")
    print(f"\nnow: change {made[0].relative_to(PROJECT)}, run it with `make train EXP={first} SCALE=tiny`")
    print(f"and its test with `make test ARGS={made[-1].relative_to(PROJECT)}`")
    return 0


def create(project: Path, *, method: str, source: str) -> list[Path]:
    """Copy the method ``source``'s module, recipe, experiments, scales and test under the name ``method``.

    Returns:
        The new files, the module first and its test last.

    Raises:
        UserError: ``source`` is no method or has no module of its name, ``method`` is no name for a module, or it is
            taken.
    """
    methods = sorted(path.stem for path in (project / "configs/model").glob("[!_]*.yaml"))
    if source not in methods:
        raise UserError(f"FROM={source}: there is no such method{nearest(source, methods)}")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", method) or keyword.iskeyword(method):
        raise UserError(
            f"METHOD={method}: a method's name is lower-case letters, digits and underscores, as a module's"
        )
    target = OmegaConf.load(project / f"configs/model/{source}.yaml").model._target_
    module, title = target.rsplit(".", 1)
    names, new = Names(source, title), Names(method, "".join(part.capitalize() for part in method.split("_")))
    pairs = [(path, _renamed(path, names, new)) for path in _files(project, source, module)]
    if source not in module.rsplit(".", 1)[1]:
        raise UserError(
            f"FROM={source}: {module} serves other recipes too; one of your own for it is a copy of "
            f"configs/model/{source}.yaml"
        )
    for _, path in pairs:
        if path.exists():
            raise UserError(f"METHOD={method}: {path.relative_to(project)} exists; choose another name")
    for old, path in pairs:
        text = _rewrite(old.read_text(), names, new)
        if path.parent.name == "experiment":
            text = re.sub(
                r"^(# ).*(Deviations:).*$", rf"\1{new.title}. \2 not published yet.", text, flags=re.MULTILINE
            )
            text = re.sub(r"^(  paper:).*$", rf"\1 {new.title} (yours)", text, flags=re.MULTILINE)
        path.write_text(text)
    return [path for _, path in pairs]


def _files(project: Path, source: str, module: str) -> Iterator[Path]:
    python = Path(*module.split(".")).with_suffix(".py")
    yield project / python
    yield project / f"configs/model/{source}.yaml"
    yield from sorted((project / "configs/scale/model").glob(f"{source}_*.yaml"))
    uses = re.compile(rf"override /model: {re.escape(source)}$|^  - {re.escape(source)}_\w+$", re.MULTILINE)
    for path in sorted((project / "configs/experiment").glob(f"{source}_*.yaml")):
        if uses.search(path.read_text()):
            yield path
    test = project / "tests" / python.relative_to("src").with_name(f"test_{python.name}")
    if test.exists():
        yield test


def _renamed(path: Path, names: Names, new: Names) -> Path:
    return path.with_name(re.sub(rf"(?<![a-z]){names.key}(?![a-z])", new.key, path.name))


def _rewrite(text: str, names: Names, new: Names) -> str:
    text = re.sub(rf"\b{names.title}", new.title, text)
    return re.sub(rf"(?<![A-Za-z0-9]){names.key}(?![a-z0-9])", new.key, text)


if __name__ == "__main__":
    configuration.run_main(main)
