import shutil
import subprocess
import sys

import pytest

from src.configuration import PROJECT
from src.errors import UserError
from src.new import create


@pytest.fixture
def copy(tmp_path):
    """The parts of the project that a new method is made of."""
    for folder in ("configs", "src", "tests"):
        shutil.copytree(PROJECT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROJECT / "pyproject.toml", tmp_path)
    return tmp_path


def test_a_new_method_is_a_copy_that_passes_its_own_test_and_trains(copy):
    made = create(copy, method="my_own", source="mae")
    assert {str(path.relative_to(copy)) for path in made} == {
        "src/models/masked/my_own.py",
        "configs/model/my_own.yaml",
        "configs/scale/model/my_own_smoke.yaml",
        "configs/scale/model/my_own_tiny.yaml",
        "configs/experiment/my_own_tiny.yaml",
        "configs/experiment/my_own_vitb.yaml",
        "configs/experiment/my_own_vitl.yaml",
        "tests/models/masked/test_my_own.py",
    }
    module = made[0].read_text()
    assert "class MyOwn(PretrainModule)" in module
    assert "class MyOwnDecoder" in module
    assert "MAE" not in module
    experiment = (copy / "configs/experiment/my_own_vitb.yaml").read_text()
    assert "override /model: my_own" in experiment
    assert "paper: MyOwn (yours)" in experiment
    run = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(made[-1].relative_to(copy))]
    tested = subprocess.run(run, cwd=copy, capture_output=True, text=True)
    assert tested.returncode == 0, tested.stdout
    train = ["experiment=my_own_tiny", "data.source.count=16", "data.source.cache_dir=null", "image_size=16"]
    train += ["data.batch_size=4", "data.train_samples=8", "data.eval_samples=8", "trainer.max_epochs=1"]
    trained = subprocess.run([sys.executable, "-m", "src.train", *train], cwd=copy, capture_output=True, text=True)
    assert trained.returncode == 0, trained.stderr
    assert list(copy.glob("runs/my_own_tiny/*/checkpoints/last.ckpt"))


@pytest.mark.parametrize(
    ("method", "source", "message"),
    [
        (
            "mine",
            "segmentation_linear",
            "segmentation serves other recipes too; .* a copy of configs/model/segmentation_",
        ),
        ("mine", "mea", "FROM=mea: there is no such method; did you mean mae"),
        ("My-Own", "mae", "METHOD=My-Own: a method's name is lower-case"),
        ("class", "mae", "METHOD=class"),
        ("mae", "mae", r"METHOD=mae: .* exists"),
    ],
)
def test_names_that_cannot_be_are_refused(method, source, message):
    with pytest.raises(UserError, match=message):
        create(PROJECT, method=method, source=source)
