"""What one process sees of extraction, probe and health, and what each of two sees, must be the same."""

from __future__ import annotations

import multiprocessing
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import Precision

from src.callbacks.online_probe import OnlineProbe
from src.callbacks.representation_health import RepresentationHealth
from src.datamodules.scenes.source import ScenesSource
from src.evaluation.evaluation import run_evaluations
from src.evaluation.features import FeatureSet, FeatureSets, extract
from src.evaluation.knn import KNN
from src.evaluation.label_propagation import LabelPropagation
from src.evaluation.multilabel import MultiLabelProbe
from tests.evaluation.test_image_text import JudgedSource, Reader, everything
from tests.evaluation.test_image_text import data as image_text_data
from tests.evaluation.test_label_propagation import Patches, Walkers
from tests.evaluation.toy import PatchySquares, make_data, random_rows, squares, subject, tiny_encoder
from tests.evaluation.toy import features as read

CPU = torch.device("cpu")


def observe(rank: int, world_size: int) -> dict[str, object]:
    """Everything here must come out alike for every number of processes."""
    launch = SimpleNamespace(
        global_rank=rank, world_size=world_size, accumulate_grad_batches=1, precision_plugin=Precision()
    )
    data = squares(length=29)
    # every odd sample has no label, so that the second of two processes holds nothing
    sparse = make_data(partial(PatchySquares, length=7, unreadable=set(), unlabelled={1, 3, 5}))
    data.trainer = sparse.trainer = launch
    encoders = {"one": tiny_encoder(0), "two": tiny_encoder(1)}
    full = extract(encoders, data.val_dataloader(), data, CPU)["two"]
    half = extract(encoders, sparse.val_dataloader(), sparse, CPU)["one"]
    ties, predicted = tied_sets(rank, world_size), {}
    for k, chunk in ((7, 8), (40, 512), (500, 64)):
        predicted[f"{k}"] = KNN(k=k, temperature=0.5, bank_chunk=chunk).predict(ties, CPU)[k]
    pairs = image_text_data(Path("nowhere"), JudgedSource)
    pairs.trainer = launch
    shard = extract(encoders, data.val_dataloader(), data, CPU, shard=world_size == 2)["two"]
    scores = run_evaluations(subject(encoders, data), [KNN(k=3)])
    scenes = make_data(partial(ScenesSource, count=5, resolution=32), eval_batch_size=2)
    scenes.trainer = launch
    tagged = read({"": encoders["one"]}, scenes, [MultiLabelProbe()])[""].query
    return {
        "features": full.features,
        "labels": full.labels,
        "sparse features": half.features,
        "sparse labels": half.labels,
        "scores": scores,
        "nearest": predicted,
        "pairs": everything(Reader(pairs), pairs, single="{}"),
        "held": len(shard.features),
        "of the shards": shard.whole(CPU).features,
        "labels of the shards": shard.labels,
        "tags": tagged.tags,
        "followed": LabelPropagation(partial(Walkers, count=3), radius=30)(subject({"it": Patches()}, data)),
        **train(rank, world_size),
    }


def tied_sets(rank: int, world_size: int) -> FeatureSets:
    """Rows of +-1 of length 4, whose cosines are exact and tie all the time; the second process has the fewer rows."""
    bank, query = (random_rows(rows, 16, seed=rows).sign() for rows in (120, 50))
    labels = [torch.randint(4, (rows,), generator=torch.Generator().manual_seed(rows)) for rows in (120, 50)]
    second = torch.arange(120) % 5 == 3
    rows = (second if rank else ~second).nonzero().flatten() if world_size == 2 else None
    return FeatureSets(
        bank=FeatureSet(bank if rows is None else bank[rows], labels[0], rows),
        query=FeatureSet(query, labels[1]),
    )


def train(rank: int, world_size: int) -> dict[str, object]:
    probe, health = OnlineProbe(lr=0.01), RepresentationHealth(every_n_steps=2, window=24)
    trainer = SimpleNamespace(
        global_step=0,
        accumulate_grad_batches=1,
        datamodule=SimpleNamespace(classes=["a", "b", "c"]),
        loggers=[],
        callback_metrics={},
        logged_metrics={},
    )
    probe.on_train_start(trainer, None)
    for step in range(6):
        trainer.global_step += 1
        rows = random_rows(16, 5, seed=step)
        labels = torch.arange(16) % 4 - 1
        share = slice(rank * 16 // world_size, (rank + 1) * 16 // world_size)
        for callback in (probe, health):
            callback.on_train_batch_end(trainer, None, {"embedding": rows[share]}, {"label": labels[share]}, step)
    return {"probe": probe.state_dict(), "health": trainer.callback_metrics}


def take_part(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    torch.save(observe(rank, 2), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What one process sees, and what each of two sees."""
    folder = tmp_path_factory.mktemp("two")
    # forked, as loader processes are: importing everything twice more would take longer than all these tests
    fork = multiprocessing.get_context("fork")
    running = [fork.Process(target=take_part, args=(rank, folder), daemon=True) for rank in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join(timeout=60)
    assert [process.exitcode for process in running] == [0, 0]
    return observe(0, 1), [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_extraction_does_not_depend_on_the_number_of_processes(seen: Any) -> None:
    alone, pair = seen
    assert len(alone["labels"]) == 29
    for one in pair:
        for name in ("labels", "sparse labels"):
            assert torch.equal(one[name], alone[name])
        for name in ("features", "sparse features"):
            torch.testing.assert_close(one[name], alone[name], rtol=1e-5, atol=1e-5)
    assert torch.equal(pair[0]["features"], pair[1]["features"])


def test_tags_and_films_are_those_of_all_processes(seen: Any) -> None:
    alone, pair = seen
    assert alone["tags"].shape[0] == 5
    for one in pair:
        assert torch.equal(one["tags"], alone["tags"])
        assert one["followed"] == pytest.approx(alone["followed"])


def test_a_process_without_labelled_samples_takes_part(seen: Any) -> None:
    alone, pair = seen
    assert len(alone["sparse labels"]) == 4
    assert pair[1]["sparse features"].shape == (4, 32)


def test_a_bank_in_shards_gives_the_neighbors_of_the_whole_one(seen: Any) -> None:
    alone, pair = seen
    for one in pair:
        for k in ("7", "40", "500"):
            assert torch.equal(one["nearest"][k], alone["nearest"][k])
        assert torch.equal(one["of the shards"], one["features"])
        assert torch.equal(one["labels of the shards"], alone["labels"])
    assert alone["held"] == 29
    assert sorted(one["held"] for one in pair) == [14, 15]


def test_scores_agree(seen: Any) -> None:
    alone, pair = seen
    assert set(alone["scores"]) == {"knn_top1", "knn_top1_two"}
    assert pair[0]["scores"] == pair[1]["scores"] == alone["scores"]


def test_pairs_are_judged_alike(seen: Any) -> None:
    alone, pair = seen
    assert {"zeroshot_single_top1", "hardnegatives_number", "geometry_separability"} <= set(alone["pairs"])
    assert pair[0]["pairs"] == pair[1]["pairs"] == alone["pairs"]


def test_the_probe_learns_from_all_rows_and_stays_equal(seen: Any) -> None:
    alone, pair = seen
    for one in pair:
        torch.testing.assert_close(one["probe"], alone["probe"], rtol=1e-5, atol=1e-6)
    assert torch.equal(pair[0]["probe"]["linear"]["weight"], pair[1]["probe"]["linear"]["weight"])
    assert alone["probe"]["seen"] == 6 * 12  # a quarter of the 16 rows has no label


def test_health_is_measured_over_all_processes(seen: Any) -> None:
    alone, pair = seen
    assert set(alone["health"]) == {"health/feature_std", "health/effective_rank", "health/embedding_norm"}
    for one in pair:
        torch.testing.assert_close(one["health"], alone["health"], rtol=1e-5, atol=1e-6)
