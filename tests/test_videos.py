"""A video method through the commands, in seconds."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoImageProcessor, VideoMAEModel

from src import evaluate, runs, train, trained
from src.errors import UserError
from src.evaluation.pixels import PixelEncoder
from src.export.__main__ import main as export

WORDS = [
    "experiment=videomae_v2_vitb",
    "scale=tiny",
    "frames=4",
    "data.source.count={train: 16, val: 8, test: 8}",
    "data.source.cache_dir=null",
    "data.train_samples=16",
    "data.batch_size=4",
    "data.num_workers=0",
    "backbone.embed_dim=32",
    "backbone.depth=1",
    "backbone.num_heads=2",
    "model.decoder_dim=16",
    "trainer.max_epochs=1",
    "trainer.log_every_n_steps=1",
    "callbacks.progress=null",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRETEXT_RUN_DIR", "")
        assert train.main([*WORDS, f"paths.runs={folder}", "run.name=films"]) == 0
    return runs.Run(folder / "videomae_v2_vitb" / "films")


def test_films_are_trained_on_and_judged(run: runs.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    logged = run.metrics()["train"]
    assert logged["step"] == 4
    assert 0 <= logged["eval/knn_top1"] <= 1
    monkeypatch.setenv("PRETEXT_RUN_DIR", "")
    assert evaluate.main([f"run={run.dir}", "eval=knn,linear,pixels,random"]) == 0
    scores = json.loads((run.dir / "evaluate" / "films.json").read_text())
    assert set(scores) == {"encoder", "pixels", "random"}
    # the same code on the same clips as at the end of training
    assert scores["encoder"]["knn_top1"] == pytest.approx(logged["eval/knn_top1"])
    assert all(0 <= each["linear_top1"] <= 1 for each in scores.values())


def test_films_are_judged_by_the_protocols_of_pictures(run: runs.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRETEXT_RUN_DIR", "")
    films = "evaluation.labelpropagation.films"
    words = [f"{films}.count=1", f"+{films}.duration=0.4"]
    assert evaluate.main([f"run={run.dir}", "eval=linear,lowshot,instances,labelpropagation", *words]) == 0
    found = json.loads((run.dir / "evaluate" / "films.json").read_text())["encoder"]
    for name in ("linear_top1", "lowshot10_top1", "instances_map", "labelpropagation_jf"):
        assert 0 <= found[name] <= 1
    with pytest.raises(UserError, match="all classes of an image are needed"):
        evaluate.main([f"run={run.dir}", "eval=multilabel"])
    with pytest.raises(UserError, match=r"masks are needed, which scenes have and FilmsSource"):
        evaluate.main([f"run={run.dir}", "eval=patchknn"])


def test_a_runs_encoder_is_fine_tuned_on_its_own_films(run: runs.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRETEXT_RUN_DIR", "")
    words = ["trainer.max_epochs=1", "trainer.check_val_every_n_epoch=1", "data.batch_size=4"]
    words = [f"finetune.{word}" for word in (*words, "callbacks.progress=null")]
    assert evaluate.main([f"run={run.dir}", "eval=finetune", *words]) == 0
    scores = json.loads((run.dir / "evaluate" / "films.json").read_text())
    sub = runs.Run(run.dir / "evaluate" / "finetune_films")
    assert scores["encoder"]["finetune_top1"] == sub.metrics()["train"]["eval/top1"]
    config = sub.config()
    assert (config.run.experiment, config.frames, config.data.eval_view.segments) == ("action_vitb", 4, 2)
    assert (config.backbone.embed_dim, config.backbone.fc_norm) == (32, True)
    # the fixed table of positions stays what it is
    ours, theirs = (torch.load(each.checkpoint(), weights_only=True)["state_dict"] for each in (sub, run))
    assert torch.equal(ours["backbone.pos_embed"], theirs["backbone.pos_embed"])
    assert not torch.equal(ours["backbone.blocks.0.mlp.fc1.weight"], theirs["backbone.blocks.0.mlp.fc1.weight"])


def test_what_videos_have_not_yet_is_said(run: runs.Run) -> None:
    with pytest.raises(UserError, match="has a video encoder, which timm does not have"):
        export([f"run={run.dir}"])


def test_an_encoder_of_clips_goes_to_transformers(run: runs.Run, tmp_path: Path) -> None:
    """Written by the command, which compares the features itself; here once more, on what the processor makes."""
    assert export([f"run={run.dir}", "format=hf", f"to={tmp_path / 'hf'}"]) == 0
    model = VideoMAEModel.from_pretrained(tmp_path / "hf").eval()
    encoder = trained.load(run.config(), run.checkpoint()).encoders()["encoder"]
    frames = list(np.random.default_rng(0).integers(0, 256, (4, 40, 60, 3), np.uint8))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "hf")
    video = processor(frames, return_tensors="pt")["pixel_values"]
    assert video.shape == (1, 4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(video).last_hidden_state, encoder(video).patches, rtol=1e-4, atol=1e-5)
    assert "4 frames of 32 x 32 pixels" in (tmp_path / "hf" / "README.md").read_text()


def test_the_method_is_seen_at_work_in_motion(run: runs.Run) -> None:
    events = EventAccumulator(str(run.dir), size_guidance={"images": 0})
    events.Reload()
    film = Image.open(io.BytesIO(events.Images("clips/reconstruction")[-1].encoded_image_string))
    assert film.n_frames == 4
    assert film.info["duration"] == 170  # every second frame of 12 a second, in hundredths
    assert film.size == (3 * 34 + 2, 8 * 34 + 2)
    assert "images/reconstruction" in events.Tags()["images"]


def test_pixels_of_a_video_are_those_of_its_frames() -> None:
    video = torch.randn(2, 3, 3, 8, 8)
    encoder = PixelEncoder(4)
    features = encoder(video)
    assert features.grid == (3, 4, 4)
    torch.testing.assert_close(features.embedding[1].view(3, -1)[2], encoder(video[1, 2:3]).embedding[0])
    torch.testing.assert_close(features.patches[1].view(3, 16, 3)[2], encoder(video[1, 2:3]).patches[0])
