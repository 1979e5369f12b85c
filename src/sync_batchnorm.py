"""Batch norm with statistics over all processes, on GPUs and on CPUs."""

from __future__ import annotations

from typing import Any, cast

import timm.layers
import torch
from lightning.pytorch.plugins import TorchSyncBatchNorm
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from src.collectives import all_reduce, is_distributed, world_size


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """torch's SyncBatchNorm, which does not take tensors on the CPU; for those mean and variance are computed here.

    Every process must have the same number of samples (training batches do).
    """

    process_group: Any

    def _check_input_dim(self, input: Tensor) -> None:
        nn.SyncBatchNorm._check_input_dim(cast(nn.SyncBatchNorm, self), input)

    def _check_non_zero_input_channels(self, input: Tensor) -> None:
        nn.SyncBatchNorm._check_non_zero_input_channels(cast(nn.SyncBatchNorm, self), input)

    def forward(self, input: Tensor) -> Tensor:
        # not a subclass of torch's SyncBatchNorm, which DistributedDataParallel does not take on the CPU
        if input.device.type != "cpu":
            return nn.SyncBatchNorm.forward(cast(nn.SyncBatchNorm, self), input)
        if not (self.training and is_distributed()):
            return nn.modules.batchnorm._BatchNorm.forward(self, input)
        axes = [axis for axis in range(input.ndim) if axis != 1]
        shape = [1 if axis != 1 else -1 for axis in range(input.ndim)]
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        count = x.numel() // x.shape[1] * world_size()
        mean = all_reduce(x.sum(dim=axes)) / count
        centered = x - mean.view(shape)
        variance = all_reduce(centered.square().sum(dim=axes)) / count
        self._update_running_statistics(mean.detach(), variance.detach() * count / (count - 1))
        result = centered * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            result = result * self.weight.view(shape) + self.bias.view(shape)
        return result.to(input.dtype)

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, variance: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), share)
        self.running_var.lerp_(variance.to(self.running_var), share)


class SyncBatchNormAct(SyncBatchNorm):
    """The layer above for timm's batch norms that hold the activation after them, as in EfficientNet."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


class SyncBatchNormPlugin(TorchSyncBatchNorm):
    """Lightning's ``sync_batchnorm`` with the layers above in the place of torch's."""

    def apply(self, model: nn.Module) -> nn.Module:
        # torch's own conversion would leave out the activations that timm's layers hold
        model = convert_sync_batchnorm(model)
        for module in model.modules():
            if type(module) is nn.SyncBatchNorm:
                module.__class__ = SyncBatchNorm  # type: ignore[assignment]
            elif type(module) is timm.layers.SyncBatchNormAct:
                module.__class__ = SyncBatchNormAct  # type: ignore[assignment]
        return model
