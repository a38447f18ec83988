"""Whether the ranks reach each other at the addresses that gloo will give them."""

import ipaddress
import json
import os
import socket
import time
from contextlib import suppress
from typing import Any

from partial_fc.parallel import launcher


def check_addresses(store: Any, rank_here: int, ranks: int) -> None:
    """Ends all ranks with one message where gloo would tell another machine an address that leads nowhere there.

    It takes the one that the machine's own name resolves to: on Debian 127.0.1.1, by /etc/hosts. Gloo itself would try
    for half a minute, and name no reason. Each rank compares its machine with that of rank 0.
    store: the torch.distributed.Store where all `ranks` meet.
    """
    mine = {"machine": _machine(), "name": socket.gethostname(), "address": _address_of_gloo()}
    if rank_here == 0:
        store.set("rank 0's machine", json.dumps(mine))
    first = json.loads(store.get("rank 0's machine"))
    if first["machine"] != mine["machine"]:
        for rank_there, one in ((0, first), (rank_here, mine)):
            if one["address"] is not None and ipaddress.ip_address(str(one["address"]).partition("%")[0]).is_loopback:
                store.compare_set(  # the first one: all say the same
                    "what is wrong with addresses",
                    "",
                    f"rank {rank_there} is on {one['name']}, a name that resolves to {one['address']} there, which "
                    "leads nowhere from another machine: set GLOO_SOCKET_IFNAME, on all machines, to the network card "
                    "between them, as GLOO_SOCKET_IFNAME=eth0 (NCCL_SOCKET_IFNAME is the same for NCCL), or correct "
                    "/etc/hosts",
                )
    if store.add("ranks with a good address", 1) == ranks:
        store.compare_set("what is wrong with addresses", "", "nothing")
    wrong = store.get("what is wrong with addresses").decode()
    if wrong != "nothing":
        if rank_here == 0:
            time.sleep(1)  # it may hold the store, where the others read this
        launcher.end(wrong)


def _machine() -> list:
    """What differs between machines, and between containers with networks of their own on one."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return [file.read(), os.stat("/proc/self/ns/net").st_ino]
    except OSError:  # not Linux
        return [socket.gethostname()]


def _address_of_gloo() -> str | None:
    """The address that gloo gives to the other ranks, found as it finds it; None where it is told the network card."""
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return None
    with suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(socket.gethostname(), 0, type=socket.SOCK_STREAM):
            with suppress(OSError), socket.socket(family, kind, protocol) as tried:
                tried.bind(address)
                return str(address[0])
    return "127.0.0.1"
