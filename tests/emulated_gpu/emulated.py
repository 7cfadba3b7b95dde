"""A GPU that needs no GPU: the device of device.cpp, known to torch and DeepSpeed.

    import emulated
    emulated.install()  # from here on the accelerator of this process

It raises where CUDA raises, and counts what costs time on a GPU. It stays in a process
for good: install it in a process of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shutil
import traceback
import types
from collections import Counter
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.abstract_accelerator import DeepSpeedAccelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch.utils import cpp_extension

NAME = "emulated"
"""Of the device and of its communication backend."""
SOURCE = Path(__file__).parent / "device.cpp"
COMPILER = os.environ.get("CXX", "g++")


def missing() -> str | None:
    """Why it cannot be built here; None: it can."""
    for tool in (COMPILER, "ninja"):
        if shutil.which(tool) is None:
            return f"the emulated GPU needs {tool}"
    return None


def build() -> types.ModuleType:
    """The extension, compiled where this source and this torch have not been yet."""
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions").expanduser()
    name, directory = f"dsvae_{NAME}", root / f"dsvae_{NAME}_{key}"
    directory.mkdir(parents=True, exist_ok=True)
    library = directory / f"{name}.so"
    with open(directory / "ours", "w") as lock:
        # torch's own lock would outlive a process that is killed.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (directory / "done").exists():
            (directory / "lock").unlink(missing_ok=True)
            flags = ["-O0", "-g0"]
            cpp_extension.load(name, [str(SOURCE)], flags, build_directory=str(directory))
            (directory / "done").touch()
    spec = importlib.util.spec_from_file_location(name, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def install() -> None:
    """Makes it the accelerator of this process, for torch and for DeepSpeed."""
    global extension
    extension = build()
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, device_module())
    torch.utils.generate_methods_for_privateuse1_backend()
    dist.Backend.register_backend(NAME, group, devices=[NAME])
    set_accelerator(Accelerator())


def group(store: dist.Store, rank: int, size: int, timeout) -> dist.Backend:
    """A process group that takes tensors of this device alone, as NCCL's does."""
    return extension.group(dist.ProcessGroupGloo(store, rank, size, timeout), rank, size)


def device_module() -> types.ModuleType:
    """`torch.emulated`, as far as torch asks for it."""
    module = types.ModuleType(f"torch.{NAME}")

    def index(device=None):
        given = device if isinstance(device, int) else torch.device(device or NAME).index
        return torch.accelerator.current_device_index() if given is None else given

    def generator(device=None):
        return extension.default_generator(index(device))

    def manual_seed_all(seed):
        for number in range(extension.devices):
            generator(number).manual_seed(seed)

    module.is_available = lambda: True
    module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.device_count = lambda: extension.devices
    module.current_device = index
    module.set_device = torch.accelerator.set_device_index
    module.device = lambda device: torch.accelerator.device_index(index(device))
    module.synchronize = torch.accelerator.synchronize
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    module.manual_seed_all = manual_seed_all
    module.get_rng_state = lambda device=None: generator(device).get_state()
    module.set_rng_state = lambda state, device=None: generator(device).set_state(state)
    module.default_generator = generator
    return module


class Accelerator(CPU_Accelerator):
    """What DeepSpeed asks for: a GPU's answers, but the compiled operations of a CPU."""

    def __init__(self):
        self._name = self._communication_backend_name = NAME
        self._compile_backend = "inductor"

    def _no(self):
        return False

    is_synchronized_device = use_host_timers = _no
    resolves_data_dependency = handles_memory_backpressure = _no

    def device_name(self, device_index=None):
        return NAME if device_index is None else f"{NAME}:{device_index}"

    def device(self, device_index=None):
        return torch.accelerator.device_index(device_index)

    def set_device(self, device_index):
        torch.accelerator.set_device_index(device_index)

    def current_device(self):
        return torch.accelerator.current_device_index()

    def current_device_name(self):
        return self.device_name(self.current_device())

    def device_count(self):
        return torch.accelerator.device_count()

    def synchronize(self, device_index=None):
        torch.accelerator.synchronize(device_index)

    def set_rng_state(self, new_state, device_index=None):
        torch.emulated.set_rng_state(new_state, device_index)

    def get_rng_state(self, device_index=None):
        return torch.emulated.get_rng_state(device_index)

    def manual_seed(self, seed):
        torch.emulated.default_generator().manual_seed(seed)

    def manual_seed_all(self, seed):
        torch.emulated.manual_seed_all(seed)

    def initial_seed(self):
        return torch.emulated.default_generator().initial_seed()

    def default_generator(self, device_index):
        return torch.emulated.default_generator(device_index)

    Stream = property(lambda self: partial(torch.Stream, device=NAME))
    Event = property(lambda self: event)

    def stream(self, stream):
        return stream

    def current_stream(self, device_index=None):
        return torch.accelerator.current_stream(device_index)

    default_stream = current_stream

    def memory_allocated(self, device_index=None):
        return torch.accelerator.memory_allocated(device_index)

    memory_cached = memory_reserved = memory_allocated

    def max_memory_allocated(self, device_index=None):
        return torch.accelerator.max_memory_allocated(device_index)

    max_memory_cached = max_memory_reserved = max_memory_allocated

    def memory_stats(self, device_index=None):
        return torch.accelerator.memory_stats(device_index)

    def reset_peak_memory_stats(self, device_index=None):
        torch.accelerator.reset_peak_memory_stats(device_index)

    reset_max_memory_allocated = reset_max_memory_cached = reset_peak_memory_stats

    def is_fp16_supported(self):
        return True

    def on_accelerator(self, tensor):
        return tensor.device.type == NAME

    def create_op_builder(self, class_name):
        # The shared memory of DeepSpeed's CPU collectives is nothing for a GPU.
        return None if "Comm" in class_name else super().create_op_builder(class_name)

    _torch_pins_host_memory = True
    pin_memory = DeepSpeedAccelerator.pin_memory
    _torch_pin_memory = DeepSpeedAccelerator._torch_pin_memory
    _torch_empty_pinned = DeepSpeedAccelerator._torch_empty_pinned


def _make(dtype):
    return property(lambda self: partial(torch.tensor, dtype=dtype, device=NAME))


for name, dtype in {
    "BFloat16": torch.bfloat16,
    "Byte": torch.uint8,
    "Double": torch.double,
    "Float": torch.float,
    "Half": torch.half,
    "Int": torch.int,
    "Long": torch.long,
}.items():
    setattr(Accelerator, f"{name}Tensor", _make(dtype))


def event(enable_timing=False, **other):
    """As `torch.cuda.Event` is called."""
    return torch.Event(NAME, enable_timing=enable_timing)


@contextlib.contextmanager
def counting(owners: tuple[str, ...] = ()):
    """Counts what happens in the block: a Counter, filled when the block is left.

    The keys are `kernels OPERATION`, `wait REASON`, `copies` and `bytes` with a
    direction and the kind of host memory, and `collectives NAME`. With `owners`,
    directories of packages, the keys `waits at FILE:LINE (REASON)` say which line of them
    has waited.
    """
    counts = Counter()

    def note(reason):
        stack = traceback.extract_stack()
        ours = [frame for frame in stack if frame.filename.startswith(owners)] or stack
        counts[f"waits at {ours[-1].filename}:{ours[-1].lineno} ({reason})"] += 1

    extension.observe_waits(note if owners else None)
    extension.reset_counts()
    try:
        yield counts
    finally:
        counts.update(extension.counts())
        extension.observe_waits(None)


def total(counts: Counter, kind: str) -> int:
    """The sum of the counts of a kind: kernels, wait, copies, bytes, collectives."""
    return sum(number for key, number in counts.items() if key.startswith(kind + " "))


if __name__ == "__main__":
    build()
