"""Same bits everywhere: seeds keyed by (seed, step), thread counts, and a fingerprint of the machine.

Randomness of a step must not depend on how the process got there, or a replay could only start at
step 0. So the generators are reseeded before every step from a hash of (seed, purpose, step).
"""

from __future__ import annotations

import hashlib
import os
import platform
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import nn

from ..storage.errors import DeviceMissing


def derived_seed(seed: int, purpose: str, step: int = 0) -> int:
    """Return a 63-bit seed that depends on all three arguments."""
    text = f"{seed}/{purpose}/{step}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def seed_everything(value: int) -> None:
    """Seed the global generators of torch (all devices), numpy and random."""
    # torch.manual_seed queues a call (with a stack trace) for devices that were never used; a run
    # seeds before every step, so only devices in use are seeded.
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)
    np.random.seed(value & 0xFFFFFFFF)
    random.seed(value)


def generator_states() -> tuple[Any, ...]:
    """Return the states of the global generators; two are equal when nothing was drawn between them."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    tensors = [torch.get_rng_state(), *(torch.cuda.get_rng_state(i) for i in devices)]
    kind, keys, place, *rest = np.random.get_state()
    return (
        *(t.numpy().tobytes() for t in tensors),
        kind,
        np.asarray(keys).tobytes(),
        place,
        *rest,
        random.getstate(),
    )


def host_states() -> tuple[Any, ...]:
    """Return the states of the generators of the host alone; see ``generator_states``."""
    kind, keys, place, *rest = np.random.get_state()
    torch_state = torch.get_rng_state().numpy().tobytes()
    return torch_state, kind, np.asarray(keys).tobytes(), place, *rest, random.getstate()


def generators() -> tuple[Any, ...]:
    """Return what ``put_generators`` gives the global generators back; of devices in use alone."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    states = [torch.cuda.get_rng_state(i) for i in devices]
    return torch.get_rng_state(), np.random.get_state(), random.getstate(), states


def put_generators(kept: tuple[Any, ...]) -> None:
    """Give the global generators the states that ``generators`` returned."""
    torch.set_rng_state(kept[0])
    np.random.set_state(kept[1])
    random.setstate(kept[2])
    for index, state in enumerate(kept[3]):
        torch.cuda.set_rng_state(state, index)


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Leave the global generators as they were: for work beside the training step."""
    states = (torch.get_rng_state(), np.random.get_state(), random.getstate())
    devices = [torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())]
    try:
        yield
    finally:
        put_generators((*states, devices))


def prepare_process(threads: int) -> None:
    """Fix everything that changes bits: threads, algorithms, TF32, compilation.

    Must be called in every process that computes, before its first tensor operation matters.
    Operations that have no deterministic form raise an error of torch that names them.

    Args:
        threads: CPU threads of torch, the same in every process of a run.
    """
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Filling fresh memory guards against reading it; it costs time and changes no result here.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    run_uncompiled()


def run_uncompiled() -> None:
    """Have everything that ``torch.compile`` wraps run as it is written.

    Compiled kernels differ in last bits from those of another compilation (other shapes, another machine), take
    one derivative alone, and pass hooks by: no replay could follow them.
    """
    torch.compiler.set_stance("force_eager")


def compiled_parts(model: nn.Module) -> list[str]:
    """Return the names of the modules that are compiled."""
    return [
        name or type(model).__name__
        for name, module in model.named_modules()
        if module._compiled_call_impl is not None or hasattr(module, "_torchdynamo_orig_callable")
    ]


@contextmanager
def _kept_stance() -> Iterator[None]:
    """Give what is compiled back its own way to run."""
    if "torch._dynamo" in sys.modules:
        with torch.compiler.set_stance("default"):
            yield
        return
    try:
        yield
    finally:
        if "torch._dynamo" in sys.modules:  # it was loaded inside: nothing had been chosen before
            torch.compiler.set_stance("default")


@contextmanager
def restored_process() -> Iterator[None]:
    """Give the caller's process back as it was: generators, threads, torch's global switches.

    A run uses the process it is called from (all of it with the serial executor, the survey of the
    recipe always); the user's script must not notice.
    """
    with restored_switches(), preserved_generators():
        yield


@contextmanager
def restored_switches() -> Iterator[None]:
    """Do `restored_process` but for the generators, which a training of the caller's own moves."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    switches = (
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_tf32,
    )
    try:
        with _kept_stance():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = filling  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = switches[:2]
        torch.backends.cuda.matmul.allow_tf32 = switches[2]


def resolve_device(device: str) -> torch.device:
    """Turn ``auto``, ``cpu`` or ``cuda`` into a device.

    Raises:
        DeviceMissing: ``cuda`` was asked for and this process sees no GPU.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise DeviceMissing(
            "device 'cuda' was asked for and this process sees 0 GPUs; "
            "use --device cpu, or give each actor one with --gpus-per-actor 1"
        )
    if device == "auto":
        device = "cuda" if available else "cpu"
    return torch.device(device)


def fingerprint(device: torch.device) -> dict[str, Any]:
    """Return what may change the bits of a training run between two machines."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": metadata.version("numpy"),
        "threads": torch.get_num_threads(),
        "mkldnn": torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
    }


def fingerprint_differences(recorded: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Say what differs between two fingerprints, for the message of a diverged replay."""
    lines = [
        f"{key}: recorded {recorded.get(key)!r}, here {here.get(key)!r}"
        for key in sorted(set(recorded) | set(here))
        if recorded.get(key) != here.get(key)
    ]
    return (
        "; ".join(lines)
        if lines
        else (
            "the environments are the same (did the recipe or its data change, or does it keep a state outside of the "
            "model's buffers and the optimizer?)"
        )
    )
