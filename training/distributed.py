"""Several processes, as torchrun starts them: who we are, what is averaged, when to stop.

torchrun says in the environment who each process is; without it there is one, and every function
here does what that one needs.
"""

import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from common import cli

# ----------------------------------------------------------------------------------------- together
#
# Small things (losses, flags, positions) travel over gloo in main memory, gradients over nccl.


def identity(device: str) -> tuple[int, int, str]:
    """(rank, world size, own device) as torchrun has them; (0, 1, device) without it."""
    rank, world = (int(os.environ.get(k, v)) for k, v in (("RANK", 0), ("WORLD_SIZE", 1)))
    if device == "cuda" and world > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', rank)}"
    return rank, world, device


def start(device: str) -> tuple[int, int, str]:
    """(rank, world size, this process's device), with the processes connected if there are many."""
    rank, world, device = identity(device)
    cli.check_device(device)
    if world > 1:
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        # gloo beside nccl: what is gathered for checkpoints lies in main memory.
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        # A day: filling a cache, or drawing pictures on rank 0, keeps the others waiting.
        dist.init_process_group(backend, timeout=timedelta(days=1))
    return rank, world, device


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def close() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def average(values: list[float]) -> list[float]:
    """Each value's mean over the processes; not finite on one is not finite on all."""
    if not dist.is_initialized():
        return values
    # A sum carries NaN and infinity to everyone, so that all decide alike about a step.
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor)
    return (tensor / world_size()).tolist()


def gather(value) -> list:
    """Every process's value, in the order of ranks, on every process."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def parallel(module: nn.Module) -> nn.Module:
    """The module with its gradients averaged over the processes, if there are several."""
    if not dist.is_initialized():
        return module
    # Views: no second copy of the gradients for the buckets in which they travel.
    return nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)


def shard(module: nn.Module, kinds, float32=()) -> None:
    """Leave each process a part of every weight, put together while it is used (FSDP).

    Submodules of these kinds are put together one at a time. Weights stay as they are in one
    process alone. Sharded, they are computed with in bfloat16 on GPUs, but for submodules of the
    names in `float32`.
    """
    if not dist.is_initialized():
        return
    device = next(module.parameters()).device.type
    half = torch.bfloat16 if device == "cuda" else None
    # Parted again after every pass, the outermost too: a moving average is taken part by part.
    options = {"reshard_after_forward": True, "mesh": init_device_mesh(device, (world_size(),))}
    jobs = [(m, half) for m in module.modules() if isinstance(m, kinds)]
    jobs += [(m, None) for name, m in module.named_modules() if name.split(".")[-1] in float32]
    for each, dtype in [*jobs, (module, half)]:
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        fully_shard(each, mp_policy=policy, **options)


def joined(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in one piece, if each process has a part of it: on rank 0, in main memory."""
    if not isinstance(tensor, DTensor):
        return tensor
    whole = tensor.full_tensor()
    return whole.cpu() if is_main() else whole.new_empty(0)


def parted(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor, the same on all processes, laid out in memory and split like another."""
    if isinstance(like, DTensor):
        tensor = tensor.to(like.device)
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return torch.empty_like(like).copy_(tensor)


# ---------------------------------------------------------------------------------------- stopping
#
# torchrun passes SIGTERM on and kills after 30 s: time for the step at hand and a checkpoint.


class Stop:
    """SIGTERM and SIGINT as a flag that is looked at between steps; a second one kills."""

    def __init__(self):
        self.signal, self.before = 0, {}

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            self.before[number] = signal.signal(number, self._raised)
        return self

    def _raised(self, number, frame):
        self.signal = number
        # The handlers from before are back at once: whoever asks twice is not to wait.
        self.__exit__()

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
