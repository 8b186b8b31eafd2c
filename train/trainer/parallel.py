"""How the processes of a run share the model: DDP, where each has all of it, or FSDP2, where weights, gradients,
optimizer and averages are split among them."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from model import SubjectDiffusion

Item = TypeVar("Item")


def rank_and_count() -> tuple[int, int]:
    """This process's rank, and how many train together."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def rank_and_count_on_node() -> tuple[int, int]:
    """This process's place among those of its machine, and how many these are. Collective call: every rank must make
    it."""
    hosts, (rank, _) = list_of_ranks([socket.gethostname()]), rank_and_count()
    return hosts[:rank].count(hosts[rank]), hosts.count(hosts[rank])


def barrier(group: distributed.ProcessGroup | None = None) -> None:
    """Waits until every rank is here. Collective call: every rank must make it."""
    if distributed.is_initialized():
        distributed.barrier(group)


def background_group() -> distributed.ProcessGroup | None:
    """All ranks, for what a thread does beside the training. Collective call: every rank must make it."""
    if not distributed.is_initialized():
        return None
    return cast(distributed.ProcessGroup, distributed.new_group(backend="gloo"))


def share(model: SubjectDiffusion, strategy: Literal["ddp", "fsdp"], dtype: torch.dtype) -> nn.Module:
    """What to call in the model's place; the model itself where one process trains. dtype: that of the computation, in
    which FSDP2 gathers weights; it sums gradients in float32."""
    if not distributed.is_initialized():
        return model
    if strategy == "ddp":
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    mesh = init_device_mesh(next(model.parameters()).device.type, (distributed.get_world_size(),))
    # Autocast casts what goes in.
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    frozen = {p for p in model.parameters() if not p.requires_grad}
    net: Any = model.subject_net
    # Each block is gathered when it is needed, while the one before computes, and let go of again.
    for block in (*net.text_layers, *net.blocks):
        if any(p.requires_grad for p in block.parameters()):
            fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=frozen)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=frozen)
    return model


@contextlib.contextmanager
def accumulating(shared: nn.Module, last: bool) -> Iterator[None]:
    """Around forward and backward of a micro-batch: gradients are exchanged after the `last` alone, and with FSDP2 are
    whole on every rank until then."""
    if isinstance(shared, FSDPModule):
        shared.set_requires_gradient_sync(last)
    with shared.no_sync() if isinstance(shared, DistributedDataParallel) and not last else contextlib.nullcontext():
        yield


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean, in place. Collective call: every rank must make it."""
    if distributed.is_initialized():
        distributed.all_reduce(values)
        values /= distributed.get_world_size()
    return values


def list_of_ranks(items: list[Item], group: distributed.ProcessGroup | None = None) -> list[Item]:
    """Those of every rank, one rank after another. Collective call: every rank must make it."""
    if not distributed.is_initialized():
        return items
    by_rank: list[list[Item]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(by_rank, items, group)
    return [item for one in by_rank for item in one]


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether it is so on at least one rank. Collective call: every rank must make it."""
    return bool(mean_over_ranks(torch.tensor(float(flag), device=device)).item())


def gathered(tensor: Tensor) -> Tensor:
    """The whole tensor, on the CPU. Collective call: every rank must make it."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu().clone()


def of_first_rank(value: Item | None) -> Item:
    """What the first rank has, a plain object. Collective call: every rank must make it."""
    held = [value]
    if distributed.is_initialized():
        distributed.broadcast_object_list(held)
    return cast(Item, held[0])


def like(whole: Tensor | None, example: Tensor) -> Tensor:
    """The first rank's `whole`, placed and split as `example` is. Collective call: every rank must make it."""
    if whole is None:
        whole = torch.empty(example.shape, dtype=example.dtype)
    sent = whole.to(example.device, example.dtype)
    if isinstance(example, DTensor):
        return distribute_tensor(sent, example.device_mesh, example.placements)
    if distributed.is_initialized():
        distributed.broadcast(sent, 0)
    return sent


def gathered_by_name(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Whole tensors, on the first rank's CPU; the others have none. Collective call: every rank must make it."""
    first, whole = rank_and_count()[0] == 0, {}
    for name, tensor in named:
        found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if first:
            whole[name] = found.detach().to("cpu", copy=True)
    return whole


def own_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What this rank writes and reads of a state: its shards of what is split, and an equal part of what all have."""
    rank, _ = rank_and_count()
    owners = _owners(state)
    return {name: tensor for name, tensor in state.items() if owners.get(name, rank) == rank}


def send_parts(state: Mapping[str, Tensor]) -> None:
    """Makes what all have whole the same everywhere: that of the rank whose `own_part` it is in. Collective call: every
    rank must make it."""
    if not distributed.is_initialized():
        return
    for name, owner in _owners(state).items():
        sent = state[name].to("cuda") if distributed.get_backend() == "nccl" else state[name]
        # gloo knows no float8.
        distributed.broadcast(sent.view(torch.uint8) if sent.itemsize == 1 else sent, owner)
        state[name].copy_(sent)


def _owners(state: Mapping[str, Tensor]) -> dict[str, int]:
    """The rank of each tensor that is not split, so that all have about as many bytes."""
    whole = {name: tensor.nbytes for name, tensor in state.items() if not isinstance(tensor, DTensor)}
    before = itertools.accumulate(whole.values(), initial=0)
    total, (_, ranks) = sum(whole.values()), rank_and_count()
    return {name: start * ranks // total for name, start in zip(whole, before, strict=False)}
