"""The page is a function of the stored numbers, says what is missing, and hides no threshold that is not met."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as bench
from benchmarks import precision, startup
from benchmarks.render import PARTS, render
from src.configuration import PROJECT
from src.errors import UserError
from src.measure import machine
from src.measure.report import Check, Section

ABOUT = {
    "date": "2030-01-01 12:00",
    "commit": "abc1234",
    "cpu": "Some CPU",
    "cores": 2,
    "gpu": None,
    "torch": "2.9",
    "threads": 2,
    "others": 0.05,
}
RATIO = {"median": 0.981, "low": 0.975, "high": 0.99, "of_sums": 0.98, "pairs": 10}


def entry(result: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"about": ABOUT, "quick": False, "result": result, **more}


def loop_arm(median: float) -> dict[str, Any]:
    return {
        "images_per_second": 812.3,
        "bare_images_per_second": 828.0,
        "ratio": RATIO | {"median": median},
        "batch_size": 128,
        "precision": "32-true",
        "steps": 50,
        "checkpoint_seconds": 6.0,
    }


def precision_result(ratio: float, chosen: str, **more: Any) -> dict[str, Any]:
    return {
        "seconds": {"bf16-mixed": 2.0 * ratio, "32-true": 2.0},
        "ratio": RATIO | {"median": ratio},
        "device": "cpu",
        "amx": False,
        "avx512_bf16": True,
        "chosen": chosen,
        "batch_size": 8,
        **more,
    }


RESULTS = {
    "loop": entry({"mae_tiny": loop_arm(0.981), "mae_vitb": loop_arm(0.955)}),
    "precision": entry(precision_result(1.31, "32-true")),
    "input": entry(
        {
            "sizes": {
                "500x375": {"ours": 240.0, "torchvision": 200.0, "ratio": 1.2, "bits_per_pixel": 2.8},
                "2000x1500": {"ours": 30.0, "torchvision": 16.0, "ratio": 1.88, "bits_per_pixel": 2.7},
            },
            "difference": {"mean": 2.41, "largest": 16.0},
        }
    ),
    "video": entry(
        {
            "clips_per_second": 9.0,
            "plain_clips_per_second": 10.0,
            "ratio": RATIO | {"median": 0.9},
            "clips": 2000,
            "growth_mb": 3.2,
        }
    ),
    "startup": entry(
        {
            "mae_vitb": {
                "seconds": [9.0, 11.0, 10.0],
                "median": 10.0,
                "imports": 6.5,
                "heaviest": {"torch": 3.0, "transformers": 1.5},
            }
        },
        quick=True,
    ),
    "evaluation": entry(
        {
            "train_images_per_second": 10.0,
            "feature_images_per_second": 25.0,
            "evaluator_seconds": 6.0,
            "bank_samples": 25000,
            "query_samples": 10000,
            "every_n_epochs": 5,
            "precision": "32-true",
            "device": "cpu",
            "share": 0.0022,
        }
    ),
    "joint_embedding": entry(
        {
            "loops": {"DINO": loop_arm(0.93) | {"memory": 1.25, "bare_memory": 1.1}},
            "contrastive": {
                "512": {"one": 12.0, "of_eight": 6.0, "matrix": 4.2},
                "1024": {"one": 16.0, "of_eight": 9.0, "matrix": 16.8},
            },
        }
    ),
}


def test_the_stored_page_is_rendered_from_the_stored_results() -> None:
    results = json.loads((PROJECT / "docs/benchmarks.json").read_text())
    assert (PROJECT / "docs/benchmarks.md").read_text() == render(results)


def test_every_threshold_is_answered() -> None:
    page = render(RESULTS)
    assert "| whole loop over a bare loop, mae_tiny | ≥ 0.97 | 0.981 | yes |" in page
    assert "| whole loop over a bare loop, mae_vitb | ≥ 0.97 | 0.955 | **no** |" in page
    assert "| JPEG folder over torchvision's, 500x375 | ≥ 1.0 | 1.20 | yes |" in page
    assert "| JPEG folder over torchvision's, 2000x1500 | ≥ 2.0 | 1.88 | **no** |" in page
    assert "| online evaluation, share of an epoch of MAE ViT-B on ImageNet | ≤ 3 % | 0.22 % | yes |" in page
    assert "| clips of a folder of videos over a plain PyAV loop | ≥ 1.0 | 0.90 | **no** |" in page
    assert "| growth over 2,000 clips, MB | ≤ 32 | 3 | yes |" in page
    assert "6.00 s (1.00 %)" in page  # a checkpoint every 600 s
    assert "differ by 2.4 of 255 levels on average, by 16 at most" in page
    assert "| mae_vitb | 10.0 | 9.0 to 11.0 | 6.5 | torch 3.0, transformers 1.5 |" in page
    assert "If it ran every epoch, it would be 1.10 %" in page
    assert "| DINO | 128 | 158 ms | 155 ms | 0.930 (0.975 to 0.990) | 1.25 GB | 1.10 GB |" in page
    assert (
        "| memory of a contrastive loss, 1024 images | < 17 MB, the matrix of all similarities | 16 MB | yes |" in page
    )


def test_what_is_missing_and_what_was_only_a_look_is_said() -> None:
    page = render(RESULTS)
    missing = "image_text,backbones,learning,methods,gauntlet"
    assert f"Not measured yet: {missing.replace(',', ', ')} (`make bench ARGS=only={missing}`)." in page
    assert page.count("A short trial") == 1
    assert "2030-01-01 12:00, commit abc1234, Some CPU (2 cores), torch 2.9, 2 threads." in page
    assert "Other processes kept" not in page
    empty = render({})
    assert f"Not measured yet: {', '.join(PARTS)}" in empty
    assert "required" not in empty


def test_the_page_depends_on_the_stored_numbers_alone() -> None:
    stored = json.loads(json.dumps(RESULTS))
    assert render(stored) == render(RESULTS)
    assert stored == RESULTS


@pytest.mark.parametrize(
    ("result", "measured", "met"),
    [
        (precision_result(0.6, "bf16-mixed", amx=True), "0.60", True),
        (precision_result(0.7, "bf16-mixed", amx=True), "0.70", False),
        (precision_result(1.31, "32-true"), "1.00 (float32 is chosen; bfloat16 would be 1.31)", False),
        (precision_result(2.5, "32-true", avx512_bf16=False), "1.00 (float32 is chosen; bfloat16 would be 2.50)", None),
    ],
)
def test_precision_is_held_to_its_threshold_where_the_hardware_has_bfloat16(
    result: dict[str, Any], measured: str, met: bool | None
) -> None:
    check = precision.check(result)
    assert (check.measured, check.met) == (measured, met)


def test_a_choice_that_slows_training_down_is_called_wrong() -> None:
    assert precision.verdict(precision_result(1.3, "32-true")).endswith("right here.")
    assert precision.verdict(precision_result(0.6, "bf16-mixed")).endswith("right here.")
    assert "**wrong**" in precision.verdict(precision_result(1.3, "bf16-mixed"))
    assert "**wrong**" in precision.verdict(precision_result(0.9, "32-true"))


def test_imports_are_summed_by_package() -> None:
    """Each module's own time: what it imports in turn has lines of its own."""
    errors = (
        "import time: self [us] | cumulative | imported package\n"
        "import time:       200 |        200 |   torch._C\n"
        "import time:    300000 |     300200 | torch\n"
        "a warning\n"
        "import time:      1500 |       1500 |       numpy.core\n"
    )
    found = startup.import_seconds(errors)
    assert found == {"torch": pytest.approx(0.3002), "numpy": pytest.approx(0.0015)}


class TestCommand:
    @pytest.fixture
    def parts(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Instead of the real parts two that count: what `make bench` does with them is what is tested."""
        called: list[str] = []

        class Counting:
            def __init__(self, name: str) -> None:
                self.name = name

            def measure(self, quick: bool = False) -> dict[str, Any]:
                called.append(self.name)
                return {"times": called.count(self.name), "quick": quick}

            def report(self, result: dict[str, Any]) -> Section:
                times = result["times"]
                return Section(f"Part {self.name}", [Check(self.name, "≤ 1", str(times), times <= 1)], "body")

        for name in list(PARTS):
            monkeypatch.delitem(PARTS, name)
        for name in ("first", "second"):
            monkeypatch.setitem(PARTS, name, Counting(name))
        monkeypatch.setattr(machine, "about", lambda: ABOUT)
        return called

    def test_parts_are_merged_into_what_is_there(self, parts: list[str], tmp_path: Path) -> None:
        assert bench.main(["only=second", f"out={tmp_path}"]) == 0
        assert "Not measured yet: first" in (tmp_path / "benchmarks.md").read_text()
        assert bench.main([f"out={tmp_path}"]) == 0
        assert parts == ["second", "first", "second"]
        stored = json.loads((tmp_path / "benchmarks.json").read_text())
        assert stored["first"] == {"about": ABOUT, "quick": False, "result": {"times": 1, "quick": False}}
        assert stored["second"]["result"]["times"] == 2
        page = (tmp_path / "benchmarks.md").read_text()
        assert page == render(stored)
        assert "| second | ≤ 1 | 2 | **no** |" in page

    @pytest.mark.parametrize(
        ("word", "message"),
        [
            ("only=frist", "there is no benchmark 'frist'; did you mean first"),
            ("quik=true", "no option 'quik=true'; did you mean quick"),
            ("quick=perhaps", "quick must be true or false, not 'perhaps'"),
        ],
    )
    def test_a_typo_is_answered(self, parts: list[str], tmp_path: Path, word: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            bench.main([word, f"out={tmp_path}"])
        assert parts == []
