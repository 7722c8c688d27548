"""FSDP2: shard weights, gradients, optimizer state and moving average over the processes, for very large models.

Gathered tensors have the names and shapes of an unsharded model. So a run writes the same files with and without
sharding, and it can resume with any number of processes.
"""

from typing import Any

import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from linvit.distributed import Ranks
from linvit.model.build import TimmModel
from linvit.training.options import DeviceOptions


def shard(
    trained: nn.Module, model: TimmModel, *, ema: ModelEmaV3 | None, options: DeviceOptions, ranks: Ranks
) -> None:
    """Shard a model and its moving average over the processes, in place.

    On a GPU this also moves them to the device, part by part. Create the optimizer afterwards.

    Args:
        trained: the module that training calls: the model, or a module around it.
        model: its blocks are gathered one at a time, its other weights together.

    Raises ValueError if there is only one process.
    """
    if ranks.world_size == 1:
        raise ValueError("--fsdp shards the model over processes, but there is only one: use torchrun, or remove it")
    if options.torchcompile is not None:
        # Each gather would break the graph of a model compiled in one piece.
        for block in _separable_blocks(model):
            block.compile(backend=options.torchcompile, mode=options.torchcompile_mode)
    # Without a device type the mesh would use the machine's GPU even if the run is on the CPU.
    mesh = init_device_mesh(ranks.device.type, (dist.get_world_size(),))
    _shard(model, trained, mesh)
    if ema is not None:
        _shard(ema.module, ema.module, mesh)


def _shard(model: nn.Module, trained: nn.Module, mesh: DeviceMesh) -> None:
    for module in (*_separable_blocks(model), trained):
        fully_shard(module, mesh=mesh)


def _separable_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a Vision Transformer; none if they share parameters, which must be gathered together."""
    blocks = list(getattr(model, "blocks", ()))
    parameters = [parameter for block in blocks for parameter in block.parameters()]
    return blocks if len(set(parameters)) == len(parameters) else []


def is_sharded(module: nn.Module) -> bool:
    """Whether a module's weights are sharded over the processes."""
    return isinstance(module, FSDPModule)


def full(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor in every process; all processes must call it in the same order.

    A tensor that is not sharded is returned unchanged.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(value: Any, *, keep: bool) -> Any:
    """Gather the sharded tensors in nested dicts and lists on the CPU; all processes must call it.

    Only one full tensor is on the device at a time. With `keep=False` this process takes part in the exchange, but its
    result has empty tensors in place of the full ones.
    """
    if isinstance(value, DTensor):
        tensor = full(value.detach())
        return tensor.cpu() if keep else tensor.new_empty(0, device="cpu")
    if isinstance(value, dict):
        return {key: gather(part, keep=keep) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(gather(part, keep=keep) for part in value)
    return value


def shard_like(tensor: Any, other: Tensor) -> Any:
    """This process's shard of a full tensor, sharded as `other` is.

    `tensor` is returned unchanged if `other` is not sharded or has another shape.
    """
    if not isinstance(other, DTensor) or not isinstance(tensor, Tensor) or tensor.shape != other.shape:
        return tensor
    # Every process has read the full tensor, so nothing needs to be sent.
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def load_full(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """`load_state_dict` with full tensors, into a model that may be sharded."""
    own = model.state_dict()
    model.load_state_dict({name: shard_like(tensor, own.get(name, tensor)) for name, tensor in state_dict.items()})
