"""Models too large for one device: FSDP2 shards parameters, gradients and optimizer state over processes."""

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
    """``trainer=fsdp``: every process keeps its shard of each parameter, and a block's whole parameters only while it
    computes.

    Teachers are sharded as their students are, so that the moving average needs no communication. Checkpoints are
    single files of whole tensors, as those of any other run: they resume, evaluate and export on other hardware.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def shard(self, module: L.LightningModule) -> None:
        """Shards ``module`` in place, before its optimizer is built."""
        if self._layer_sync is not None:  # Lightning's ModelParallelStrategy does not apply it
            self._layer_sync.apply(module)
        shard(module, self.device_mesh["data_parallel"])


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Shards ``module`` in place over ``mesh``: each of its `repeated_blocks` on its own, the rest together."""
    for block in repeated_blocks(module):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(module, "training_step")


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """Returns the blocks that a network repeats, of students and teachers: elements of lists and sequences that have
    submodules with parameters. For a ViT these are its blocks, for a ResNet the residual blocks of each stage."""
    blocks = []
    for parent in module.modules():
        if isinstance(parent, nn.Sequential | nn.ModuleList):
            blocks += [child for child in parent.children() if _has_submodules(child)]
    return blocks


def _has_submodules(module: nn.Module) -> bool:
    return any(True for child in module.children() for _ in child.parameters()) and not isinstance(
        module, nn.Sequential | nn.ModuleList
    )


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """While active, parameters outside of blocks are whole in every process, so that a part of ``module`` can run
    outside of its training step. Does nothing to a module that is not sharded."""
    if not isinstance(module, FSDPModule):
        yield
        return
    cast(FSDPModule, module).unshard()
    try:
        yield
    finally:
        cast(FSDPModule, module).reshard()
