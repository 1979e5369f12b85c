"""MoCo v2, MoCo v3 and MoCHi."""

import copy
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from src.callbacks.ema_teacher import EMATeacher
from src.callbacks.schedules import Schedules
from src.models.backbones.image_encoder import cls_token
from src.models.backbones.positions import sincos_2d
from src.models.joint_embedding import mochi as mochi_file
from src.models.joint_embedding.mochi import MoCHi
from src.models.joint_embedding.moco_v2 import MoCoV2
from src.models.joint_embedding.moco_v3 import MoCoV3
from src.models.pretrain_module import PretrainModule
from src.schedules import Cosine, Switch
from src.sync_batchnorm import SyncBatchNormPlugin
from tests.distributed import in_two_processes
from tests.models.joint_embedding import toy
from tests.models.joint_embedding.runs import ViewData, train

T = 0.3
MIXED = {"hardest": 5, "pairs": 3, "with_query": 2}


def as_after_some_steps(method: PretrainModule) -> Any:
    for parameter in method.teacher.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return method


def moco_v2(backbone: nn.Module | None = None, **options: Any) -> MoCoV2:
    torch.manual_seed(0)
    options = {"queue_size": 24, "temperature": T, "projection_dim": 5, **options}
    return as_after_some_steps(MoCoV2(backbone or toy.vit(), toy.optimizer(), **options).double())


def mochi(**options: Any) -> MoCHi:
    """With a full queue of images 0 to 23 and two classes."""
    torch.manual_seed(0)
    options = {"queue_size": 24, "temperature": T, "projection_dim": 5, **MIXED, **options}
    method = as_after_some_steps(MoCHi(toy.vit(), toy.optimizer(), **options).double())
    method.queue.filled.fill_(24)
    method.queue.column("index").copy_(torch.arange(24))
    method.queue.column("label").copy_(torch.arange(24) % 2)
    return method


def moco_v3(backbone: nn.Module | None = None, **options: Any) -> MoCoV3:
    torch.manual_seed(0)
    options = {"temperature": T, "hidden_dim": 16, "projection_dim": 5, "pool": cls_token, **options}
    return as_after_some_steps(MoCoV3(backbone or toy.vit(), toy.optimizer(), **options).double())


def l2_normalize(row: list[float]) -> list[float]:
    return [value / math.hypot(*row) for value in row]


def dot(x: list[float], y: list[float]) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True))


def encoded(network: nn.ModuleDict, image: Tensor, *further: nn.Module) -> list[list[float]]:
    z = network["projector"](network["encoder"](image).embedding)
    for module in further:
        z = module(z)
    return [l2_normalize(row) for row in z.tolist()]


def cross_entropy(query: list[float], key: list[float], negatives: list[list[float]]) -> float:
    positive = dot(query, key) / T
    return -positive + math.log(math.exp(positive) + sum(math.exp(dot(query, each) / T) for each in negatives))


def test_a_step_of_moco_v2_is_the_paper_written_as_loops():
    method, batch = moco_v2(), toy.batch()
    queries = encoded(method.student, batch["views"][:, 0])
    keys = encoded(method.teacher, batch["views"][:, 1])
    queue = method.queue.features.tolist()
    output = method.training_step(batch, 0)
    expected = sum(cross_entropy(q, k, queue) for q, k in zip(queries, keys, strict=True)) / 4
    assert output["loss"].item() == pytest.approx(expected, rel=1e-10)
    first = [dot(q, k) > max(dot(q, n) for n in queue) for q, k in zip(queries, keys, strict=True)]
    assert output["logs"]["proxy_accuracy"].item() == pytest.approx(sum(first) / 4)
    # the keys join the queue after the step and not before
    assert method.queue.features.tolist() == queue
    method.on_before_optimizer_step(None)
    assert torch.allclose(method.queue.features[:4], torch.tensor(keys, dtype=torch.float64), atol=1e-12)
    assert method.queue.features[4:].tolist() == queue[4:]
    assert method.queue.column("index")[:5].tolist() == [0, 1, 2, 3, -1]


@pytest.mark.parametrize("exclude_own", [False, True])
def test_a_step_of_mochi_is_the_paper_written_as_loops(exclude_own):
    method, batch = mochi(exclude_own=exclude_own), toy.batch()
    queries = encoded(method.student, batch["views"][:, 0])
    keys = encoded(method.teacher, batch["views"][:, 1])
    queue = method.queue.features.tolist()
    torch.manual_seed(3)
    uniform = torch.rand(4, 3 * 3 + 2 * 2).tolist()
    torch.manual_seed(3)
    output = method.training_step(batch, 0)
    loss, first, first_of_all, same_class = 0.0, 0, 0, 0
    for b, (q, k) in enumerate(zip(queries, keys, strict=True)):
        real = [place for place in range(24) if not (exclude_own and place == b)]  # the toy's image b is entry b
        nearest = sorted(real, key=lambda place: -dot(q, queue[place]))[:5]
        same_class += sum(place % 2 == 0 for place in nearest)  # all of the toy's labels are 0
        draw = uniform[b]
        synthetic = []
        for s in range(3):
            one, two = (queue[nearest[int(5 * draw[3 * side + s])]] for side in (0, 1))
            a = draw[6 + s]
            synthetic.append(l2_normalize([a * x + (1 - a) * y for x, y in zip(one, two, strict=True)]))
        for s in range(2):
            one, share = queue[nearest[int(5 * draw[9 + s])]], draw[11 + s] / 2
            synthetic.append(l2_normalize([share * x + (1 - share) * y for x, y in zip(q, one, strict=True)]))
        negatives = [queue[place] for place in real]
        loss += cross_entropy(q, k, negatives + synthetic) / 4
        first += dot(q, k) > max(dot(q, n) for n in negatives)
        first_of_all += dot(q, k) > max(dot(q, n) for n in negatives + synthetic)
    assert output["loss"].item() == pytest.approx(loss, rel=1e-8)
    assert output["logs"]["proxy_accuracy"].item() == pytest.approx(first / 4)
    assert output["logs"]["proxy_accuracy_mixed"].item() == pytest.approx(first_of_all / 4)
    assert output["logs"]["false_negatives"].item() == pytest.approx(same_class / 20)
    # real keys alone join the queue
    method.on_before_optimizer_step(None)
    assert torch.allclose(method.queue.features[:4], torch.tensor(keys, dtype=torch.float64), atol=1e-12)
    assert method.queue.features[4:].tolist() == queue[4:]


def test_before_it_mixes_mochi_is_moco_v2():
    batch = toy.batch()
    for options in ({"mixing": 0.0}, {}):
        method = mochi(**options)
        if not options:
            method.queue.filled.fill_(23)  # one entry is still random
        plain = moco_v2()
        plain.load_state_dict(method.state_dict())
        loss = method.training_step(batch, 0)["loss"]
        assert torch.equal(loss, plain.training_step(batch, 0)["loss"])
    assert mochi().training_step(batch, 0)["loss"] > loss  # more negatives


def test_without_labels_no_false_negatives_are_logged():
    batch = toy.batch() | {"label": torch.tensor([0, 1, 0, -1])}
    assert "false_negatives" not in mochi().training_step(batch, 0)["logs"]


def test_the_loss_reads_no_label():
    losses = []
    for label in (torch.tensor([0, 1, 2, 3]), torch.full((4,), -1)):
        method = mochi()
        torch.manual_seed(3)
        losses.append(method.training_step(toy.batch() | {"label": label}, 0)["loss"])
    assert torch.equal(*losses)


@pytest.mark.parametrize(("layers", "predictor_norm"), [(3, True), (2, False)])
def test_a_step_of_moco_v3_is_the_paper_written_as_loops(layers, predictor_norm):
    method, batch = moco_v3(projector_layers=layers, predictor_norm=predictor_norm), toy.batch()
    assert sum(isinstance(each, nn.Linear) for each in method.student["projector"].layers) == layers
    assert sum(isinstance(each, nn.BatchNorm1d) for each in method.predictor.layers) == 1 + predictor_norm
    views = batch["views"].unbind(1)  # each view is a batch of its own for the batch norms
    queries = [encoded(method.student, view, method.predictor) for view in views]
    keys = [encoded(method.teacher, view) for view in views]
    expected = 0.0
    for q, k in ((queries[0], keys[1]), (queries[1], keys[0])):
        for b in range(4):
            others = [k[j] for j in range(4) if j != b]
            expected += 2 * T * cross_entropy(q[b], k[b], others) / 4
    assert method.training_step(batch, 0)["loss"].item() == pytest.approx(expected, rel=1e-9)


def test_gradients_reach_the_student_and_neither_teacher_queue_nor_synthetic_negatives():
    for method in (moco_v2(), mochi(), moco_v3()):
        drawn = []
        if isinstance(method, MoCHi):
            mix = method.mix
            method.mix = lambda *given, mix=mix, drawn=drawn: drawn.append(mix(*given)) or drawn[-1]
        method.training_step(toy.batch(), 0)["loss"].backward()
        assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
        learning = {n: p for n, p in method.named_parameters() if p.requires_grad}
        assert {n for n, p in learning.items() if p.grad is None} == set()
        assert not any(each.requires_grad for each in (*drawn, *method.buffers()))
        assert bool(drawn) == isinstance(method, MoCHi)
        moved = {n for group in method.configure_optimizers().param_groups for n in group["names"]}
        assert moved == set(learning)
        assert not any(name.startswith("teacher.") for name in moved)


def test_a_vit_of_moco_v3_has_fixed_positions_and_a_random_projection_that_stays():
    method = moco_v3().float()
    vit = method.student["encoder"].backbone
    assert torch.equal(vit.pos_embed[0], sincos_2d(12, (2, 2), prefix_tokens=1, rows_first=True))
    fixed = {n for n, p in vit.named_parameters() if not p.requires_grad}
    assert fixed == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    # uniform up to sqrt(6 / (inputs + outputs)), query, key and value each for itself
    for weight, bound in (
        (vit.patch_embed.proj.weight, math.sqrt(6 / (3 * 8 * 8 + 12))),
        (vit.blocks[0].attn.qkv.weight, math.sqrt(6 / (12 + 12))),
    ):
        assert 0.9 * bound < weight.abs().max().item() <= bound + 1e-6
    trained = moco_v3(frozen_patches=False).student["encoder"].backbone
    assert {n for n, p in trained.named_parameters() if not p.requires_grad} == {"pos_embed"}


class Watch(L.Callback):
    """What the teacher weighs when a batch's forward pass begins and the student when the step before ended."""

    def __init__(self) -> None:
        self.student: list[Tensor] = []
        self.teacher: list[Tensor] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        for kept, network in ((self.student, pl_module.student), (self.teacher, pl_module.teacher)):
            kept.append(network["projector"].layers[-1].weight.detach().clone())


def test_the_teacher_of_moco_v2_moves_before_it_encodes_the_keys(tmp_path):
    watch, method = Watch(), moco_v2(teacher_momentum=0.6)
    begin = method.teacher["projector"].layers[-1].weight.detach().clone()
    train(tmp_path, method, EMATeacher(when="before"), watch)
    for student, teacher in zip(watch.student, watch.teacher, strict=True):
        begin = 0.6 * begin + 0.4 * student
        assert torch.allclose(teacher, begin, rtol=0, atol=1e-14)
    assert not torch.equal(watch.student[0], watch.student[2])


def test_four_micro_batches_are_one_batch(tmp_path):
    one, four = (
        train(tmp_path, moco_v2(), EMATeacher(when="before"), accumulate_grad_batches=parts).state_dict()
        for parts in (1, 4)
    )
    for name, value in one.items():
        assert torch.allclose(value.double(), four[name].double(), rtol=0, atol=1e-13), name
    assert sorted(one["queue.column_index"].tolist()) == list(range(24))  # an epoch of 24 images, each once


class SaveAt(L.Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_a_run_of_mochi_taken_up_again_has_the_bits_of_one_that_never_stopped(tmp_path):
    def run(*further: L.Callback, resume: Path | None = None) -> dict[str, Tensor]:
        method = mochi(mixing=0.0)
        schedules = Schedules({"teacher_momentum": Cosine(start=0.7, end=1.0), "mixing": Switch(at=2)})
        callbacks = [schedules, EMATeacher(when="before"), *further]
        return train(tmp_path, method, *callbacks, max_steps=-1, max_epochs=2, resume=resume).state_dict()

    middle = tmp_path / "middle.ckpt"
    whole = run(SaveAt(4, middle))
    resumed = run(resume=middle)
    saved = torch.load(middle, weights_only=True)["state_dict"]
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    for name in ("queue.features", "queue.pointer", "teacher.projector.layers.2.weight"):
        assert not torch.equal(whole[name], saved[name]), name


def methods() -> dict[str, Any]:
    torch.manual_seed(0)
    return {"moco_v2": moco_v2(toy.resnet()), "mochi": mochi(exclude_own=True), "moco_v3": moco_v3()}


def step(method: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    method.training_step(batch, 0)["loss"].backward()
    if isinstance(method, MoCoV2):
        method.on_before_optimizer_step(None)
    return toy.gradients(method) | {f"buffer {n}": v for n, v in method.named_buffers() if "tracked" not in n}


def on_each(process: int) -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(7)
    rows = torch.rand(6, 3 * 3 + 2 * 2)[3 * process : 3 * process + 3]  # this process's part of what one would draw
    made = methods()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mochi_file.torch, "rand", lambda *shape, **_: rows)
        return {
            name: step(SyncBatchNormPlugin().apply(method), toy.part_of(toy.batch(6), process))
            for name, method in made.items()
        }


def test_two_processes_are_one():
    """Gradients, running statistics, and the queue in the order of the batch."""
    parts = in_two_processes(on_each)
    for name, method in methods().items():
        torch.manual_seed(7)
        whole = step(method, toy.batch(6))
        assert len(whole) > 15
        for key, value in whole.items():
            one, two = (part[name][key] for part in parts)
            if key.startswith("buffer"):
                assert torch.equal(one, two), (name, key)
                assert torch.allclose(one, value, rtol=0, atol=1e-9), (name, key)
            else:
                assert torch.allclose((one + two) / 2, value, rtol=0, atol=1e-8), (name, key)
        if name != "moco_v3":
            assert whole["buffer queue.column_index"][:6].tolist() == list(range(6))


@pytest.mark.parametrize("make", [moco_v2, mochi, moco_v3])
def test_one_image_is_refused_by_its_key(make):
    with pytest.raises(ValueError, match=r"data\.batch_size: .* at least 2 images"):
        make().training_step(toy.batch(count=1), 0)
    with pytest.raises(ValueError, match=r"model\.temperature=0 must be above 0"):
        make(temperature=0)


def test_a_queue_that_does_not_suit_the_batch_is_refused_at_start_by_its_key(tmp_path):
    method = moco_v2(queue_size=20)
    begin = copy.deepcopy(method.state_dict())
    with pytest.raises(ValueError, match=r"model\.queue_size=20 must be a multiple of the 8 images"):
        train(tmp_path, method, EMATeacher(when="before"))
    assert torch.equal(begin["queue.features"], method.queue.features)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hardest": 25}, r"model\.hardest=25 must lie between 1 and model\.queue_size=24"),
        ({"hardest": 0}, r"model\.hardest=0"),
        ({"pairs": -1}, r"model\.pairs=-1 and model\.with_query=2"),
        ({"pairs": 0, "with_query": 0}, r"model\.pairs=0 and model\.with_query=0"),
    ],
)
def test_numbers_of_negatives_that_cannot_be_are_refused_by_their_keys(options, message):
    with pytest.raises(ValueError, match=message):
        mochi(**options)


def test_a_queue_that_own_keys_could_use_up_is_refused_at_start(tmp_path):
    with pytest.raises(ValueError, match=r"model\.hardest=21 .* model\.queue_size=24 minus the up to 4 keys"):
        train(tmp_path, mochi(hardest=21, exclude_own=True), EMATeacher(when="before"), data=ViewData(length=8))
