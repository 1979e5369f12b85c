import math
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor

from src.models.joint_embedding.swav import SwAV
from src.sync_batchnorm import SyncBatchNormPlugin
from tests.distributed import in_two_processes
from tests.models.joint_embedding import test_redundancy_methods as others
from tests.models.joint_embedding import toy


def swav(**options: object) -> SwAV:
    torch.manual_seed(0)
    return SwAV(toy.resnet(), toy.optimizer(), **{"prototypes": 3, "projection_dim": 6, **options}).double()


def balanced(scores: list[list[float]], eps: float, iterations: int) -> list[list[float]]:
    """Sinkhorn-Knopp, number by number: samples in rows, prototypes in columns."""
    q = [[math.exp(s / eps) for s in row] for row in scores]
    for _ in range(iterations):
        for k in range(len(q[0])):
            total = sum(row[k] for row in q) * len(q[0])
            for row in q:
                row[k] /= total
        q = [[value / sum(row) / len(q) for value in row] for row in q]
    return [[value / sum(row) for value in row] for row in q]


def forward(method: SwAV, batch: dict[str, Tensor]) -> Tensor:
    """Unit vectors of every crop, [V, B, D]: each size through the encoder at once, all through one projector."""
    views = batch["views"].transpose(0, 1).flatten(0, 1)
    h = [method.encoder(views).embedding]
    if "local_views" in batch:
        h.append(method.encoder(batch["local_views"].transpose(0, 1).flatten(0, 1)).embedding)
    z = method.projector(torch.cat(h))
    return (z / z.norm(dim=1, keepdim=True)).unflatten(0, (-1, len(batch["views"])))


def by_loops(method: SwAV, batch: dict[str, Tensor], queued: Tensor | None = None) -> tuple[float, list]:
    prototypes = method.prototypes.weight / method.prototypes.weight.norm(dim=1, keepdim=True)
    z = forward(method, batch)
    scores = (z @ prototypes.T).tolist()
    total, codes = 0.0, []
    for crop in (0, 1):
        earlier = [] if queued is None else (queued[:, 6 * crop : 6 * crop + 6] @ prototypes.T).tolist()
        codes.append(balanced(earlier + scores[crop], method.eps, method.iterations)[len(earlier) :])
        pairs = 0.0
        for other in range(len(scores)):
            if other == crop:
                continue
            for code, row in zip(codes[-1], scores[other], strict=True):
                log_sum = math.log(sum(math.exp(s / method.temperature) for s in row))
                pairs -= sum(q * (s / method.temperature - log_sum) for q, s in zip(code, row, strict=True))
        total += pairs / len(scores[crop]) / (len(scores) - 1) / 2
    return total, codes


@pytest.mark.parametrize("local_views", [0, 3])
def test_a_step_written_as_loops(local_views):
    method, batch = swav(eps=0.1, temperature=0.2), toy.batch(local_views=local_views)
    loss, codes = by_loops(swav(eps=0.1, temperature=0.2), batch)
    output = method.training_step(batch, 0)
    assert output["loss"].item() == pytest.approx(loss, rel=1e-9)
    rows = [row for crop in codes for row in crop]
    uses = [sum(row[k] for row in rows) / len(rows) for k in range(3)]
    use = math.exp(-sum(u * math.log(u) for u in uses))
    assert output["logs"]["effective_prototypes"].item() == pytest.approx(use, rel=1e-9)
    uncertain = -sum(q * math.log(q) for row in rows for q in row) / len(rows)
    assert output["logs"]["code_entropy"].item() == pytest.approx(uncertain, rel=1e-9)
    spread = forward(swav(), batch).std(dim=1, correction=0).mean().item()
    assert output["logs"]["std"].item() == pytest.approx(spread, rel=1e-9)


def test_prototypes_are_normalized_in_the_forward_pass():
    method, longer = swav(), swav()
    longer.prototypes.weight.data.mul_(7.0)
    losses = [each.training_step(toy.batch(), 0)["loss"].item() for each in (method, longer)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert torch.allclose(longer.prototypes.weight.norm(dim=1), torch.ones(3, dtype=torch.float64))


def test_local_crops_are_predicted_from_and_never_assigned():
    batch, given = toy.batch(local_views=3), []
    method = swav(queue_size=4)
    assign = method.assign
    method.assign = lambda scores: given.append(scores) or assign(scores)  # type: ignore[method-assign]
    batch["local_views"].requires_grad_(True)
    batch["views"].requires_grad_(True)
    method.training_step(batch, 0)["loss"].backward()
    assert given[0].shape == (4, 2, 3)
    assert not given[0].requires_grad
    assert (batch["local_views"].grad.flatten(2).norm(dim=2) > 0).all()
    method.queue.enqueue()
    large = forward(swav(), batch)[:2].transpose(0, 1).flatten(1)
    assert torch.allclose(method.queue.features, large)  # the two large crops, side by side


def test_queued_features_take_part_in_the_assignment_and_not_in_the_loss():
    method, batch = swav(queue_size=8), toy.batch()
    alone = by_loops(swav(), batch)[0]
    rows = torch.nn.functional.normalize(torch.randn(8, 2, 6, dtype=torch.float64), dim=-1).flatten(1)
    losses = []
    for part in rows.split(4):
        losses.append(method.training_step(batch, 0)["loss"].item())
        method.queue._staged.clear()
        method.queue.stage(part)
        method.queue.enqueue()
    assert losses == [pytest.approx(alone, rel=1e-9)] * 2  # not before it is full
    with_queue = by_loops(swav(), batch, rows)[0]
    assert abs(with_queue - alone) > 1e-4
    output = method.training_step(batch, 0)
    assert output["loss"].item() == pytest.approx(with_queue, rel=1e-9)
    output["loss"].backward()
    assert method.queue.features.grad is None
    method.use_queue = 0.0  # as the schedule writes it before its time
    assert method.training_step(batch, 0)["loss"].item() == pytest.approx(alone, rel=1e-9)


class Batches(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return toy.batch(local_views=1, seed=index)


def train(folder: Path, method: SwAV, *callbacks: L.Callback, steps: int, micro_batches: int = 1) -> None:
    torch.set_num_threads(1)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        precision="64-true",
        accumulate_grad_batches=micro_batches,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=list(callbacks),
        default_root_dir=folder,
    )
    loader = torch.utils.data.DataLoader(Batches(), batch_size=None)
    trainer.fit(method, loader)


class Watch(L.Callback):
    """Keeps what it saw of the queue."""

    def __init__(self) -> None:
        self.queues: list[tuple[int, int]] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: SwAV, outputs: object, batch: object, batch_idx: int
    ) -> None:
        self.queues.append((trainer.global_step, int(pl_module.queue.filled)))


def test_features_are_enqueued_once_a_step_for_any_number_of_micro_batches(tmp_path):
    watch = Watch()
    train(tmp_path, swav(queue_size=16), watch, steps=2, micro_batches=2)
    assert watch.queues == [(0, 0), (1, 8), (1, 8), (2, 16)]


def advance(method: SwAV, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for part in range(2):
            method.training_step(toy.batch(local_views=1, seed=2 * step + part), 0)["loss"].backward()
        method.on_before_optimizer_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()


def test_a_run_stopped_within_an_epoch_goes_on_to_the_same_bits(tmp_path):
    whole = swav(queue_size=24)
    advance(whole, whole.configure_optimizers(), range(6))
    stopped = swav(queue_size=24)
    optimizer = stopped.configure_optimizers()
    advance(stopped, optimizer, range(4))  # full after 3 steps, its pointer then within it
    torch.save({"model": stopped.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "stopped.pt")
    torch.manual_seed(9)
    resumed = SwAV(toy.resnet(), toy.optimizer(), prototypes=3, projection_dim=6, queue_size=24).double()
    optimizer = resumed.configure_optimizers()
    state = torch.load(tmp_path / "stopped.pt", weights_only=True)
    resumed.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    assert resumed.queue.full
    assert int(resumed.queue.pointer) == 8
    advance(resumed, optimizer, range(4, 6))
    expected = whole.state_dict()
    assert {"prototypes.weight", "queue.features", "queue.pointer", "queue.filled"} <= set(expected)
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, expected[name]), name


def two_steps(part: slice) -> dict[str, Tensor]:
    """Gradients of the methods that look beyond their process; SwAV's second step sees the queue of its first."""
    results = {}
    whole = toy.batch(6, local_views=2)
    batch = {name: value[part] for name, value in whole.items()}
    pair = {name: value for name, value in batch.items() if name != "local_views"}
    for name, make in (("barlow", others.barlow_twins), ("vicreg", others.vicreg)):
        method = SyncBatchNormPlugin().apply(make())
        loss = method.training_step(pair, 0)["loss"]
        loss.backward()
        results |= {f"{name} {key}": value for key, value in toy.gradients(method).items()}
    method = SyncBatchNormPlugin().apply(swav(queue_size=6))
    for step in range(2):
        output = method.training_step(batch, step)
        method.zero_grad()
        output["loss"].backward()
        results |= {f"swav {step} {key}": value.clone() for key, value in toy.gradients(method).items()}
        method.on_before_optimizer_step(method.configure_optimizers())
    for key in ("effective_prototypes", "effective_predictions"):
        results[f"same {key}"] = output["logs"][key]
    return results | {"same queue": method.queue.features}


def on_each(process: int) -> dict[str, Tensor]:
    return two_steps(slice(3 * process, 3 * process + 3))


def test_two_processes_are_one_for_barlow_twins_vicreg_and_swav():
    """Gradients with batch norm over both, and SwAV's queue."""
    whole = two_steps(slice(None))
    first, second = in_two_processes(on_each)
    assert len(whole) > 100
    for name, value in whole.items():
        if name.startswith("same"):
            assert torch.allclose(first[name], value, rtol=0, atol=1e-8), name
            assert torch.allclose(second[name], value, rtol=0, atol=1e-8), name
        else:
            assert torch.allclose((first[name] + second[name]) / 2, value, rtol=0, atol=1e-8), name


def test_half_precision_stops_before_the_cosines():
    method = swav().float()
    batch = {name: value.float() if value.is_floating_point() else value for name, value in toy.batch().items()}
    seen: list[Tensor] = []
    assign = method.assign
    method.assign = lambda scores: seen.append(scores) or assign(scores)  # type: ignore[method-assign]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = method.training_step(batch, 0)["loss"]
    assert loss.dtype == seen[0].dtype == torch.float32
    assert not torch.equal(seen[0], seen[0].bfloat16().float())
    loss.backward()


def test_bad_batches_and_values_are_refused_by_their_key():
    with pytest.raises(ValueError, match=r"data\.train_view: SwAV assigns 2 views .* has 3 in train_view\.views"):
        swav().training_step(toy.batch(views=3), 0)
    with pytest.raises(ValueError, match=r"model\.prototypes=5 .* 4 samples.*data\.batch_size.*model\.queue_size"):
        swav(prototypes=5).training_step(toy.batch(), 0)
    swav(prototypes=5, queue_size=4).training_step(toy.batch(), 0)
    method = swav(queue_size=6)
    method.training_step(toy.batch(), 0)
    with pytest.raises(ValueError, match=r"model\.queue_size=6 .*multiple of the 4 images"):
        method.on_before_optimizer_step(method.configure_optimizers())
    with pytest.raises(ValueError, match=r"model\.eps=0\.05 and model\.temperature=0 must be above 0"):
        swav(temperature=0)
    with pytest.raises(ValueError, match=r"model\.queue_size=-1 must not be negative"):
        swav(queue_size=-1)
