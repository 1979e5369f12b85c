import torch
from torch import Tensor

from src.collectives import gather, gather_rows, rank, reduce_sum, world_size
from tests.distributed import in_two_processes


def contrastive(local: Tensor, everyone: Tensor, offset: int) -> Tensor:
    """The mean loss of the local rows against all rows: each should be most like itself."""
    targets = torch.arange(len(local)) + offset
    return torch.nn.functional.cross_entropy(local @ everyone.T / 0.2, targets)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(8, 5, generator=generator, dtype=torch.float64),
        torch.randn(5, 3, generator=generator, dtype=torch.float64),
    )


def on_each(process: int) -> dict[str, Tensor | int]:
    rows, weight = data()
    weight.requires_grad_(True)
    z = rows[4 * process : 4 * process + 4] @ weight
    everyone, offset = gather(z)
    contrastive(z, everyone, offset).backward()
    uneven = torch.full((process + 1, 2), float(process), requires_grad=True)
    gathered = gather_rows(uneven)
    value = torch.tensor([1.0 + process], requires_grad=True)
    return {
        "rank": rank(),
        "world_size": world_size(),
        "everyone": everyone.detach(),
        "gradient": weight.grad,
        "gathered": gathered,
        "tracked": int(gathered.requires_grad),
        "sum": reduce_sum(value),
    }


def test_two_processes_have_the_gradient_of_one_on_the_concatenated_batch():
    rows, weight = data()
    weight.requires_grad_(True)
    z = rows @ weight
    everyone, offset = gather(z)
    assert everyone is z  # alone, nothing is copied
    contrastive(z, everyone, offset).backward()

    processes = in_two_processes(on_each)
    assert [each["rank"] for each in processes] == [0, 1]
    assert [each["world_size"] for each in processes] == [2, 2]
    for each in processes:
        assert torch.equal(each["everyone"], z.detach())
        assert each["gathered"].tolist() == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
        assert each["tracked"] == 0
        assert each["sum"].tolist() == [3.0]
    averaged = (processes[0]["gradient"] + processes[1]["gradient"]) / 2  # as DDP does
    assert torch.allclose(averaged, weight.grad, rtol=0, atol=1e-12)


def test_alone_the_collectives_are_identities():
    x = torch.randn(3, 2, requires_grad=True)
    assert gather_rows(x) is x
    assert torch.equal(reduce_sum(x), x.detach())
    assert (rank(), world_size()) == (0, 1)
