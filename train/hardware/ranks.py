"""The processes ("ranks") of a run: one, or those that torchrun or `--processes` started.

Each computes its rows of every batch. Only the first writes, prints and holds the folder's lock. Between them is
torch's own engine: DistributedDataParallel, or with `--shard` FSDP2.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from pastkey.errors import InputError

from .device import Device, layers_of

# While the first process writes a large checkpoint, the others wait. A dead process is noticed without this.
_LONGEST_WAIT: Final = timedelta(hours=2)
_READY, _ENDED = "pastkey/ready", "pastkey/ended"  # keys of the store


@dataclass(frozen=True)
class Ranks:
    """This process's place among the processes of a run."""

    rank: int = 0
    world: int = 1  # processes on all machines
    local_rank: int = 0  # among those of this machine
    store: Any = None  # torch's, that all processes share; None for a run of one process

    @classmethod
    def join(cls) -> Ranks:
        """Returns the place that torchrun's variables name, or that of a run of one process."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        store, rank, world = next(rendezvous("env://", timeout=_LONGEST_WAIT))
        return cls(rank, world, int(os.environ.get("LOCAL_RANK", rank)), store)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def require_divides(self, rows: int) -> None:
        """Raises InputError unless each process gets the same number of the `rows` of a batch."""
        if rows % self.world:
            possible = [str(number) for number in range(2, rows + 1) if rows % number == 0 and number <= self.world]
            raise InputError(
                f"a batch of {rows} rows is not divided evenly among {self.world} processes: "
                f"start {' or '.join(possible) or '1'}, or begin a run whose --batch-size is a multiple of {self.world}"
            )

    # --- before the processes compute -----------------------------------------------------------------------------
    def tell(self, content: Mapping[str, Any]) -> None:
        """Sends the preparations of the first process to the others."""
        if self.store is not None:
            self.store.set(_READY, json.dumps(content))

    def told(self) -> dict[str, Any]:
        """Waits for the first process without a limit, and returns its message."""
        assert self.store is not None
        while not self.store.check([_READY]):
            if self.store.check([_ENDED]):
                raise SystemExit(2)  # the first process failed, and has said why
            time.sleep(0.1)  # a wait in the store could not be interrupted
        content: dict[str, Any] = json.loads(self.store.get(_READY))
        return content

    @contextlib.contextmanager
    def connected(self, device: Device) -> Iterator[None]:
        """Connects the processes: by NCCL on CUDA, or else gloo."""
        if self.store is None:
            yield
            return
        dist.init_process_group(
            "nccl" if device.is_cuda else "gloo",
            store=self.store,
            rank=self.rank,
            world_size=self.world,
            timeout=_LONGEST_WAIT,
            device_id=device.torch_device if device.is_cuda else None,
        )
        yield
        dist.destroy_process_group()  # not after an error: it would wait for a dead process

    @contextlib.contextmanager
    def ending_together(self) -> Iterator[None]:
        """Lets one process say why the run ended: the first one that fails. The others exit silently."""
        try:
            yield
        except BaseException:
            if self.store is not None:
                _speak_to_the_end()
                if not self._fails_first():
                    raise SystemExit(2) from None
            raise

    def lost(self, error: BaseException) -> bool:
        """Whether this process failed because another is gone, or torchrun stopped it for that reason.

        gloo's errors have no separate class.
        """
        gone = isinstance(error, SystemExit | dist.DistError)
        lost = self.world > 1 and (gone or (isinstance(error, RuntimeError) and "by peer" in str(error)))
        if lost:
            _speak_to_the_end()
        return lost

    def _fails_first(self) -> bool:
        assert self.store is not None
        try:
            return bool(self.store.add(_ENDED, 1) == 1)
        except RuntimeError:  # the store's own process is gone
            return True

    # --- computing ------------------------------------------------------------------------------------------------
    def spread(self, model: nn.Module, device: Device, *, shard: bool) -> nn.Module:
        """Puts the model on the device and returns the module for the training's forward passes.

        That is the model itself, or DistributedDataParallel around it. With `shard`, each weight is divided among the
        processes in place, and gathered layer by layer (FSDP2).
        """
        device.compile(model)
        if shard:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(device.torch_device.type, (self.world,))
            for layer in layers_of(model):
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            return model.to(device.torch_device)
        model.to(device.torch_device)
        if self.world == 1:
            return model
        ids = [device.torch_device] if device.is_cuda else None
        return DistributedDataParallel(model, device_ids=ids, forward_sync_buffers=False)

    @contextlib.contextmanager
    def reducing(self, spread: nn.Module, last: bool) -> Iterator[None]:
        """In this context, a backward pass sums gradients over the processes: of accumulated ones only the last."""
        with contextlib.ExitStack() as stack:
            if isinstance(spread, DistributedDataParallel) and not last:
                stack.enter_context(spread.no_sync())
            yield

    def mine(self, tensor: Tensor) -> Tensor:
        """Returns this process's rows of a batch."""
        return tensor[self.rank :: self.world]

    def total(self, tensor: Tensor) -> Tensor:
        """Returns the sum of a tensor over all processes."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def whole(self, tensor: Tensor) -> Tensor:
        """Returns the whole of a tensor that may be divided among the processes. All must call it."""
        if self.world > 1:  # the import needs a second
            from torch.distributed.tensor import DTensor

            if isinstance(tensor, DTensor):
                full: Tensor = tensor.full_tensor()
                return full
        return tensor

    def gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns whole tensors on the CPU, to the first process only, though all must call it.

        One tensor is gathered at a time, so that only the first process's memory must hold all.
        """
        found = {}
        for name, tensor in tensors.items():
            whole = self.whole(tensor)
            if self.first:
                found[name] = whole.detach().cpu()
        return found

    def divided(self, model: nn.Module, moments: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Divides moments, named `parameter.moment`, among the processes as their parameters are."""
        if self.world == 1:
            return moments
        from torch.distributed.tensor import DTensor, distribute_tensor

        parameters = dict(model.named_parameters())
        divided = dict(moments)
        for name, moment in moments.items():
            parameter = parameters.get(name.rpartition(".")[0])
            if isinstance(parameter, DTensor) and moment.shape == parameter.shape:
                divided[name] = distribute_tensor(
                    moment.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
                )
        return divided


def _speak_to_the_end() -> None:
    """Ignores SIGTERM, which torchrun sends when a process is gone: the one that says why would be stopped before."""
    if threading.current_thread() is threading.main_thread():  # Python handles signals only in that thread
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
