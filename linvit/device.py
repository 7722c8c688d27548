"""The device that a model runs on, and its automatic mixed precision."""

import torch

from linvit.settings.flags import UsageError


def choose_device(name: str) -> str:
    """The device called `name`; "auto" is a GPU if there is one, else the CPU.

    Raises UsageError if the device does not exist here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: unknown device; choose 'cpu', 'cuda', 'cuda:1' or 'auto'") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"--device {name}: torch finds no CUDA GPU here; choose --device cpu or auto")
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise UsageError(f"--device {name}: the number of GPUs here is {count}, counted from cuda:0")
    elif not _exists(device):
        raise UsageError(f"--device {name}: there is no such device here; choose --device cpu or auto")
    return name


def _exists(device: torch.device) -> bool:
    if device.type == "cpu":
        return not device.index
    try:
        # The copy back fails on "meta", whose tensors have no values.
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, ImportError):
        return False
    return True


def autocast_dtype(amp: bool, amp_dtype: str) -> torch.dtype | None:
    """The dtype of automatic mixed precision; None if it is off."""
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}[amp_dtype] if amp else None


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Automatic mixed precision on `device`; None disables it."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
