"""What the processes of one training share, as `accelerate launch` starts them. Imports torch only where there are several."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PATIENCE = timedelta(hours=2)  # the others wait while the first downloads weights


def rank() -> int:
    """This process's number among all; 0 is the one that writes, logs and speaks."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def first_of_machine_alone() -> Iterator[None]:
    """Let the first process of each machine through, then the others, which find downloads in the cache and ask no hub."""
    if world_size() == 1:
        yield
        return
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not first:
        os.environ["HF_HUB_OFFLINE"] = "1"
        meet()
    yield
    if first:
        meet()


def meet() -> None:
    """Come back once every process has called this."""
    import torch
    import torch.distributed

    join()
    torch.distributed.all_reduce(torch.zeros(1))


def shared_folder(folder: Path) -> Path:
    """The first process's folder, in every process."""
    if world_size() == 1:
        return folder
    import torch
    import torch.distributed

    join()
    folders = [str(folder.resolve())]
    torch.distributed.broadcast_object_list(folders, src=0, device=torch.device("cpu"))
    return Path(folders[0])


def gather(tensor: "Tensor") -> "Tensor":
    """(n, ...) of each process, alike in all -> (processes * n, ...); a number counts as one row. By gloo what lies on the CPU, by NCCL
    what lies on a GPU, where accelerate's own takes all for the latter."""
    import torch
    import torch.distributed

    own = tensor.reshape(1) if tensor.ndim == 0 else tensor.contiguous()
    parts = [torch.empty_like(own) for _ in range(world_size())]
    torch.distributed.all_gather(parts, own)
    return torch.cat(parts)


def agree(tensor: "Tensor") -> None:
    """Put the first process's values into every process's tensor."""
    import torch.distributed

    torch.distributed.broadcast(tensor, src=0)


def average(tensor: "Tensor") -> None:
    """Put the mean over all processes into every process's tensor."""
    import torch.distributed

    torch.distributed.all_reduce(tensor)
    tensor.div_(world_size())


def join() -> None:
    """Enter the process group, with gloo for what lies on the CPU and NCCL for what lies on a GPU."""
    import torch
    import torch.distributed

    if not torch.distributed.is_initialized():
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=PATIENCE)


def leave() -> None:
    """Leave the process group, where there is one."""
    if world_size() > 1:
        import torch.distributed

        torch.distributed.destroy_process_group()
