"""Training that starts from weights (``checkpoint``): every experiment takes them or refuses them in one sentence."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from src import configuration
from src.configuration import instantiate
from src.errors import UserError
from src.models.image_text.base import ImageTextModule
from src.models.pretrain_module import PretrainModule
from src.panels import recipe_rows
from src.trained import started, without_source

EXPERIMENTS = configuration.names("experiment")


@cache
def composed(experiment: str) -> DictConfig:
    return configuration.compose("train", [f"experiment={experiment}", "scale=tiny", "run.dir=/none", "run.name=none"])


def configured(experiment: str, **values: object) -> DictConfig:
    config = composed(experiment).copy()
    config.update(values)
    return config


def backbone_with_other_weights(config: DictConfig) -> nn.Module:
    backbone: nn.Module = instantiate(config.backbone)
    for number, value in enumerate(backbone.state_dict().values()):
        value.fill_(number % 7 + 1) if value.is_floating_point() else value.fill_(3)
    return backbone


def fresh(config: DictConfig) -> PretrainModule:
    torch.manual_seed(0)
    return instantiate(without_source(config).model)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.state_dict())


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_starts_from_another_programs_weights(experiment: str, tmp_path: Path) -> None:
    config = configured(experiment, checkpoint=str(tmp_path / "w.pth"))
    source = weights_of(backbone_with_other_weights(config))
    torch.save(
        {"state_dict": {f"module.base_encoder.{name}": value for name, value in source.items()}}, tmp_path / "w.pth"
    )
    if experiment.startswith(("clip_refine", "xclip", "cua")):
        with pytest.raises(UserError, match="starts from both towers of a run, and this has no text tower"):
            started(config)
        return
    torch.manual_seed(0)
    module, line = started(config)
    assert line is not None
    assert f"tensors from {tmp_path / 'w.pth'}; under 'state_dict.module.base_encoder.'" in line
    taken = set()
    for encoder in module.encoders().values():
        # teachers too
        for name, value in weights_of(encoder.backbone).items():
            if name.startswith(tuple(module.new_parameters)):
                assert name in line
            else:
                assert torch.equal(value, source[name]), name
        taken |= {id(tensor) for tensor in encoder.backbone.state_dict(keep_vars=True).values()}
    for pair in module.teacher_pairs():
        student = weights_of(pair.student)
        assert all(torch.equal(value, student[name]) for name, value in weights_of(pair.teacher).items())
        taken |= {id(tensor) for tensor in pair.teacher.state_dict(keep_vars=True).values()}
    # heads, queues and centers begin anew, with the values that they have without a start
    before = weights_of(fresh(config))
    for name, value in module.state_dict(keep_vars=True).items():
        if id(value) not in taken:
            assert torch.equal(value, before[name]), name


def run_of(module: PretrainModule, folder: Path) -> Path:
    content = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(content)
    (folder / "checkpoints").mkdir()
    (folder / "config.yaml").write_text("run: {}")
    torch.save(content, folder / "checkpoints/last.ckpt")
    return folder


def test_a_runs_teacher_can_be_the_start_of_another_method(tmp_path: Path) -> None:
    dino = fresh(configured("dino_vits"))
    dino.teacher["encoder"].backbone.cls_token.data.fill_(5)  # type: ignore[union-attr,index,operator]
    run = str(run_of(dino, tmp_path))
    student, line = started(configured("mae_vitb", checkpoint=run, image_size=64))
    assert torch.equal(student.backbone.cls_token, dino.student["encoder"].backbone.cls_token)  # type: ignore
    assert "(encoder 'student')" in str(line)
    assert recipe_rows(configured("mae_vitb"), line)["starts from"] == line
    assert "starts from" not in recipe_rows(configured("mae_vitb"))
    teacher, _ = started(configured("moco_v3_vits", checkpoint=run, checkpoint_encoder="teacher"))
    for encoder in teacher.encoders().values():
        assert (encoder.backbone.cls_token == 5).all()  # type: ignore[union-attr]
    with pytest.raises(UserError, match="no encoder 'techer'; did you mean teacher"):
        started(configured("mae_vitb", checkpoint=run, checkpoint_encoder="techer"))
    with pytest.raises(UserError, match=r"^checkpoint: .* of the backbone's"):
        started(configured("simclr_r50", checkpoint=run))
    with pytest.raises(UserError, match="checkpoint_encoder=teacher: there is no checkpoint to start from"):
        started(configured("mae_vitb", checkpoint_encoder="teacher"))


def test_towers_start_from_both_towers_of_a_run_or_from_one_encoder(tmp_path: Path) -> None:
    clip = fresh(configured("clip_vitb32"))
    clip.logit_scale.data.fill_(2.5)  # type: ignore[union-attr,operator]
    run = str(run_of(clip, tmp_path))
    for experiment in ("clip_vitb32", "clip_refine_vitb32", "filip_vitb32", "xclip_vitb32"):
        module, line = started(configured(experiment, checkpoint=run))
        state = module.state_dict()
        for name, value in clip.state_dict().items():
            assert torch.equal(state[name], value) or name == "image_encoder.backbone.pos_embed", (experiment, name)
        assert "of the text tower and the projections" in str(line)
    one, _ = started(configured("clip_vitb32", checkpoint=run, checkpoint_encoder="encoder"))
    assert isinstance(one, ImageTextModule)
    assert torch.equal(one.image_encoder.backbone.cls_token, clip.image_encoder.backbone.cls_token)  # type: ignore
    assert not torch.equal(one.text_projection.weight, clip.text_projection.weight)  # type: ignore[union-attr,arg-type]
    with pytest.raises(UserError, match=r"towers'.*text_encoder\..*checkpoint_encoder=encoder the image tower"):
        started(configured("lit_vitb16", checkpoint=run))


def test_loaded_towers_bring_the_tokenizer_whose_ids_they_know(tmp_path: Path) -> None:
    run = str(run_of(fresh(configured("clip_vitb32")), tmp_path))
    config = configured("clip_vitb32", checkpoint=run)
    datamodule = instantiate(config.data)
    assert datamodule.tokenizer_settings.other_run is None
    started(config, datamodule)
    assert datamodule.tokenizer_settings.other_run == Path(run)
    # not where one is named, nor where the image tower alone is loaded
    for values in ({"tokenizer": "openai/clip-vit-base-patch32"}, {}):
        config = configured("clip_vitb32", checkpoint=run, checkpoint_encoder=None if values else "encoder")
        config.data.update(values)
        datamodule = instantiate(config.data)
        started(config, datamodule)
        assert datamodule.tokenizer_settings.other_run is None


def test_timms_weights_survive_a_method_that_initializes_its_backbone_anew(tmp_path: Path) -> None:
    config = configured("mae_vitb")
    source = backbone_with_other_weights(config)
    torch.save(source.state_dict(), tmp_path / "timm.pth")
    overlay = {"file": str(tmp_path / "timm.pth"), "num_classes": 0, "hf_hub_id": None, "input_size": [3, 64, 64]}
    config.backbone = {**config.backbone, "pretrained": True, "pretrained_cfg_overlay": overlay}
    module, line = started(config)
    for name, value in source.state_dict().items():
        assert torch.equal(module.backbone.state_dict()[name], value), name  # type: ignore[union-attr,operator]
    assert "tensors from timm's vit_tiny_patch16_224" in str(line)
    config.checkpoint = str(tmp_path / "timm.pth")
    with pytest.raises(
        UserError, match=r"checkpoint=.* and backbone.pretrained=true: training starts from one of them"
    ):
        started(config)
