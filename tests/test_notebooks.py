"""The notebooks run from top to bottom, and what they show is there."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

from src.configuration import PROJECT

NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))
STEPS = 12

# appended to the notebook: what its cells have left behind
RESULTS = """
import json
print(json.dumps({
    "losses": curve.losses,
    "scores": scores,
    "root": str(ROOT),
    "moved": sum(not torch.equal(a, b) for a, b in zip(untrained.parameters(), module.parameters())),
    "error": [((rows[:, 2] - rows[:, 0]) ** 2).mean().item() for rows in (before, after)],
    "kept": [(rows[:, 2] - rows[:, 0])[rows[:, 1] == rows[:, 0]].abs().max().item() for rows in (before, after)],
}))
"""

# of the notebook of scenes and CLIP
WORDS = """
import json
print(json.dumps({
    "losses": curve.losses,
    "scores": scores,
    "chances": chances.tolist(),
    "maps": list(maps.shape),
    "error": error,
    "similarity": list(similarity.shape),
}))
"""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_stored_without_outputs_and_without_this_machines_paths(path: Path) -> None:
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not re.search(r"(?<![\w./])/(?:home|Users|root|tmp|work|mnt)\b", cell.source)
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
            assert len(cell.source.splitlines()) <= 35
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds.count("markdown") >= kinds.count("code") / 2


def run(name: str, ending: str) -> nbformat.NotebookNode:
    """A notebook, trained for some steps, started where its file is."""
    notebook = nbformat.read(PROJECT / "notebooks" / name, 4)
    notebook.cells.append(nbformat.v4.new_code_cell(ending))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRETEXT_NOTEBOOK_STEPS", str(STEPS))
        patch.delenv("MPLBACKEND", raising=False)
        folder = {"metadata": {"path": str(PROJECT / "notebooks")}}
        NotebookClient(notebook, timeout=300, kernel_name="python3", resources=folder).execute()
    return notebook


@pytest.fixture(scope="module")
def executed() -> nbformat.NotebookNode:
    """The notebook of scenes and MAE."""
    return run("mae_on_scenes.ipynb", RESULTS)


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


@pytest.fixture(scope="module")
def results(executed: nbformat.NotebookNode) -> dict[str, Any]:
    return json.loads(printed(executed.cells[-1]))


def test_the_model_learns(results: dict[str, Any]) -> None:
    losses = results["losses"]
    assert len(losses) == STEPS
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
    assert results["moved"] > 20
    before, after = results["error"]
    assert after < before  # the reconstructions are nearer to the images
    assert results["kept"] == pytest.approx([0, 0], abs=1e-5)  # what was seen is shown as it is


def test_the_evaluation_says_what_each_encoder_is_worth(
    executed: nbformat.NotebookNode, results: dict[str, Any]
) -> None:
    names = [f"{protocol}_top1{which}" for protocol in ("knn", "linear") for which in ("", "_untrained", "_pixels")]
    scores = results["scores"]
    assert set(names) <= set(scores)
    assert all(0 <= scores[name] <= 1 for name in names)
    assert scores["knn_top1_pixels"] > 0.15  # of ten kinds: the labels belong to the images
    said = "\n".join(printed(cell) for cell in executed.cells if cell.cell_type == "code")
    line = next(line for line in said.splitlines() if line.startswith("trained "))
    assert line.split() == ["trained", f"{scores['knn_top1']:.1%}", f"{scores['linear_top1']:.1%}"]


def test_every_figure_shows_something(executed: nbformat.NotebookNode) -> None:
    check_figures(executed, 5)


def check_figures(executed: nbformat.NotebookNode, count: int) -> None:
    cells = [cell for cell in executed.cells if cell.cell_type == "code" and "plt.show()" in cell.source]
    assert len(cells) == count
    seen = []
    for cell in cells:
        [figure] = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(figure))).convert("RGB"))
        assert min(pixels.shape[:2]) >= 200
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 200  # not an empty frame
        seen.append(pixels.tobytes())
    assert len(set(seen)) == len(seen)


def test_paths_start_at_the_projects_root_wherever_it_was_opened(results: dict[str, Any]) -> None:
    assert Path(results["root"]) == PROJECT
    assert not (PROJECT / "notebooks/cache").exists()


def test_a_clip_is_trained_and_asked_in_words() -> None:
    notebook = run("clip_on_scenes.ipynb", WORDS)
    check_figures(notebook, 5)
    said = [printed(cell) for cell in notebook.cells if cell.cell_type == "code"]
    results = json.loads(said[-1])
    assert len(results["losses"]) == STEPS
    assert np.mean(results["losses"][-3:]) < np.mean(results["losses"][:3])
    assert {"zeroshot_top1", "zeroshot_single_top1", "hardnegatives_attribute"} <= set(results["scores"])
    assert "attribute  right: " in "".join(said)
    chances = np.array(results["chances"])
    assert chances.shape == (256, 5)
    assert chances.sum(axis=1) == pytest.approx(1, abs=1e-5)
    assert results["similarity"] == [4, 256]
    assert results["maps"] == [256, 4, 64]
    assert results["error"] < 1e-5  # what the patches add makes the similarity
