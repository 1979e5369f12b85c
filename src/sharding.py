"""Models too large for one device: FSDP2 deals out parameters, gradients and the optimizer's state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method


class FullySharded(ModelParallelStrategy):
    """``trainer=fsdp``: every process keeps its part of each tensor and has a block whole only while it is at work.

    Teachers are dealt out as their students are, so that the moving average needs no communication. Checkpoints are
    single files of whole tensors, as those of any other run: they resume, evaluate and export on other hardware.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def shard(self, module: L.LightningModule) -> None:
        """Called once the module is built, before its optimizer is."""
        if self._layer_sync is not None:  # Lightning leaves it to the strategies, and this one forgets
            self._layer_sync.apply(module)
        deal(module, self.device_mesh["data_parallel"])


def deal(module: nn.Module, mesh: DeviceMesh) -> None:
    """Shard ``module`` in place over ``mesh``: each of its `blocks` is gathered on its own, the rest at once."""
    for block in blocks(module):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(module, "training_step")


def blocks(module: nn.Module) -> list[nn.Module]:
    """The layers that a network repeats, students' and teachers': what stands in a list or a sequence and has parts of
    its own. Those of a ViT are its blocks, those of a ResNet the residual blocks of each stage."""
    found = []
    for parent in module.modules():
        if isinstance(parent, nn.Sequential | nn.ModuleList):
            found += [child for child in parent.children() if _has_parts(child)]
    return found


def _has_parts(module: nn.Module) -> bool:
    return any(True for child in module.children() for _ in child.parameters()) and not isinstance(
        module, nn.Sequential | nn.ModuleList
    )


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Have what is not in a block whole, to run a part of ``module`` outside of its training step, in every process.
    Nothing happens to a module that is not sharded."""
    if not isinstance(module, FSDPModule):
        yield
        return
    cast(FSDPModule, module).unshard()
    try:
        yield
    finally:
        cast(FSDPModule, module).reshard()
