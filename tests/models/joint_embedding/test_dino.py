"""DINO's step, its teacher and its center; what iBOT shares with it is tested here for both."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from src.callbacks.ema_teacher import EMATeacher
from src.callbacks.gradients import ClipEachParameter, FreezeAtFirst
from src.callbacks.step_seed import StepSeed
from src.checkpoint_io import AtomicCheckpointIO
from src.errors import SettingError
from src.models.backbones.positions import accept_any_image_size, dino_positions
from src.models.joint_embedding.dino import DINO, class_attention
from src.models.joint_embedding.ibot import iBOT
from tests.distributed import in_two_processes
from tests.models.joint_embedding import toy
from tests.toys import small_vit

SMALL = {"prototypes": 7, "hidden_dim": 10, "bottleneck_dim": 6}


class MaskedByIndex(iBOT):
    """Hides the patch that its images say, so that masks do not depend on how a batch is divided."""

    def draw_masks(self, images: Tensor) -> Tensor:
        brightest = images.mean(dim=1).unfold(1, 8, 8).unfold(2, 8, 8).mean(dim=(-2, -1)).flatten(1).argmax(dim=1)
        return torch.nn.functional.one_hot(brightest, 4).bool()


def build(kind: type[DINO] = DINO, **options: Any) -> DINO:
    torch.manual_seed(0)
    method = kind(toy.vit(**options.pop("vit", {})), toy.optimizer(), **SMALL, **options)
    method = method.double()
    for parameter in method.teacher.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))  # as after some steps
    for name, buffer in method.named_buffers():
        if name.endswith("center.value"):
            buffer.copy_(0.1 * torch.randn_like(buffer))
    return method


def distribution(scores: list[float], temperature: float) -> list[float]:
    exponents = [math.exp(score / temperature) for score in scores]
    return [each / sum(exponents) for each in exponents]


def test_a_step_is_the_paper_written_as_loops():
    method, batch = build(), toy.batch(3, local_views=2)
    reference = copy.deepcopy(method)
    output = method.training_step(batch, 0)
    total, terms = 0.0, 0
    for image in range(3):
        crops = [*batch["views"][image], *batch["local_views"][image]]
        student = [reference.student["head"](reference.student["encoder"](x[None]).embedding)[0] for x in crops]
        for q in range(2):
            slow = reference.teacher["head"](reference.teacher["encoder"](crops[q][None]).embedding)[0]
            target = distribution((slow - reference.center.value).tolist(), 0.04)
            for v in range(4):
                if v != q:
                    predicted = distribution(student[v].tolist(), 0.1)
                    total -= sum(p * math.log(s) for p, s in zip(target, predicted, strict=True))
                    terms += 1
    assert terms == 3 * 2 * 3
    assert output["loss"].item() == pytest.approx(total / terms, rel=1e-10)
    first = reference.student["encoder"](batch["views"][:, 0]).embedding
    assert torch.allclose(output["embedding"], first.float(), atol=1e-6)


def test_without_local_views_the_two_global_ones_predict_each_other():
    batch = toy.batch(3)
    loss = build().training_step(batch, 0)["loss"]
    swapped = build().training_step({**batch, "views": batch["views"].flip(1)}, 0)["loss"]
    assert torch.allclose(loss, swapped, rtol=1e-12)  # no view is the first


@pytest.mark.parametrize("kind", [DINO, iBOT])
def test_gradients_reach_the_student_and_never_teacher_or_center(kind):
    method = build(kind, **({"mask_probability": 1.0, "mask_share": (0.5, 0.5)} if kind is iBOT else {}))
    method.training_step(toy.batch(local_views=2), 0)["loss"].backward()
    learning = {name for name, p in method.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert not any(name.startswith(("teacher.", "center.", "patch_center.")) for name in learning)
    fixed = {"student.head.last_layer.gain"}  # lengths of the prototypes
    expected = {name for name, _ in method.named_parameters() if not name.startswith("teacher.")} - fixed
    # the last bias of an attention's keys moves no weight, but the parameter holds queries and values too
    assert expected <= learning
    moved = {name for group in method.configure_optimizers().param_groups for name in group["names"]}
    assert moved == expected


def test_the_student_alone_drops_paths():
    method = build(vit={"drop_path_rate": 0.9, "depth": 3})
    x = toy.batch()["views"][:, 0]
    student, teacher = ([each["encoder"](x).embedding for _ in range(2)] for each in (method.student, method.teacher))
    assert not torch.equal(*student)
    assert torch.equal(*teacher)


def test_a_local_view_gets_the_positions_in_between():
    vit = accept_any_image_size(toy.vit(img_size=32)).double()
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    same = small_vit(img_size=32, embed_dim=12, dynamic_img_size=True).double()
    same.load_state_dict(vit.state_dict())
    assert torch.equal(vit.forward_features(x), same.forward_features(x))
    resnet = toy.resnet()
    assert accept_any_image_size(resnet) is resnet


def test_the_class_token_starts_as_the_authors_do_unless_it_was_loaded():
    torch.manual_seed(0)
    method = DINO(toy.vit(embed_dim=768, num_heads=12), toy.optimizer(), **SMALL)
    token = method.student["encoder"].backbone.cls_token
    assert token.std().item() == pytest.approx(0.02, rel=0.08)  # 768 values, three standard errors; timm's is 1e-6
    assert torch.equal(method.teacher["encoder"].backbone.cls_token, token)
    loaded = toy.vit()
    loaded.cls_token.data.fill_(0.3)
    assert (DINO(loaded, toy.optimizer(), **SMALL).student["encoder"].backbone.cls_token == 0.3).all()
    DINO(toy.resnet(), toy.optimizer(), **SMALL)


def test_local_crops_and_evaluation_take_the_authors_positions():
    method = build(vit={"img_size": 32})
    backbone, x = method.teacher["encoder"].backbone, torch.randn(1, 3, 16, 16, dtype=torch.float64)
    at_its_size = small_vit(embed_dim=12).double()
    table = backbone.pos_embed
    resized = torch.cat([table[:, :1], dino_positions(table[:, 1:], (4, 4), (2, 2))], dim=1)
    at_its_size.load_state_dict({**backbone.state_dict(), "pos_embed": resized})
    expected = at_its_size.forward_features(x)
    for encoder in (method.encoders()["teacher"], copy.deepcopy(method.encoders()["teacher"]).eval()):
        torch.testing.assert_close(encoder(x).embedding, expected[:, 0], rtol=1e-10, atol=1e-10)


def test_class_attention_is_that_of_the_last_block():
    method, x = build(), toy.batch()["views"][:, 0]
    backbone = method.teacher["encoder"].backbone
    attn, weights = backbone.blocks[-1].attn, class_attention(backbone, x)
    assert weights.shape == (4, 2, 2, 2)
    tokens = backbone.blocks[-1].norm1(backbone._pos_embed(backbone.patch_embed(x)))
    qkv = attn.qkv(tokens).view(4, 5, 3, 2, 6)
    for image, head in ((0, 0), (3, 1)):
        scores = [float(qkv[image, 0, 0, head] @ qkv[image, n, 1, head]) / math.sqrt(6) for n in range(5)]
        assert weights[image, head].flatten().tolist() == pytest.approx(distribution(scores, 1.0)[1:], rel=1e-5)
    assert class_attention(toy.resnet(), x.float()) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_temperature": 0.0}, r"model\.teacher_temperature=0.0 must be above 0"),
        ({"center_momentum": 1.5}, r"center_momentum=1.5 must lie in \[0, 1\]"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(SettingError, match=message):
        build(**options)


@pytest.mark.parametrize("kind", [DINO, iBOT])
def test_refuses_a_single_view(kind):
    with pytest.raises(SettingError, match=r"data\.train_view: .* at least 2 in train_view\.views, .* has 1"):
        build(kind).training_step(toy.batch(views=1, local_views=2), 0)


class Batches(L.LightningDataModule):
    """Steps of 4 images, in micro-batches where the trainer accumulates."""

    batch_size = 4

    def __init__(self, micro_batches: int = 1) -> None:
        super().__init__()
        self.micro_batches = micro_batches

    def train_dataloader(self) -> Any:
        steps = [toy.batch(4, local_views=2, seed=step) for step in range(4)]
        parts = [toy.part_of(each, p, self.micro_batches) for each in steps for p in range(self.micro_batches)]
        return DataLoader(parts, batch_size=None)


def run(folder: Path, kind: type[DINO], micro_batches: int = 1, epochs: int = 1, resume: Path | None = None) -> DINO:
    torch.set_num_threads(1)
    method = build(kind)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        precision="64-true",
        logger=False,
        accumulate_grad_batches=micro_batches,
        callbacks=[StepSeed(5), ClipEachParameter(0.1), FreezeAtFirst(r"student\.head\.last_layer", 2), EMATeacher()],
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=folder,
    )
    trainer.fit(method, datamodule=Batches(micro_batches), ckpt_path=resume, weights_only=True)
    if resume is None:
        trainer.save_checkpoint(folder / f"{micro_batches}-{epochs}.ckpt")
    return method


@pytest.mark.parametrize("kind", [DINO, MaskedByIndex])
def test_four_micro_batches_are_one_batch(tmp_path, kind):
    whole, parts = run(tmp_path, kind), run(tmp_path, kind, micro_batches=4)
    begun = build(kind).state_dict()
    assert not torch.equal(whole.center.value, begun["center.value"])
    for (name, one), four in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.allclose(one, four, rtol=0, atol=1e-9), name


@pytest.mark.parametrize("kind", [DINO, iBOT])
def test_a_resumed_run_ends_in_the_same_bits(tmp_path, kind):
    straight = run(tmp_path, kind, epochs=2)
    run(tmp_path, kind, epochs=1)
    again = run(tmp_path, kind, epochs=2, resume=tmp_path / "1-1.ckpt")
    assert {n for n, _ in again.named_buffers()} >= {"center.value"}
    for (name, one), two in zip(straight.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


def on_each(process: int) -> dict[str, Tensor]:
    found = {}
    for kind in (DINO, MaskedByIndex):
        method = build(kind)
        method.training_step(toy.part_of(toy.batch(6, local_views=2), process), 0)["loss"].backward()
        method.on_before_optimizer_step(torch.optim.SGD(method.parameters()))
        found |= {f"{kind.__name__} {name}": value for name, value in toy.gradients(method).items()}
        found |= {f"{kind.__name__} buffer {name}": value for name, value in method.named_buffers()}
    return found


def test_two_processes_are_one():
    parts = in_two_processes(on_each)
    for kind in (DINO, MaskedByIndex):
        whole = build(kind)
        whole.training_step(toy.batch(6, local_views=2), 0)["loss"].backward()
        whole.on_before_optimizer_step(torch.optim.SGD(whole.parameters()))
        for name, gradient in toy.gradients(whole).items():
            key = f"{kind.__name__} {name}"
            assert torch.allclose((parts[0][key] + parts[1][key]) / 2, gradient, rtol=0, atol=1e-8), key
        centers = dict(whole.named_buffers())
        assert set(centers) == {"center.value"} | ({"patch_center.value"} if kind is MaskedByIndex else set())
        for name, value in centers.items():
            for part in parts:
                assert torch.allclose(part[f"{kind.__name__} buffer {name}"], value, rtol=0, atol=1e-10), name
