"""The launcher's settings in environment variables: which are supported, and gloo's network interface."""

import os
import socket
from ipaddress import ip_address

from accelerate.utils import is_torch_xla_available

from dia_diffusion.errors import InputError

OFF = ("false", "f", "0", "no", "n", "off")
DDP = "only DDP is supported, as by --multi_gpu; run `accelerate config` again or launch with another --config_file"


SETTINGS = {
    "ACCELERATE_USE_DEEPSPEED": (OFF, DDP),
    "ACCELERATE_USE_FSDP": (OFF, DDP),
    "ACCELERATE_USE_MEGATRON_LM": (OFF, DDP),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (OFF, DDP),
    "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": (("no",), DDP),
    # Each of these would be applied on top of the recipe's own setting.
    "ACCELERATE_DYNAMO_BACKEND": (("no",), "launch without --dynamo_backend and set `train.compile`"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (("1",), "unset it and set `train.accumulation`"),
    "ACCELERATE_MIXED_PRECISION": (("no", "bf16", "fp16"), "set `train.mixed_precision`"),
}
"""A variable that `accelerate launch` sets -> the values that are supported, in lower case, and what to do instead."""


def check_launch() -> None:
    """Raises InputError if the launcher requests something unsupported."""
    for variable, (supported, instead) in SETTINGS.items():
        value = os.environ.get(variable, "")
        if value and value.lower() not in supported:
            raise InputError(f"{variable} must be {supported[0]}, got {value}; {instead}")
    if is_torch_xla_available():
        raise InputError("USE_TORCH_XLA must be 0 where torch_xla is installed: TPUs are not supported")


def choose_gloo_interface() -> None:
    """Sets GLOO_SOCKET_IFNAME in a multi-machine launch if NCCL's interface is set or gloo's choice can't work.

    Gloo listens on the address that this machine's name resolves to. With Debian's /etc/hosts that is 127.0.1.1, which
    no other machine can connect to.

    Raises:
        InputError: it isn't clear which interface the other machines can connect to.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ or not _several_machines():
        return
    nccl, interfaces = os.environ.get("NCCL_SOCKET_IFNAME"), _interfaces()
    of_nccl = {name: address for name, address in interfaces.items() if nccl and _matches(name, nccl)}
    if not of_nccl and not _is_loopback(_address(socket.gethostname())):
        return
    candidates = of_nccl or interfaces
    local = _local_address(os.environ["MASTER_ADDR"])
    names = [name for name, address in candidates.items() if address == local] or list(candidates)
    if len(names) != 1 and not of_nccl:
        raise InputError(
            "GLOO_SOCKET_IFNAME must be the network interface that the other machines can connect to (lo if all "
            "processes run on this one): the address of this machine's name is a loopback address, and its interfaces "
            f"are {', '.join(names) or 'none'}"
        )
    os.environ["GLOO_SOCKET_IFNAME"] = names[0]


def _several_machines() -> bool:
    """Whether the launch has processes on other machines, judging by its variables."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    main = os.environ.get("MASTER_ADDR", "localhost")
    return processes > local and main != "localhost" and not main.startswith("127.")


def _address(host: str) -> str | None:
    try:
        return str(socket.getaddrinfo(host, None)[0][4][0])
    except OSError:
        return None


def _is_loopback(address: str | None) -> bool:
    """Whether gloo would listen on the loopback interface, which it also does without an address."""
    return address is None or ip_address(address.partition("%")[0]).is_loopback


def _interfaces() -> dict[str, str]:
    """The IPv4 address of each interface that is up and connects to other machines."""
    import psutil  # slow to import, and only needed in multi-machine launches

    states = psutil.net_if_stats()
    return {
        name: address.address
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET and not _is_loopback(address.address) and states[name].isup
    }


def _matches(name: str, pattern: str) -> bool:
    """Whether NCCL_SOCKET_IFNAME selects an interface: "eth,ib" by prefix, "=eth0" exactly, "^docker" all but these."""
    names = pattern.removeprefix("^")
    exact = names.startswith("=")
    parts = tuple(names.removeprefix("=").split(","))
    return (name in parts if exact else name.startswith(parts)) != pattern.startswith("^")


def _local_address(peer: str) -> str | None:
    """The address from which this machine reaches another; nothing is sent."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((peer, 1))
            return str(probe.getsockname()[0])
    except OSError:
        return None
