import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from src import configuration, methods_page
from src.configuration import PROJECT
from src.errors import UserError
from src.new import create


@pytest.fixture
def copy(tmp_path):
    """The parts of the project that a new method is made of."""
    for folder in ("configs", "src", "tests", "docs"):
        shutil.copytree(PROJECT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(PROJECT / file, tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """As `copy`, for tests that remove what they add."""
    folder = tmp_path_factory.mktemp("project")
    for part in ("configs", "src/models", "tests/models"):
        shutil.copytree(PROJECT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def run(copy, *command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_new_method_is_a_copy_that_passes_its_own_test_and_trains(copy):
    created = create(copy, method="my_own", source="mae")
    assert {str(path.relative_to(copy)) for path in created} == {
        "src/models/masked/my_own.py",
        "configs/recipe/my_own.yaml",
        "configs/experiment/my_own_tiny.yaml",
        "configs/experiment/my_own_vitb.yaml",
        "configs/experiment/my_own_vitl.yaml",
        "tests/models/masked/test_my_own.py",
    }
    module = created[0].read_text()
    assert "class MyOwn(PretrainModule)" in module
    assert "class MyOwnDecoder" in module
    experiment = (copy / "configs/experiment/my_own_vitb.yaml").read_text()
    assert "override /recipe: my_own" in experiment
    assert "paper: MyOwn (yours)" in (copy / "configs/recipe/my_own.yaml").read_text()
    assert "### `my_own_tiny`, `my_own_vitb`" in (copy / "docs/methods.md").read_text()
    run(copy, "pytest", "-n", "0", "-p", "no:cacheprovider", str(created[-1].relative_to(copy)))
    train = ["experiment=my_own_tiny", "data.source.count=16", "data.source.cache_dir=null", "image_size=16"]
    train += ["data.batch_size=4", "data.train_samples=8", "data.eval_samples=8", "trainer.max_epochs=1"]
    run(copy, "src.train", *train)
    assert list(copy.glob("runs/my_own_tiny/*/checkpoints/last.ckpt"))


def test_a_method_whose_tests_are_elsewhere_comes_with_a_test_of_its_own(copy):
    created = create(copy, method="mine", source="laclip")
    assert created[-1].relative_to(copy) == Path("tests/models/image_text/test_mine.py")
    assert created[0].relative_to(copy) == Path("src/models/image_text/mine.py")  # its module serves other recipes too
    run(copy, "pytest", "-n", "0", "-p", "no:cacheprovider", "tests/models/image_text/test_mine.py")


@pytest.mark.parametrize("source", configuration.names("recipe"))
def test_every_method_can_be_the_start_of_a_new_one(source, plain, monkeypatch):
    """Every new file composes, and nothing else changes."""
    monkeypatch.setattr(methods_page, "write", lambda project: None)
    before = files(plain)
    created = create(plain, method="mine", source=source)
    try:
        new = {str(path.relative_to(plain)) for path in created}
        after = files(plain)
        assert {name: text for name, text in after.items() if name not in new} == before
        kinds = [next(part for part in ("experiment", "recipe", "tests", "src") if part in name) for name in new]
        assert set(kinds) == {"experiment", "recipe", "tests", "src"}
        compile(created[-1].read_text(), str(created[-1]), "exec")
    finally:
        for path in created:
            path.unlink()


def test_a_failure_leaves_nothing_behind(plain, monkeypatch):
    def fail(project):
        raise OSError("disk full")

    monkeypatch.setattr(methods_page, "write", fail)
    before = files(plain)
    with pytest.raises(OSError, match="disk full"):
        create(plain, method="mine", source="dino")
    assert files(plain) == before


def test_what_does_not_compose_is_not_written(plain, monkeypatch):
    recipe = plain / "configs/recipe/dino.yaml"
    text = recipe.read_text()
    before = files(plain)
    recipe.write_text(text.replace("views@data.train_view: dino", "views@data.train_view: no_such_views"))
    try:
        with pytest.raises(UserError, match="no_such_views"):
            create(plain, method="mine", source="dino")
    finally:
        recipe.write_text(text)
    assert files(plain) == before


@pytest.mark.parametrize(
    ("method", "source", "message"),
    [
        ("mine", "mea", "FROM=mea: there is no such method; did you mean mae"),
        ("My-Own", "mae", "METHOD=My-Own: a method's name is a module's"),
        ("class", "mae", "METHOD=class"),
        ("null", "mae", "METHOD=null"),
        ("mae", "mae", r"METHOD=mae: .* exists"),
    ],
)
def test_names_that_cannot_be_are_refused(method, source, message):
    with pytest.raises(UserError, match=message):
        create(PROJECT, method=method, source=source)
