"""Automatic mixed precision, the same in training and evaluation."""

import torch


def autocast_dtype(amp: bool, amp_dtype: str) -> torch.dtype | None:
    """The precision of automatic mixed precision; None where it is off."""
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}[amp_dtype] if amp else None


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Automatic mixed precision on that device; off where `dtype` is None."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
