"""`make new METHOD=mine FROM=mae`: a method of your own, begun as a runnable, tested copy of one of the project's."""

from __future__ import annotations

import ast
import keyword
import re
import shutil
import tempfile
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from src import configuration, methods_page
from src.configuration import PROJECT
from src.errors import UserError, nearest

_COMMENT = re.compile(r"^# (?!@package).*\n(?:# .*\n)*", re.MULTILINE)  # the opening comment of a file
_ABOUT = re.compile(r"^about:\n(?:  .*\n)+", re.MULTILINE)


@dataclass(frozen=True)
class Method:
    """The names of a method.

    Args:
        recipe: its file in configs/recipe, without ending: "mae".
        module: dotted path: "src.models.masked.mae".
        title: its class: "MAE".
    """

    recipe: str
    module: str
    title: str

    @property
    def file(self) -> Path:
        return Path(*self.module.split(".")).with_suffix(".py")

    @property
    def test(self) -> Path:
        return Path("tests") / self.file.relative_to("src").with_name(f"test_{self.file.name}")


def main(argv: Sequence[str]) -> int:
    arguments = dict(word.split("=", 1) for word in argv if "=" in word)
    created = create(PROJECT, method=arguments.get("method", ""), source=arguments.get("from", ""))
    print("\n".join(f"  {path.relative_to(PROJECT)}" for path in created))
    first = next(path.stem for path in created if path.parent.name == "experiment")
    print(f"\nnow: change {created[0].relative_to(PROJECT)}, run it with `make train EXP={first} SCALE=tiny`")
    print(f"and its test with `make test ARGS={created[-1].relative_to(PROJECT)}`")
    return 0


def create(project: Path, *, method: str, source: str) -> list[Path]:
    """Copy the module, recipe, experiments and test of the method ``source`` under the name ``method``.

    Every new experiment is composed at every scale before anything is written, and whatever fails afterwards, the new
    files are removed again.

    Returns:
        The new files, the module first and its test last.

    Raises:
        UserError: ``source`` is no method, ``method`` is no name for a module, or it is taken.
    """
    recipes = configuration.names("recipe", project / "configs")
    if source not in recipes:
        raise UserError(f"FROM={source}: there is no such method{nearest(source, recipes)}")
    # YAML reads some words as values
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", method) or keyword.iskeyword(method) or method in _YAML_VALUES:
        raise UserError(f"METHOD={method}: a method's name is a module's: lower-case letters, digits and underscores")
    module, title = _target(project / f"configs/recipe/{source}.yaml").rsplit(".", 1)
    old = Method(source, module, title)
    new = Method(method, f"{module.rsplit('.', 1)[0]}.{method}", "".join(p.capitalize() for p in method.split("_")))
    files = dict(_files(project, old, new))
    for path in files:
        if (project / path).exists():
            raise UserError(f"METHOD={method}: {path} exists; choose another name")
    _check(project, files, new)
    written: list[Path] = []
    try:
        for path, text in files.items():
            (project / path).write_text(text)
            written.append(project / path)
        methods_page.write(project)
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return written


def _files(project: Path, old: Method, new: Method) -> Iterator[tuple[Path, str]]:
    """The new files, relative to the project, and what they hold."""

    def read(path: Path | str) -> str:
        return (project / path).read_text()

    experiments = {name: _experiment_name(name, old, new) for name in _experiments(project, old)}
    names = {old.module: new.module} | _classes(read(old.file), old, new)
    yield new.file, _renamed(read(old.file), names)
    recipe = _renamed(read(f"configs/recipe/{old.recipe}.yaml"), names)
    yield Path(f"configs/recipe/{new.recipe}.yaml"), _ABOUT.sub(partial(_described, title=new.title), recipe)
    for name, renamed in experiments.items():
        text = _renamed(read(f"configs/experiment/{name}.yaml"), names | experiments)
        text = text.replace(f"override /recipe: {old.recipe}\n", f"override /recipe: {new.recipe}\n")
        text = _COMMENT.sub(f"# {new.title}. Deviations: not published yet.\n", text, count=1)
        text = _ABOUT.sub(partial(_described, title=new.title), text)
        yield Path(f"configs/experiment/{renamed}.yaml"), text
    if old.file.stem == old.recipe and (project / old.test).exists():  # another recipe's tests are not this one's
        yield new.test, _renamed(read(old.test), names | experiments)
    else:
        first = next(iter(experiments.values()))
        yield new.test, _TEST.format(title=new.title, module=new.module, experiment=first)


def _described(about: re.Match[str], title: str) -> str:
    """Returns a section `about` with the new method's paper and deviations."""
    text = re.sub(r"^  paper:.*\n(?:    .*\n)*", f"  paper: {title} (yours)\n", about[0], flags=re.MULTILINE)
    new = "  deviations: not published yet\n"
    return re.sub(r"^  deviations:.*\n(?:    .*\n)*", new, text, flags=re.MULTILINE)


def _experiments(project: Path, old: Method) -> list[str]:
    """The experiments that use the recipe, and those of the method's name that build on them."""
    folder = project / "configs/experiment"
    texts = {path.stem: path.read_text() for path in sorted(folder.glob("*.yaml"))}
    found = [name for name, text in texts.items() if re.search(rf"override /recipe: {old.recipe}$", text, re.MULTILINE)]
    for name, text in texts.items():
        builds_on = re.findall(r"^  - (\w+)$", text, re.MULTILINE)
        if name not in found and name.startswith(f"{old.recipe}_") and set(builds_on) & set(found):
            found.append(name)
    return found


def _experiment_name(name: str, old: Method, new: Method) -> str:
    """ "mae_vitb" -> "mine_vitb"; a name without the recipe's keeps its last part."""
    if name.startswith(f"{old.recipe}_"):
        return f"{new.recipe}_{name.removeprefix(f'{old.recipe}_')}"
    return f"{new.recipe}_{name.rsplit('_', 1)[-1]}"


def _classes(module: str, old: Method, new: Method) -> dict[str, str]:
    """The classes that the module defines under the method's name, and their new names."""
    names = [node.name for node in ast.parse(module).body if isinstance(node, ast.ClassDef)]
    return {name: new.title + name.removeprefix(old.title) for name in names if name.startswith(old.title)}


def _renamed(text: str, names: Mapping[str, str]) -> str:
    """``text`` with whole words and dotted paths under their new names."""
    for old, new in names.items():
        text = re.sub(rf"(?<![\w.]){re.escape(old)}(?!\w)", new, text)
        text = re.sub(rf"(?<=\.){re.escape(old)}(?!\w)", new, text) if "." not in old else text
    return text


def _target(recipe: Path) -> str:
    """The class that a recipe configures."""
    from omegaconf import OmegaConf

    return str(OmegaConf.load(recipe).model._target_)


def _check(project: Path, files: Mapping[Path, str], new: Method) -> None:
    """Compose every new experiment at every scale, and execute the new module.

    Raises:
        UserError: one of them fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(project / "configs", Path(folder, "configs"))
        for path, text in files.items():
            if path.parts[0] == "configs":
                Path(folder, path).write_text(text)
        for path in files:
            if path.parent.name == "experiment":
                for scale in ("paper", "smoke", "tiny"):
                    words = [f"experiment={path.stem}", f"scale={scale}"]
                    composed = configuration.composition("train", words, Path(folder, "configs")).config
                    if composed.model._target_ != f"{new.module}.{new.title}":
                        raise UserError(f"METHOD={new.recipe}: {path} does not use {new.module}.{new.title}")
    module = types.ModuleType(new.module)
    exec(compile(files[new.file], str(new.file), "exec"), module.__dict__)
    if not hasattr(module, new.title):
        raise UserError(f"METHOD={new.recipe}: {new.file} defines no class {new.title}")


_YAML_VALUES = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")

_TEST = '''"""{title}: replace this by tests of its mechanism, with values worked out by hand."""

import torch

from src import configuration, train
from {module} import {title}

OVERRIDES = ["data.source.count={{train: 64, val: 16, test: 16}}", "data.source.cache_dir=null", "data.batch_size=8"]
OVERRIDES += ["data.train_samples=64", "data.eval_samples=16", "data.num_workers=0", "trainer.accelerator=cpu"]
OVERRIDES += ["trainer.devices=1", "callbacks.evaluation=null", "callbacks.visualizations=null"]


def weights_after(steps, folder, monkeypatch):
    monkeypatch.delenv("PRETEXT_RUN_DIR", raising=False)
    words = ["experiment={experiment}", "scale=tiny", f"trainer.max_steps={{steps}}", f"paths.runs={{folder}}"]
    assert train.main([*words, f"run.name={{steps}}", *OVERRIDES]) == 0
    return torch.load(folder / f"{experiment}/{{steps}}/checkpoints/last.ckpt", weights_only=True)["state_dict"]


def test_steps_change_what_is_trained_and_nothing_else(tmp_path, monkeypatch):
    config = train.compose(["experiment={experiment}", "scale=tiny", f"run.dir={{tmp_path}}", *OVERRIDES])
    method = configuration.instantiate(config.model)
    assert isinstance(method, {title})
    first, third = (weights_after(steps, tmp_path, monkeypatch) for steps in (1, 3))
    trained = [name for name, value in method.named_parameters() if value.requires_grad]
    changed = [name for name in trained if not torch.equal(first[name], third[name])]
    assert len(changed) > len(trained) / 2
'''


if __name__ == "__main__":
    configuration.run_main(main)
