"""Running out of memory, and what can be done then."""

from __future__ import annotations

import gc

import torch

# What allocators of CPUs, Apple's GPUs and cuBLAS say; CUDA's own raises torch.OutOfMemoryError.
_SAID = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a computation failed because memory was short, so that a smaller one may succeed."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)


def release_memory() -> None:
    """Gives back what a failed computation has left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
