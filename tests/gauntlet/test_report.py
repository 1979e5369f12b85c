"""The page says what the numbers are, in an order that is theirs."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.gauntlet.ranking import Ranking
from src.gauntlet.report import dashboard, markdown, terminal
from tests.gauntlet.test_ranking import row

SCORES = [
    row("mae", "knn/scenes", 0.25, metric="knn_top1"),
    row("dino", "knn/scenes", 0.75, metric="knn_top1"),
    row("mae", "depth/scenes", 0.5, metric="eval/rmse", kind="dense", adaptation="fine-tuned", lower_is_better=True),
]


def test_the_page_by_hand() -> None:
    page = markdown(Ranking(SCORES), {"dino, depth/scenes": "no depth there"})
    lines = page.splitlines()
    assert "|  | rank | mean z | coverage | parameters | classification, frozen | dense, fine-tuned |" in lines
    assert "| dino | 1 | +1.00 | 50 % | 5.5 M | +1.00 | – |" in lines
    assert "| mae | 2 | -0.50 | 100 % | 5.5 M | -1.00 | +0.00 |" in lines
    assert "|  | adaptation | metric | dino | mae |" in lines
    assert "| knn/scenes | frozen | knn_top1 ↑ | 0.75 | 0.25 |" in lines
    assert "| depth/scenes | fine-tuned | eval/rmse ↓ | – | 0.5 |" in lines
    assert "| mae | -1.00 | +0.00 |" in lines
    assert "| knn/scenes | – | – |" in lines  # two backbones have no correlation
    assert lines.count("- 2030-01-01, commit abc, a CPU (2 cores), torch 2, 1 threads.") == 1
    assert lines[-1] == "- dino, depth/scenes: no depth there"


def test_backbones_of_several_sizes_are_ranked_among_their_own_too() -> None:
    """Of 9, 10 and 86 million parameters: a tiny, a small and a base one, the small one behind both."""
    sizes = {"mae": 9_000_000, "dino": 10_000_000, "clip": 86_000_000}
    values = {"mae": 0.75, "dino": 0.25, "clip": 0.5}
    scores = [row(name, "knn/scenes", value) | {"parameters": sizes[name]} for name, value in values.items()]
    lines = markdown(Ranking(scores), {}).splitlines()
    assert [line for line in lines if line.startswith("### ")] == ["### Tiny", "### Small", "### Base"]
    places = [line.split(" | ")[:3] for line in lines if line.startswith(("| mae | ", "| dino | ", "| clip | "))]
    assert places[:6] == [
        ["| mae", "1", "+1.22"],
        ["| clip", "2", "+0.00"],
        ["| dino", "3", "-1.22"],
        ["| mae", "1", "+1.22"],
        ["| dino", "1", "-1.22"],
        ["| clip", "1", "+0.00"],
    ]
    assert "### Tiny" not in markdown(Ranking(SCORES), {})


def test_a_page_without_a_number_says_why() -> None:
    page = markdown(Ranking([]), {"mae, knn/scenes": "no labels"})
    assert "Ranking" not in page
    assert page.endswith("## Not measured\n\n- mae, knn/scenes: no labels\n")


def test_the_terminal_s_table_has_the_ranking() -> None:
    shown = terminal(Ranking(SCORES))
    assert [column.header for column in shown.columns][:4] == ["", "rank", "mean z", "coverage"]
    assert list(shown.columns[0].cells) == ["dino", "mae"]


def test_the_dashboard_has_page_and_numbers_once(tmp_path: Path) -> None:
    for scores in (SCORES[:1], SCORES):
        dashboard(tmp_path, Ranking(scores), "# Gauntlet")
    assert len(list(tmp_path.iterdir())) == 1
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "mean_z/mae",
        "mean_z/dino",
        "knn/scenes/mae",
        "knn/scenes/dino",
        "depth/scenes/mae",
    }
    assert [each.value for each in events.Scalars("knn/scenes/dino")] == [0.75]
    assert events.Tags()["tensors"] == ["gauntlet/text_summary"]
