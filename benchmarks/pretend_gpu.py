"""A GPU for machines that have none: tensors on it say so, and their numbers are computed on the CPU.

What PyTorch refuses on a GPU is refused here: an operation over tensors of two devices, and a tensor of a GPU as an
array. So code for a GPU runs from end to end, and a tensor left on the wrong device is found. PyTorch's own
FakeTensorMode says where tensors are, too, but has no numbers, and stops where code asks for one: the tokens of a
caption, the boxes above a score. Backward passes are not possible: autograd asks the driver for the GPU's threads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

_aten = torch.ops.aten
_MOVES = (_aten._to_copy, _aten.to, _aten.copy_)
"""What may see both devices at once."""
_INDEXES = (_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_)
"""What takes indices from the CPU, too."""


class OnGpu(torch.Tensor):
    """A tensor on the pretended GPU."""

    numbers: torch.Tensor

    @staticmethod
    def __new__(cls, numbers: torch.Tensor) -> OnGpu:
        with torch.inference_mode(False):  # in which a view of what was made before would be refused
            made: OnGpu = torch.Tensor._make_wrapper_subclass(
                cls,
                numbers.size(),
                strides=numbers.stride(),
                storage_offset=numbers.storage_offset(),
                dtype=numbers.dtype,
                device=torch.device("cuda:0"),
            )
        made.numbers = numbers
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch types it as of an instance
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _computed(func, args, kwargs or {})

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("a tensor on a GPU is no array: .cpu() first")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def pin_memory(self, *_: Any) -> torch.Tensor:
        raise RuntimeError("memory of a GPU cannot be pinned")

    def record_stream(self, stream: Any) -> None:
        pass


class _Mode(TorchDispatchMode):
    """Sees to tensors that are made, or moved, to the GPU."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _computed(func, args, kwargs or {})


def _computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    leaves, tree = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    here = [tensor for tensor in tensors if isinstance(tensor, OnGpu)]
    if here and func.overloadpacket not in _MOVES:
        # A number is taken from anywhere.
        others = tensors[:1] if func.overloadpacket in _INDEXES else tensors
        strangers = [tuple(t.shape) for t in others if t.dim() and not isinstance(t, OnGpu)]
        if strangers:
            raise RuntimeError(f"{func}: a tensor on the CPU among those on the GPU, of shape {strangers[0]}")
    devices = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    if devices:
        to_gpu = devices[0].type == "cuda"
    elif func is _aten.to.other:
        to_gpu = isinstance(args[1], OnGpu)
    else:
        to_gpu = isinstance(args[0], OnGpu) if func.overloadpacket is _aten.copy_ else bool(here)
    on_cpu = [
        leaf.numbers if isinstance(leaf, OnGpu) else torch.device("cpu") if isinstance(leaf, torch.device) else leaf
        for leaf in leaves
    ]
    given, named = tree_unflatten(on_cpu, tree)
    if to_gpu:
        named.pop("pin_memory", None)
    before = {id(tensor.numbers): tensor for tensor in here}

    def placed(found: Any) -> Any:
        if not to_gpu or not isinstance(found, torch.Tensor):
            return found
        return before[id(found)] if id(found) in before else OnGpu(found)

    return tree_map(placed, func(*given, **named))


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """In the block there is a GPU, as far as PyTorch's users can tell. How PyTorch itself is told, FakeTensorMode
    shows."""
    torch._C._ensureCUDADeviceGuardSet()
    lifts = torch._C._only_lift_cpu_tensors()  # so that torch.tensor moves to the GPU as everything else does
    torch._C._set_only_lift_cpu_tensors(True)
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "current_device": lambda: 0,
        "_lazy_init": lambda: None,
        "Stream": MagicMock,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": MagicMock,
        "synchronize": lambda device=None: None,
    }
    try:
        with contextlib.ExitStack() as pretended:
            for name, answer in answers.items():
                pretended.enter_context(patch.object(torch.cuda, name, answer))
            pretended.enter_context(patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor))
            pretended.enter_context(sdpa_kernel(SDPBackend.MATH))  # The others ask the driver about the GPU.
            pretended.enter_context(_Mode())
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(lifts)
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
