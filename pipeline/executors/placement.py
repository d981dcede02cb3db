"""Which workers fit on which machines: arithmetic over plain data, without Ray."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from ...storage.errors import ClusterTooSmall

_SLACK = 1e-9  # 1 GPU holds ten workers of 0.1, whatever the rounding


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One machine: CPUs and GPUs that may be handed out, main memory in bytes."""

    cpus: float
    gpus: float
    memory: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What one worker holds."""

    cpus: float
    gpus: float

    def __str__(self) -> str:
        return f"{self.cpus:g} CPU and {self.gpus:g} GPU"


def cpu_count() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def this_machine() -> Node:
    """Describe this machine as a Ray started here would, nearly."""
    import torch

    return Node(
        cpus=float(cpu_count()),
        gpus=float(torch.cuda.device_count()),
        memory=int(psutil.virtual_memory().available),
    )


def slots_on(node: Node, demand: Demand) -> int:
    """Return how many workers of ``demand`` one machine holds."""
    by_cpu = math.floor(node.cpus / demand.cpus + _SLACK)
    return by_cpu if not demand.gpus else min(by_cpu, math.floor(node.gpus / demand.gpus + _SLACK))


def slots(nodes: Sequence[Node], demand: Demand) -> int:
    """Return how many workers of ``demand`` all machines hold together."""
    return sum(slots_on(node, demand) for node in nodes)


def memory_per_worker(nodes: Sequence[Node], demand: Demand) -> int:
    """Return the bytes one worker has on the machine where that is least; 0 where none fits."""
    shares = [node.memory // held for node in nodes if (held := slots_on(node, demand))]
    return min(shares, default=0)


def describe(nodes: Sequence[Node]) -> str:
    """Return one phrase on what the machines have."""
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    most = max(nodes, key=lambda node: (node.gpus, node.cpus), default=Node(cpus=0, gpus=0, memory=0))
    return (
        f"{len(nodes)} node(s) with {cpus:g} CPU and {gpus:g} GPU, "
        f"the largest {most.cpus:g} CPU and {most.gpus:g} GPU"
    )


def check_feasible(nodes: Sequence[Node], demand: Demand) -> None:
    """Refuse a demand that no machine can ever hold: Ray would wait for it without end.

    Raises:
        ClusterTooSmall: No single machine has the CPUs and GPUs of one worker.
    """
    if slots(nodes, demand) > 0:
        return
    if demand.gpus > max((node.gpus for node in nodes), default=0):
        remedy = "lower --gpus-per-actor (0 computes on CPUs) or use a cluster with GPUs"
    else:
        remedy = "lower --cpus-per-actor or use larger nodes"
    raise ClusterTooSmall(f"a worker needs {demand} on one node; the cluster has {describe(nodes)}; {remedy}")
