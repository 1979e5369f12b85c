"""X-CLIP through the commands, in seconds: from a CLIP of still scenes, with actions that training never sees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from src import configuration, evaluate, runs, train, trained
from src.datamodules.datamodule import DataModule
from src.datamodules.scenes.motion import ACTIONS
from src.errors import UserError
from src.evaluation_config import evaluation_config
from src.export.__main__ import main as export
from src.finetuning import FineTuning

SMALL = [
    "scale=tiny",
    "data.source.count={train: 16, val: 12, test: 8}",
    "data.source.cache_dir=null",
    "data.train_samples=16",
    "data.batch_size=4",
    "data.num_workers=0",
    "image_size=32",
    "backbone.embed_dim=32",
    "backbone.depth=1",
    "backbone.num_heads=2",
    "model.text={width: 16, depth: 1, heads: 2}",
    "model.embed_dim=16",
    "trainer.max_epochs=1",
    "trainer.log_every_n_steps=1",
    "callbacks.progress=null",
]
UNSEEN = ["nods", "weaves", "slides", "climbs", "rests"]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    folder = tmp_path_factory.mktemp("runs")
    words = [
        *SMALL,
        "callbacks.image_text=null",
        "callbacks.image_text_visualizations=null",
        "callbacks.evaluation=null",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRETEXT_RUN_DIR", "")
        assert train.main(["experiment=clip_vitb32", *words, f"paths.runs={folder}", "run.name=stills"]) == 0
    return runs.Run(folder / "clip_vitb32" / "stills")


@pytest.fixture(scope="module")
def run(start: runs.Run, tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    folder = tmp_path_factory.mktemp("runs")
    words = ["frames=3", "model.mixup=0.8", f"data.source.held_out=[{','.join(UNSEEN)}]", f"checkpoint={start.last}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRETEXT_RUN_DIR", "")
        assert train.main(["experiment=xclip_vitb32", *SMALL, *words, f"paths.runs={folder}", "run.name=films"]) == 0
    return runs.Run(folder / "xclip_vitb32" / "films")


def test_names_are_judged_online_as_afterwards(run: runs.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    logged = run.metrics()["train"]
    assert logged["step"] == 4
    names = ("zeroshot_top1", "zeroshot_seen_top1", "zeroshot_unseen_top1")
    assert all(0 <= logged[f"eval/{name}"] <= 1 for name in (*names, "knn_top1", "probe_top1"))
    monkeypatch.setenv("PRETEXT_RUN_DIR", "")
    assert evaluate.main([f"run={run.dir}", "eval=zeroshot", "checkpoint=last"]) == 0
    scores = json.loads((run.dir / "evaluate" / "films.json").read_text())["pairs"]
    for name in names:
        assert scores[name] == pytest.approx(logged[f"eval/{name}"]), name
    assert not any(name.startswith(("retrieval", "gap", "geometry")) for name in scores)  # films have no texts


def test_it_goes_on_from_the_start_and_knows_its_words(start: runs.Run, run: runs.Run) -> None:
    assert (run.dir / "tokenizer.json").read_text() == (start.dir / "tokenizer.json").read_text()
    before, after = (torch.load(each.last, weights_only=True)["state_dict"] for each in (start, run))
    for name in ("text_encoder.transformer.final_layer_norm.weight", "text_projection.weight", "logit_scale"):
        assert torch.equal(before[name], after[name]), name  # frozen
    moved = "image_encoder.backbone.blocks.0.attn.qkv.weight"
    assert not torch.equal(before[moved], after[moved])
    torch.testing.assert_close(before[moved], after[moved], rtol=0, atol=0.02)


@torch.no_grad()
def test_of_several_clips_a_videos_scores_are_averaged(run: runs.Run) -> None:
    config = evaluation_config(run, None, ["data.eval_view.segments=2"], as_online=True)
    module, data = trained.load(config, run.last), configuration.instantiate(config.data)
    names = module.encode_text(*data.tokenizer(data.class_texts()))
    right = 0
    for loaded in data.val_dataloader():
        batch = data.on_after_batch_transfer(loaded, 0)
        each = module.similarity(module.encode_image(batch["video"]), names).unflatten(0, (-1, 2)).mean(dim=1)
        right += int((each.argmax(dim=1) == batch["label"][::2]).sum())
    scores = evaluate.evaluate(trained.RunSubject.configured(config, run.last), ["zeroshot"])["pairs"]
    assert scores["zeroshot_top1"] == pytest.approx(right / 12)


def test_fine_tuning_takes_the_videos_and_leaves_the_words(run: runs.Run) -> None:
    recipe = FineTuning().recipe(evaluation_config(run, None, []), run.last)
    data = configuration.instantiate(recipe.data)
    assert type(data) is DataModule
    assert tuple(data.train_source.held_out) == tuple(sorted(list(ACTIONS).index(name) for name in UNSEEN))
    assert (recipe.frames, recipe.checkpoint) == (3, str(run.last))


def test_cross_frame_attention_is_not_exported(run: runs.Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cross-frame attention, which neither timm nor transformers has"):
        export([f"run={run.dir}", f"to={tmp_path / 'out'}"])
