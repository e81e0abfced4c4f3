"""A CUDA device that is not there: PyTorch's CPU build with "cuda:0" computed on the CPU, and counted.

    python tests/pretend_cuda.py minigrao.py --model tiny --device cuda --steps 2   # any script and its flags
    python tests/pretend_cuda.py --gib 0.1 minigrao.py --model tiny --device cuda   # a card of 0.1 GiB

A small C++ extension, pretend_cuda.cpp, registers in the running CPU build what libtorch_cuda would. It is
compiled once against torch's own headers (some ten seconds) and kept in PRETEND_CUDA_BUILD, or in the
system's folder for temporary files. C++ then sees the device cuda:0 everywhere, so autograd, checkpointing,
Parameter.data, transformers' device_map, PEFT and bitsandbytes take the paths that they take on a GPU.

It raises as CUDA does: operands on different devices (a CPU tensor of 0 dimensions passes exactly where
CUDA's kernels take it as an argument, a CPU index where they move it), a CPU generator for a cuda tensor,
.numpy(), a misaligned attention bias, OutOfMemoryError beyond --gib, and anything that waits while a CUDA
graph is captured.

It counts, as "kind/operator":
    launch   operators that are no view and no allocation
    item     one number read by the host (.item(), bool(), float()): waits for the device
    d2h      copies to the host (.cpu(), .tolist()): wait
    h2d      copies from the host: from pageable memory, so they wait too
    shape    data-dependent shapes (nonzero, masked_select, indexing by booleans): wait
    atomic   sums whose order, and so whose last bits, differ from run to run
It keeps the sum of live storages: torch.cuda.memory_allocated, its peak, and what --gib bounds.

What it does not see: speed; kernels' own rounding, limits and bugs; operators that a CUDA build lacks; races
between streams; the context (0.3 to 0.5 GB), cuBLAS' workspaces and fragmentation; CUDA kernels of a
library's own, as bitsandbytes' are (computed by its CPU ones); whether the driver accepts a capture.
Attention and RMSNorm, one kernel each on CUDA, are stood in for by CPU kernels of the same shapes and the
same saved tensors.
"""

import argparse
import collections
import contextlib
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = [Path(__file__).with_name(name) for name in ("pretend_cuda.cpp", "pretend_cuda_kernels.h")]
WAITS = ("item", "d2h", "h2d", "shape")  # what keeps the host waiting for the device


def why_not():
    """Why the device cannot be pretended here -> one line, or None. Without importing torch."""
    if not (sys.platform == "linux" and shutil.which("g++")):
        return "the pretended CUDA device is compiled with g++ on Linux"
    if "+cpu" not in importlib.metadata.version("torch") and importlib.util.find_spec("nvidia"):
        return "the pretended CUDA device needs torch's CPU build: a CUDA build has the real one's code"
    return None


def build():
    """Compile the extension, once for each version of it and of torch -> path of the shared object."""
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent
    sources = b"".join(source.read_bytes() for source in SOURCES)
    key = hashlib.sha256(sources + importlib.metadata.version("torch").encode()).hexdigest()[:12]
    default = Path(tempfile.gettempdir()) / f"pretend_cuda-{os.getuid()}"
    folder = Path(os.environ.get("PRETEND_CUDA_BUILD", default))
    target = folder / f"pretend_cuda-{key}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    unfinished = target.with_suffix(f".{os.getpid()}.tmp")
    include = [f"-I{torch_folder}/include", f"-I{torch_folder}/include/torch/csrc/api/include"]
    libraries = [f"-L{torch_folder}/lib", "-ltorch_cpu", "-lc10", "-ltorch", f"-Wl,-rpath,{torch_folder}/lib"]
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-w", *include, str(SOURCES[0])]
    subprocess.run([*command, "-o", str(unfinished), *libraries], check=True)
    unfinished.replace(target)
    return target


class Device:
    """The pretended device: `counts()`, `live()` and `peak()` in bytes, `reset_peak()`."""

    def __init__(self, library):
        self.library = library
        for function in (library.pretend_live, library.pretend_peak, library.pretend_counts):
            function.restype = ctypes.c_int64
        self.live, self.peak = library.pretend_live, library.pretend_peak
        self.reset_peak = library.pretend_reset_peak

    def counts(self):
        """Everything counted so far: Counter of "kind/operator"."""
        buffer = ctypes.create_string_buffer(2**20)
        size = self.library.pretend_counts(buffer, ctypes.c_int64(len(buffer)))
        assert size <= len(buffer)
        found = collections.Counter()
        for line in buffer.value.decode().splitlines():
            name, n = line.rsplit("\t", 1)
            found[name] = int(n)
        return found

    def since(self, before):
        """What was counted since `before` = counts()."""
        return self.counts() - before


def kinds(counts):
    """Counts of operators summed by kind, with "waits", the sum of the kinds that keep the host waiting."""
    total = collections.Counter()
    for name, n in counts.items():
        kind = name.split("/")[0]
        total[kind] += n
        total["waits"] += n * (kind in WAITS)
    return total


# ------------------------------------------------------------------------------------------------------------
# Making torch believe


def install(gib: float = 0.0, capability: int = 86) -> Device:
    """Make torch believe in cuda:0. Call before torch is imported. gib: its memory, 0 for no bound."""
    assert "torch" not in sys.modules, "install() comes before import torch"
    library = load_library()
    library.pretend_device(ctypes.c_int64(int(gib * 2**30)), capability)
    import torch

    pretend_bitsandbytes(library)
    device = Device(library)
    pretend_runtime(torch.cuda, device, gib, capability)
    pretend_graphs(torch.cuda, library)
    return device


def load_library():
    """Load torch and the extension, and tell it what native_functions.yaml says of CUDA's kernels."""
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent
    for name in ("libc10.so", "libtorch_cpu.so", "libtorch.so"):
        with contextlib.suppress(OSError):
            ctypes.CDLL(str(torch_folder / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL)
    operators = torch_folder.parent / "torchgen/packaged/ATen/native/native_functions.yaml"
    for entry in re.split(r"\n(?=- func: )", operators.read_text(encoding="utf-8")):
        found = re.search(r"- func: ([\w.]+)\(", entry)
        if not found:
            continue
        name, _, overload = found[1].partition(".")
        if (
            "device_check: NoCheck" in entry
        ):  # TensorIterator's operators: a CPU scalar is a kernel's argument
            library.pretend_no_check(f"aten::{found[1]}".encode())
        if re.search(r"^    [\w, ]*\bCUDA\b[\w, ]*:", entry, re.M) or "structured_delegate:" in entry:
            library.pretend_register(f"aten::{name}".encode(), overload.encode())
    return library


def pretend_bitsandbytes(library):
    """bitsandbytes must not look for CUDA kernels: imported before CUDA is there, computed on the CPU."""
    import torch

    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return

    def on_host(operator):
        def host(x):
            return torch.ops.pretend_cuda.host(x) if isinstance(x, torch.Tensor) else x

        def kernel(*args, **kwargs):
            tensors = [x for x in [*args, *kwargs.values()] if isinstance(x, torch.Tensor)]
            if not all(x.is_cuda for x in tensors):
                raise RuntimeError(
                    f"bitsandbytes::{operator}: a CPU tensor beside cuda tensors [pretend_cuda]"
                )
            function = getattr(torch.ops.bitsandbytes, operator).default
            out = function(*map(host, args), **{name: host(x) for name, x in kwargs.items()})
            library.pretend_launch(f"bitsandbytes::{operator}".encode())
            if isinstance(out, tuple):
                return tuple(map(torch.ops.pretend_cuda.device, out))
            return torch.ops.pretend_cuda.device(out)

        return kernel

    for operator in ("quantize_4bit", "dequantize_4bit", "quantize_blockwise", "dequantize_blockwise"):
        torch.library.register_kernel(f"bitsandbytes::{operator}", "cuda", on_host(operator))


class Properties:
    """torch.cuda.get_device_properties, what is read of it."""

    name, multi_processor_count, gcnArchName = "pretended GPU", 24, ""
    max_threads_per_multi_processor, regs_per_multiprocessor, warp_size = 1536, 65536, 32


def pretend_runtime(cuda, device, gib, capability):
    """torch.cuda's Python functions, which ask the driver."""
    import torch

    Properties.major, Properties.minor = divmod(capability, 10)
    # transformers allocates all of it less 1.2 GiB at once, in advance, and asks for at least that.
    Properties.total_memory = max(int(gib * 2**30), 2 * 2**30) if gib else 8 * 2**30
    cuda._initialized = True
    constants = {
        "_lazy_init": None, "set_device": None, "synchronize": None, "empty_cache": None, "ipc_collect": None,
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0,
        "_is_in_bad_fork": False, "is_current_stream_capturing": False, "_exchange_device": 0,
        "_maybe_exchange_device": 0, "get_device_properties": Properties, "get_device_name": Properties.name,
        "get_device_capability": (Properties.major, Properties.minor), "get_arch_list": [f"sm_{capability}"],
        "manual_seed": None, "manual_seed_all": None, "current_stream": None,
    }  # fmt: skip
    for name, value in constants.items():
        setattr(cuda, name, lambda *_, value=value: value)
    for name in ("getDeviceCount", "getDevice", "exchangeDevice", "maybeExchangeDevice", "setDevice"):
        value = int(name == "getDeviceCount")
        setattr(torch._C, f"_cuda_{name}", lambda *_, value=value: value)
    cuda.default_generators = (torch.Generator(device="cuda"),)
    cuda.memory_allocated = cuda.memory_reserved = lambda _=None: device.live()
    cuda.max_memory_allocated = cuda.max_memory_reserved = lambda _=None: device.peak()
    cuda.reset_peak_memory_stats = lambda _=None: device.reset_peak()
    cuda.mem_get_info = lambda _=None: (Properties.total_memory - device.live(), Properties.total_memory)
    cuda.stream = lambda _: contextlib.nullcontext()


def pretend_graphs(cuda, library):
    """torch.cuda.CUDAGraph and torch.cuda.graph: kernels are kept with their operands, then replayed.

    As on a device, nothing that is written during the capture has happened, and whatever waits ends it. So a
    step that rebinds a name, where it should write into the tensor, replays the same position for ever.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    host = torch.ops.pretend_cuda.host

    class CUDAGraph(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.kernels, self.before = [], []

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            operands = {s.name: x for s, x in zip(operator._schema.arguments, args)} | kwargs
            for argument in operator._schema.arguments:
                if argument.alias_info and argument.alias_info.is_write:
                    for x in tree_leaves(operands.get(argument.name)):
                        self.before.append((x, host(x).clone()))
            results = operator(*args, **kwargs)
            fresh = [r.alias_info is None for r in operator._schema.returns]
            writes = any(r.alias_info and r.alias_info.is_write for r in operator._schema.returns)
            if any(fresh) or writes or not fresh:  # else a view, which is no kernel
                self.kernels.append((operator, args, kwargs, tree_leaves(results) if any(fresh) else []))
            return results

        def replay(self):
            for operator, args, kwargs, results in self.kernels:
                for old, new in zip(results, tree_leaves(operator(*args, **kwargs))):
                    if isinstance(old, torch.Tensor):
                        host(old).copy_(host(new))

        def reset(self):
            self.kernels.clear()

    @contextlib.contextmanager
    def graph(cuda_graph, pool=None, stream=None):
        library.pretend_capturing(True)
        try:
            with cuda_graph:
                yield
        finally:
            library.pretend_capturing(False)
            for x, value in reversed(cuda_graph.before):
                host(x).copy_(value)

    cuda.CUDAGraph, cuda.graph, cuda.graph_pool_handle = CUDAGraph, graph, lambda: (0, 0)


# ------------------------------------------------------------------------------------------------------------
# Running a command


class Phases:
    """What a command of this project counted while loading, in rollouts, and in steps without their rollouts.

    `found`: name -> list of Counters, one for each time. A step reaches from one line of the log to the
    next; the first, and the last with its evaluation, are left out, so --steps 3 has one.
    """

    def __init__(self, device):
        self.device, self.found = device, collections.defaultdict(list)
        self.rollouts, self.logged = collections.Counter(), None

    def __enter__(self):
        from engine.record import RunFolder
        from policy import Policy

        self.originals = [(Policy, "load"), (Policy, "generate"), (RunFolder, "log")]
        self.originals = [(owner, name, vars(owner)[name]) for owner, name in self.originals]
        load, generate, log = Policy.load, Policy.generate, RunFolder.log

        def counted_load(*args, **kwargs):
            before = self.device.counts()
            policy = load(*args, **kwargs)
            self.found["loading"].append(self.device.since(before))
            return policy

        def counted_generate(*args, **kwargs):
            before = self.device.counts()
            rollout = generate(*args, **kwargs)
            self.found["a rollout"].append(self.device.since(before))
            self.rollouts += self.found["a rollout"][-1]
            return rollout

        def counted_log(folder, line):
            now = self.device.counts() - self.rollouts
            if self.logged is not None and line["step"] > 1 and "eval/reward" not in line:
                self.found["a step without its rollout"].append(now - self.logged)
            log(folder, line)
            self.logged = self.device.counts() - self.rollouts

        Policy.load, Policy.generate, RunFolder.log = counted_load, counted_generate, counted_log
        return self

    def __exit__(self, *_):
        for owner, name, function in self.originals:
            setattr(owner, name, function)

    def report(self):
        """A line for each phase, the mean over its times, and for each operator that waits or is atomic."""
        lines = []
        for name, found in self.found.items():
            total = sum(found, collections.Counter())
            means = [f"{kind} {n / len(found):.1f}" for kind, n in sorted(kinds(total).items())]
            lines.append(f"{name} ({len(found)} x): {', '.join(means)}")
            for operator, n in total.most_common():
                if not operator.startswith("launch/"):
                    lines.append(f"    {operator:<60} {n / len(found):8.1f}")
        return "\n".join(lines)


def run(script, *flags):
    """Run a script of this project in this process, as from the command line -> its exit status."""
    argv, sys.argv = sys.argv, [script, *flags]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = argv
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--gib", type=float, default=0.0, help="memory of the device, GiB; 0: no bound")
    parser.add_argument("--capability", type=int, default=86, help="compute capability; 75 has no bf16")
    parser.add_argument("script")
    parser.add_argument("flags", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if reason := why_not():
        sys.exit(reason)
    device = install(options.gib, options.capability)
    sys.path.insert(0, str(Path(options.script).resolve().parent))
    with Phases(device) as phases:
        status = run(options.script, *options.flags)
    print(phases.report(), file=sys.stderr)
    print(f"peak of live tensors {device.peak() / 2**20:.1f} MiB", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
