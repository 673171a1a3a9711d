"""A function on two connected processes (gloo), which start at once: they are forked from a server that has torch."""

import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from tests.processes import FORKED, connected, free_port


def on_two_processes(work: Callable[..., Any], *args: object) -> list[Any]:
    """What work returns on each process, in order of rank, or the exception that ended the process.

    Work, arguments and results are pickled.
    """
    port, results = free_port(), []
    for rank in (0, 1):
        result, end = FORKED.Pipe(duplex=False)
        FORKED.Process(target=_connected, args=(end, rank, port, work, args), daemon=True).start()
        end.close()
        results.append(result)
    assert all(result.poll(100) for result in results), "a process hangs"
    return [result.recv() for result in results]


def _connected(end: Connection, rank: int, port: int, work: Callable[..., Any], args: tuple[object, ...]) -> None:
    os.environ.update(connected(rank, port))
    torch.set_num_threads(1)
    try:
        end.send(work(*args))
    except Exception as error:
        end.send(error)
