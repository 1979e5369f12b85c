"""Losses and states that depend on other processes: two processes equal one on the whole batch, in float64."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from src.collectives import all_reduce, gather, reduce_sum
from src.models.image_text.siglip import ring_sigmoid_loss
from src.models.joint_embedding.center import Center
from src.models.joint_embedding.queue import FeatureQueue
from src.models.losses.contrastive import dcl, dclw, info_nce, moco_v3_loss, nt_xent
from src.models.losses.distillation import cross_view_cross_entropy, sharpen
from src.models.losses.image_text import clip_loss, sigmoid_loss
from src.models.losses.late_interaction import late_interaction_loss
from src.models.losses.redundancy import barlow_twins, cross_correlation, vicreg
from src.models.losses.refine import hybrid_distillation
from src.models.losses.swapped import sinkhorn, swapped_prediction
from tests.distributed import in_processes, in_two_processes

IMAGES, MICRO_BATCHES = 8, 2


def pair(z1: Tensor, z2: Tensor, loss: Callable[..., Tensor]) -> Tensor:
    z = normalize(torch.stack([z1, z2], dim=1), dim=-1)
    keys, offset = gather(z)
    return loss(z, keys, offset, temperature=0.2, max_entries=20)  # a few rows at a time


def query_and_key(z1: Tensor, z2: Tensor, loss: Callable[..., Tensor]) -> Tensor:
    keys, offset = gather(normalize(z2, dim=-1))
    return loss(normalize(z1, dim=-1), keys, offset, temperature=0.2)


def barlow(z1: Tensor, z2: Tensor) -> Tensor:
    standard = []
    for z in (z1, z2):  # as a synchronized batch norm does
        mean = all_reduce(z.sum(dim=0)) / IMAGES
        variance = all_reduce((z - mean).pow(2).sum(dim=0)) / IMAGES
        standard.append((z - mean) / variance.sqrt())
    return barlow_twins(all_reduce(cross_correlation(*standard, IMAGES)))


def vic(z1: Tensor, z2: Tensor) -> Tensor:
    return vicreg(z1, z2, gather(z1)[0], gather(z2)[0])[0]


def swav(z1: Tensor, z2: Tensor) -> Tensor:
    scores = normalize(torch.stack([z1, z2], dim=1), dim=-1)  # the prototypes are the axes
    codes = torch.stack([sinkhorn(crop, reduce=reduce_sum) for crop in scores.detach().unbind(dim=1)], dim=1)
    return swapped_prediction(codes, scores)


def dino(z1: Tensor, z2: Tensor) -> Tensor:
    center = Center(z1.shape[1]).double()
    center.observe(z1)
    center.observe(z2)
    center.update()
    targets = sharpen(torch.stack([z1, z2], dim=1), center(), 0.5)
    return cross_view_cross_entropy(targets, torch.stack([z2, z1], dim=1), 0.1)


def clip(z1: Tensor, z2: Tensor, scale: Tensor) -> Tensor:
    image, text = normalize(z1, dim=-1), normalize(z2, dim=-1)
    images, offset = gather(image)
    return clip_loss(image, text, images, gather(text)[0], offset, logit_scale=scale, max_entries=20)


def align(z1: Tensor, z2: Tensor, scale: Tensor) -> Tensor:
    """ALIGN's loss with two equal texts, one on the first process and one on the last."""
    image, text = normalize(z1, dim=-1), normalize(z2, dim=-1)
    images, offset = gather(image)
    text_hash = torch.tensor([0, 1, 2, 3, 4, 1, 6, 7])[: len(images)]
    options = {"text_hash": text_hash, "label_smoothing": 0.1}
    return 2 * clip_loss(image, text, images, gather(text)[0], offset, logit_scale=scale, max_entries=20, **options)


def filip(z1: Tensor, z2: Tensor, scale: Tensor) -> Tensor:
    """FILIP's loss; each row gives three tokens of three numbers, the third of every text is padding."""
    image, text = (normalize(torch.stack([z[:, i : i + 3] for i in range(3)], dim=1), dim=-1) for z in (z1, z2))
    text = text * torch.tensor([1.0, 1.0, 0.0], dtype=text.dtype)[:, None]
    images, offset = gather(image)
    return late_interaction_loss(image, text, images, gather(text)[0], offset, logit_scale=scale, max_entries=150)


def siglip(z1: Tensor, z2: Tensor, scale: Tensor) -> Tensor:
    texts, offset = gather(normalize(z2, dim=-1))
    return sigmoid_loss(normalize(z1, dim=-1), texts, offset, logit_scale=scale, logit_bias=-scale, max_entries=20)


def siglip_ring(z1: Tensor, z2: Tensor, scale: Tensor) -> Tensor:
    return ring_sigmoid_loss(normalize(z1, dim=-1), normalize(z2, dim=-1), logit_scale=scale, logit_bias=-scale)


def refine(z1: Tensor, z2: Tensor, scale: Tensor) -> Tensor:
    image, text = normalize(z1, dim=-1), normalize(z2, dim=-1)
    images, offset = gather(image)
    texts, _ = gather(text)
    teacher = z1.detach(), gather(z2.detach().flip(1))[0]
    return hybrid_distillation(
        image, texts, *teacher, offset, logit_scale=scale, alpha=0.5, max_entries=20
    ) + hybrid_distillation(text, images, z2.detach(), gather(z1.detach())[0], offset, logit_scale=scale, alpha=0.5)


# losses with a learned logit scale
OF_PAIRS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "clip": clip,
    "align": align,
    "filip": filip,
    "siglip": siglip,
    "siglip ring": siglip_ring,
    "refine": refine,
}
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nt_xent": lambda z1, z2: pair(z1, z2, nt_xent),
    "dcl": lambda z1, z2: pair(z1, z2, dcl),
    "dclw": lambda z1, z2: pair(z1, z2, dclw),
    "info_nce": lambda z1, z2: query_and_key(z1, z2, info_nce),
    "moco_v3": lambda z1, z2: query_and_key(z1, z2, moco_v3_loss),
    "barlow": barlow,
    "vicreg": vic,
    "swav": swav,
    "dino": dino,
}


def parameter_gradients(
    rows: slice, *, images: int = IMAGES, names: Sequence[str] = (*LOSSES, *OF_PAIRS)
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x1, x2 = torch.randn(2, images, 6, generator=generator, dtype=torch.float64)
    start = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    results = {}
    for name in names:
        weight = start.clone().requires_grad_(True)
        z1, z2 = x1[rows] @ weight, x2[rows] @ weight
        value = LOSSES[name](z1, z2) if name in LOSSES else OF_PAIRS[name](z1, z2, weight[0, 0].exp())
        value.backward()
        results[name], results[f"{name} value"] = weight.grad, value.detach()
    return results


def state(process: int, processes: int) -> dict[str, Tensor]:
    """Runs the queue and the center for two steps, with the sampler's order of micro-batches."""
    torch.manual_seed(0)
    queue, center = FeatureQueue(3, 16, columns=("index",)).double(), Center(3).double()
    keys = torch.randn(2, IMAGES, 3, dtype=torch.float64)
    share = IMAGES // MICRO_BATCHES // processes
    for step in range(2):
        for micro_batch in range(MICRO_BATCHES):
            begin = (micro_batch * processes + process) * share
            queue.stage(keys[step, begin : begin + share], index=torch.arange(begin, begin + share) + 100 * step)
            center.observe(keys[step, begin : begin + share])
        queue.enqueue()
        center.update()
    values = {"center": center(), "local part": queue.local_part()}
    return values | {f"queue {name}": value for name, value in queue.state_dict().items()}


def on_each(process: int) -> dict[str, Tensor]:
    half = IMAGES // 2
    return parameter_gradients(slice(process * half, (process + 1) * half)) | state(process, 2)


def test_two_processes_have_the_gradients_and_state_of_one():
    gradients, alone = parameter_gradients(slice(None)), state(0, 1)
    first, second = in_two_processes(on_each)
    for name, gradient in gradients.items():  # after the mean that DDP takes
        assert torch.allclose((first[name] + second[name]) / 2, gradient, rtol=0, atol=1e-8), name
        assert gradient.abs().max() > 1e-3, name
    for process in (first, second):
        for name, value in alone.items():
            if name != "local part":
                assert torch.allclose(process[name].double(), value.double(), rtol=0, atol=1e-12), name
    assert torch.equal(torch.cat([first["local part"], second["local part"]]), alone["queue features"])
    assert alone["queue column_index"].tolist() == [*range(8), *range(100, 108)]
    for name in ("siglip", "siglip ring"):
        torch.testing.assert_close(gradients[name], gradients["siglip"], rtol=1e-12, atol=0)


def pairs_on_each(process: int) -> dict[str, Tensor]:
    return parameter_gradients(slice(2 * process, 2 * process + 2), images=6, names=list(OF_PAIRS))


def test_three_processes_have_the_gradients_of_one():
    """With two processes a ring that always sends its own texts would pass too."""
    alone = parameter_gradients(slice(None), images=6, names=list(OF_PAIRS))
    processes = in_processes(pairs_on_each, 3)
    for name, value in alone.items():
        mean = torch.stack([process[name] for process in processes]).mean(dim=0)
        assert torch.allclose(mean, value, rtol=0, atol=1e-8), name
    for suffix in ("", " value"):
        torch.testing.assert_close(alone[f"siglip ring{suffix}"], alone[f"siglip{suffix}"], rtol=1e-12, atol=0)
