"""The NVIDIA GPUs this process may use. Asks the driver itself: torch takes seconds to import."""

import ctypes
import os


def gpu_count() -> int:
    """How many devices NVIDIA's driver offers to this process; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def gpu_names() -> list[str]:
    """What CUDA_VISIBLE_DEVICES takes to give one of them each to a process of its own."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in listed.split(",")] if listed else [str(n) for n in range(gpu_count())]
    return names[: gpu_count()]
