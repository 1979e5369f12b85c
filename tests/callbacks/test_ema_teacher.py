from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from src.callbacks.checkpoints import Checkpoints
from src.callbacks.ema_teacher import EMATeacher
from src.callbacks.schedules import Schedules
from src.errors import UserError
from src.models.backbones.encoder import Encoder
from src.models.pretrain_module import PretrainModule, StepOutput
from src.models.teacher import TeacherPair, teacher_of
from src.optim import OptimizerRecipe
from src.schedules import Cosine, Linear
from src.train import check_teachers
from tests.callbacks.small_runs import SIZE, SmallData, fit


class Follower(PretrainModule):
    """A scalar student pushed down by 0.5 a step, and its teacher."""

    def __init__(self, momentum: Any = 0.9, optimizer: OptimizerRecipe | None = None) -> None:
        super().__init__(optimizer or OptimizerRecipe(partial(torch.optim.SGD), lr=0.5))
        self.student = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.student.weight)
        self.student.register_buffer("count", torch.zeros(()))
        self.teacher = teacher_of(self.student)
        self.teacher_momentum = momentum
        self.seen: list[float] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> StepOutput:
        self.student.get_buffer("count").add_(1)
        self.seen.append(self.teacher.weight.item())
        return {"loss": self.student.weight.sum()}

    def teacher_pairs(self) -> list[TeacherPair]:
        return [TeacherPair(self.student, self.teacher)]

    def encoders(self) -> dict[str, Encoder]:
        return {}


class Regressor(Follower):
    """A student and a loss on its teacher's answer, each row for itself."""

    def __init__(self) -> None:
        super().__init__(0.8, OptimizerRecipe(partial(torch.optim.SGD, momentum=0.9), lr=0.1))
        torch.manual_seed(0)
        self.student = nn.Linear(SIZE, SIZE).double()
        self.teacher = teacher_of(self.student)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> StepOutput:
        x = batch["image"].double()
        with torch.no_grad():
            target = self.teacher(x)
        return {"loss": (self.student(x) + 0.3 * target - x).square().mean()}


def run(folder: Path, module: Follower, *callbacks: Any, **options: Any) -> Follower:
    options = {"max_epochs": -1, "max_steps": 3, **options}
    fit(folder, *callbacks, module=module, **options)
    return module


class Constant(Follower):
    """A student that stays 1, and a teacher that starts from 0."""

    def __init__(self) -> None:
        super().__init__(0.996, OptimizerRecipe(partial(torch.optim.SGD), lr=0.0))
        nn.init.zeros_(self.teacher.weight)


class StopAt(L.Callback):
    class Reached(Exception):
        pass

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 150:
            raise self.Reached


def test_a_teacher_in_half_precision_moves_as_far_as_any_other(tmp_path: Path) -> None:
    """After n steps it is 1 - 0.996^n. In bfloat16 steps of 0.004 stop at 0.5, whose neighbor is 0.504."""
    options = {"precision": "bf16-true", "max_steps": 300}
    whole = run(tmp_path, Constant(), EMATeacher(), **options)
    assert whole.teacher.weight.dtype == torch.bfloat16
    assert whole.teacher.weight.item() == pytest.approx(1 - 0.996**300, abs=2**-9)
    callbacks = [EMATeacher(), Checkpoints(tmp_path, every_steps=150, monitor=None)]
    with pytest.raises(StopAt.Reached):
        run(tmp_path, Constant(), *callbacks, StopAt(), **options)
    resumed = run(tmp_path, Constant(), EMATeacher(), resume=tmp_path / "last.ckpt", **options)
    assert torch.equal(resumed.teacher.weight, whole.teacher.weight)


# the student: 1, 0.5, 0, -0.5
AFTER = [0.9 * 1 + 0.1 * 0.5, 0.9 * 0.95 + 0.1 * 0.0, 0.9 * 0.855 - 0.1 * 0.5]


def test_after_the_update_by_hand(tmp_path):
    module = run(tmp_path, Follower(), EMATeacher(when="after"))
    assert module.student.weight.item() == -0.5
    assert module.seen == pytest.approx([1.0, *AFTER[:2]])
    assert module.teacher.weight.item() == pytest.approx(AFTER[2])


def test_before_the_forward_pass_by_hand(tmp_path):
    module = run(tmp_path, Follower(), EMATeacher(when="before"))
    assert module.seen == pytest.approx([1.0, *AFTER[:2]])
    assert module.teacher.weight.item() == pytest.approx(AFTER[1])  # the last update has not been followed yet


@pytest.mark.parametrize(
    ("when", "moments"),
    [
        ("after", [0.0, 0.25, 0.5, 0.75]),
        ("before", [0.25, 0.5, 0.75]),
    ],  # before: the first move finds nothing to follow
)
def test_the_momentum_is_that_of_the_step_a_schedule_writes_it_for(tmp_path, when, moments):
    schedule = Schedules({"teacher_momentum": Linear(start=0.0, end=1.0)})
    module = run(tmp_path, Follower(), schedule, EMATeacher(when=when), max_steps=4)
    teacher, student = 1.0, 1.0
    for m in moments:
        student -= 0.5
        teacher = m * teacher + (1 - m) * student
    assert module.teacher.weight.item() == pytest.approx(teacher)


def test_micro_batches_do_not_move_the_teacher(tmp_path):
    module = run(tmp_path, Follower(), EMATeacher(), accumulate_grad_batches=4)
    assert module.seen == pytest.approx([value for value in (1.0, *AFTER[:2]) for _ in range(4)])
    assert module.teacher.weight.item() == pytest.approx(AFTER[2])


@pytest.mark.parametrize("when", ["before", "after"])
def test_one_batch_of_four_and_four_of_one_end_in_the_same_teacher(tmp_path, when):
    one, four = (
        run(tmp_path, Regressor(), EMATeacher(when=when), max_steps=6, accumulate_grad_batches=parts)
        for parts in (1, 4)
    )
    assert not torch.allclose(one.teacher.weight, Regressor().teacher.weight, atol=1e-3)
    for name, value in one.state_dict().items():
        assert torch.allclose(value, four.state_dict()[name], rtol=0, atol=1e-14)


class SaveAt(L.Callback):
    """Saves once, after everyone else has seen the step."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_run_taken_up_in_the_middle_of_an_epoch_has_the_bits_of_one_that_never_stopped(tmp_path, when):
    def train(*further: L.Callback, resume: Path | None = None) -> dict[str, Tensor]:
        momentum = Schedules({"teacher_momentum": Cosine(start=0.7, end=1.0)})
        callbacks = [momentum, EMATeacher(when=when), *further]
        return run(tmp_path, Regressor(), *callbacks, max_steps=-1, max_epochs=3, resume=resume).state_dict()

    middle = tmp_path / "middle.ckpt"
    whole = train(SaveAt(6, middle))
    resumed = train(resume=middle)
    saved = torch.load(middle, weights_only=True)["state_dict"]
    for name, value in whole.items():
        assert torch.equal(value, resumed[name])
        assert not torch.equal(value, saved[name])


@pytest.mark.parametrize(("buffers", "expected"), [("keep", 0.0), ("copy", 3.0)])
def test_buffers_are_the_teacher_s_own_or_the_student_s(tmp_path, buffers, expected):
    module = run(tmp_path, Follower(), EMATeacher(buffers=buffers))
    assert module.teacher.get_buffer("count").item() == expected


def test_a_teacher_that_no_callback_moves_is_refused_before_a_run():
    with pytest.raises(UserError, match=r"Follower has a teacher and nothing moves it: callbacks\.teacher"):
        check_teachers(Follower(), [Schedules({})])
    check_teachers(Follower(), [Schedules({}), EMATeacher()])


@pytest.mark.parametrize("momentum", [-0.1, 1.5, float("nan")])
def test_a_momentum_outside_of_0_and_1_is_refused_by_its_key(tmp_path, momentum):
    module = Follower(momentum)
    with pytest.raises(ValueError, match=r"model\.teacher_momentum.*must lie in \[0, 1\]; got"):
        run(tmp_path, module, EMATeacher())
    assert module.seen == []


def test_a_schedule_that_leaves_the_range_is_refused_when_it_does(tmp_path):
    module = Follower()
    schedule = Schedules({"teacher_momentum": Linear(start=0.5, end=1.5)})
    with pytest.raises(ValueError, match=r"schedules\.teacher_momentum.*got 1.25"):
        run(tmp_path, module, schedule, EMATeacher(), max_steps=4)
    assert len(module.seen) == 3


def test_pairs_that_do_not_match_are_refused_by_the_parameter_s_name(tmp_path):
    cases: dict[str, nn.Module] = {
        r"'weight' is \[1, 1\] in the student and \[1, 2\] in the teacher": nn.Linear(2, 1, bias=False),
        "'bias' is missing in the student": nn.Linear(1, 1),
        "takes no gradient, but its parameter 'weight' does": nn.Linear(1, 1, bias=False).requires_grad_(True),
    }
    for message, teacher in cases.items():
        module = Follower()
        module.teacher = teacher if "takes no" in message else teacher.requires_grad_(False)
        with pytest.raises(ValueError, match=message):
            run(tmp_path, module, EMATeacher())


def test_bad_options_are_refused_by_their_key():
    with pytest.raises(ValueError, match=r"callbacks\.teacher\.when must be 'before' or 'after'.*'never'"):
        EMATeacher(when="never")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"callbacks\.teacher\.buffers must be 'keep' or 'copy', got 'mean'"):
        EMATeacher(buffers="mean")  # type: ignore[arg-type]


def test_a_callback_without_a_teacher_is_refused(tmp_path):
    module = Follower()
    module.teacher_pairs = list  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="Follower has no teacher to move"):
        run(tmp_path, module, EMATeacher(), data=SmallData())
