"""Recognition of out-of-memory errors by their messages, which must arrive here unchanged.

Axes: none.
"""

import torch

# Messages of torch and its libraries in a plain RuntimeError. cuDNN finds no engine if none has enough memory.
_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "STATUS_ALLOC_FAILED",  # cuBLAS, cuSOLVER, cuDNN
    "ALLOCATION_FAILED",  # CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED, since cuDNN 9
    "unable to find an engine to execute this computation",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error is of a failed allocation, on a GPU or in main memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)
