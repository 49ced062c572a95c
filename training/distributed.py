"""Several processes, as torchrun starts them: ranks, averages, sharded weights, a graceful exit.

torchrun describes each process in its environment. Without torchrun there is one process, and every
function here does what that one needs.
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
from common.files import first_difference

# ---------------------------------------------------------------------------------------- processes


def get_dist_info(device: str) -> tuple[int, int, str]:
    """(rank, world size, this process's device) as torchrun has them; (0, 1, device) without it.

    ValueError for one GPU for several processes.
    """
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if device.startswith("cuda:") and world > 1:
        raise ValueError(f"--device {device}: torchrun gives each process its GPU: --device cuda")
    if device == "cuda" and world > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', rank)}"
    return rank, world, device


def init_distributed(device: str) -> tuple[int, int, str]:
    """Connect the processes, if there are several; (rank, world size, this process's device)."""
    rank, world, device = get_dist_info(device)
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


def close(ddp_modules=()) -> None:
    """Leave the other processes; what `wrap_ddp` returned is of no use from here on."""
    if not dist.is_initialized():
        return
    for module in ddp_modules:
        # In C++ these hold the group. The last to let go of it joins its threads, and these do so
        # under the interpreter's lock: where a thread still wants that lock, both wait for ever.
        module.reducer = module.logger = module.process_group = None
    dist.destroy_process_group()


def all_reduce_mean(values: list[float]) -> list[float]:
    """Each value's mean over the processes; NaN or infinite if it is so on any of them."""
    if not dist.is_initialized():
        return values
    # A sum carries NaN and infinity to everyone, so all decide alike about a step.
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


def check_same(values: dict[str, str]) -> None:
    """ValueError on every process if one of them, on another machine perhaps, has other values."""
    for other_rank, others in enumerate(gather(values)):
        # Names count on either side: a process that alone saw no difference would wait for ever.
        if differ := first_difference(others, values):
            raise ValueError(
                f"process {other_rank} has {differ} as process {rank()}: give the same"
            )


# ------------------------------------------------------------------------------- gradients, weights


def wrap_ddp(module: nn.Module) -> nn.Module:
    """The module with its gradients averaged over the processes, if there are several."""
    if not dist.is_initialized():
        return module
    # Views: no second copy of the gradients for the buckets in which they travel. Buffers are the
    # same everywhere, and TDM's processes differ in how many forward passes they take.
    return nn.parallel.DistributedDataParallel(
        module, gradient_as_bucket_view=True, forward_sync_buffers=False
    )


def apply_fsdp(module: nn.Module, layer_types, keep_in_fp32=()) -> None:
    """Shard every weight over the processes, in place (FSDP); one process alone changes nothing.

    Submodules of layer_types are gathered one at a time while they compute, in bfloat16 on GPUs.
    Submodules named in keep_in_fp32 compute in float32.
    """
    if not dist.is_initialized():
        return
    device = next(module.parameters()).device.type
    half = torch.bfloat16 if device == "cuda" else None
    layers = [(layer, half) for layer in module.modules() if isinstance(layer, layer_types)]
    named = module.named_modules()
    layers += [(layer, None) for name, layer in named if name.split(".")[-1] in keep_in_fp32]
    mesh = init_device_mesh(device, (world_size(),))
    for layer, dtype in [*layers, (module, half)]:
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        # Resharded after every pass, the outermost too: a moving average works on the shards.
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def gather_full(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor's full value, on rank 0 in main memory (elsewhere empty); others as is."""
    if not isinstance(tensor, DTensor):
        return tensor
    full = tensor.full_tensor()
    return full.cpu() if is_main() else full.new_empty(0)


def shard_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A full tensor, the same on all processes, laid out in memory and sharded like another."""
    if isinstance(like, DTensor):
        tensor = tensor.to(like.device)
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return torch.empty_like(like).copy_(tensor)


# ----------------------------------------------------------------------------------------- stopping
#
# torchrun passes SIGTERM on and kills after 30 s: time to finish a step and write a checkpoint.


class GracefulExit:
    """SIGTERM and SIGINT as a flag to look at between steps; a second one kills as usual.

    .signal: the number of the signal received, or 0.
    """

    def __init__(self):
        self.signal, self.previous_handlers = 0, {}

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            self.previous_handlers[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number, frame):
        self.signal = number
        # Restored at once, for whoever asks twice does not want to wait.
        self.__exit__()

    def __exit__(self, *_):
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
