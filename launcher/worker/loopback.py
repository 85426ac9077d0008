"""The meeting point of one machine's processes, where no other machine can reach it.

torchrun's own meeting points listen on every interface (torch 2.13, `TCPStore` binds the wildcard address, and no
option names another). It takes others from the entry points of installed packages, and a `TCPStore` takes a socket
that listens already. pyproject.toml names this one.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Final

from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous.api import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

ADDRESS: Final = "127.0.0.1"


class LoopbackRendezvous(StaticTCPRendezvous):
    """torchrun's static rendezvous with one machine in it, on a free port of the loopback."""

    def get_backend(self) -> str:
        """Name under which torchrun knows it."""
        return "loopback"

    def next_rendezvous(self) -> RendezvousInfo:
        """The store that the agent and its processes share; the same one after a restart."""
        if self._store is None:
            listener = socket.create_server((ADDRESS, 0))
            self.master_port = listener.getsockname()[1]
            self._store = TCPStore(
                ADDRESS,
                self.master_port,
                world_size=1,
                is_master=True,
                timeout=self.timeout,
                multi_tenant=True,
                master_listen_fd=listener.detach(),  # the store closes it
            )
        store = PrefixStore(self.run_id, self._store)
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(ADDRESS, self.master_port))


def rendezvous() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """What torchrun asks the entry point for: a function that makes the meeting point of a run.

    Raises:
        ValueError: By that function, when the run is of several machines.
    """

    def create(parameters: RendezvousParameters) -> RendezvousHandler:
        if parameters.max_nodes != 1:
            raise ValueError(f"{parameters.max_nodes} machines can't meet on the loopback of one")
        seconds = int(parameters.get("timeout", 600))
        return LoopbackRendezvous(ADDRESS, 0, 0, 1, parameters.run_id, seconds)

    return create
