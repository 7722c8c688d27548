"""FSDP2: weights, gradients, optimizer state and average divided among the processes, for models too large for one.

Gathered again they have the names and shapes of a model that was never divided: checkpoints and weights are the same
files with and without sharding, and a run goes on with any number of processes.
"""

from collections.abc import Sequence
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
    """Divide a model and its average among the processes, in place.

    On a GPU this is also what brings them there, part by part. The optimizer must be made after it.

    Args:
        trained: what is called in training: the model, or a module around it.
        model: its blocks are gathered one at a time, all else at once.

    Raises ValueError where there is one process alone.
    """
    if ranks.world_size == 1:
        raise ValueError("--fsdp divides the model among processes, but there is only one: use torchrun, or remove it")
    blocks = _separable_blocks(model)
    if options.torchcompile is not None:
        # Whole, a model would be cut into graphs at each of the gathers.
        for block in blocks:
            block.compile(backend=options.torchcompile, mode=options.torchcompile_mode)
    # By default it would be of the GPU that a machine has, also in a run on its CPU.
    mesh = init_device_mesh(ranks.device.type, (dist.get_world_size(),))
    _divide(blocks, trained, mesh)
    if ema is not None:
        _divide(_separable_blocks(ema.module), ema.module, mesh)


def _divide(blocks: Sequence[nn.Module], rest: nn.Module, mesh: DeviceMesh) -> None:
    for module in (*blocks, rest):
        fully_shard(module, mesh=mesh)


def _separable_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a Vision Transformer; none where they share parameters, which must be gathered together."""
    blocks = list(getattr(model, "blocks", ()))
    parameters = [parameter for block in blocks for parameter in block.parameters()]
    return blocks if len(set(parameters)) == len(parameters) else []


def is_sharded(module: nn.Module) -> bool:
    """Whether a module's weights are divided among the processes."""
    return isinstance(module, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """A divided tensor put together, in every process; any other as it is. All processes call it in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(value: Any, *, keep: bool) -> Any:
    """A nest of dicts and lists with its divided tensors put together, on the CPU; all processes call it.

    One tensor at a time is whole on the device. With `keep=False` this process only takes part, and the result has
    empty tensors in place of them.
    """
    if isinstance(value, DTensor):
        tensor = whole(value.detach())
        return tensor.cpu() if keep else tensor.new_empty(0, device="cpu")
    if isinstance(value, dict):
        return {key: gathered(part, keep=keep) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(gathered(part, keep=keep) for part in value)
    return value


def divided_like(tensor: Any, other: Tensor) -> Any:
    """This process's part of a whole tensor, divided as `other` is; the whole where it is not, or has another shape."""
    if not isinstance(other, DTensor) or not isinstance(tensor, Tensor) or tensor.shape != other.shape:
        return tensor
    # Every process has read the whole one, so that nothing need be sent.
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def load_whole(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """`load_state_dict` with whole tensors, into a model that may be divided."""
    own = model.state_dict()
    model.load_state_dict({name: divided_like(tensor, own.get(name, tensor)) for name, tensor in state_dict.items()})
