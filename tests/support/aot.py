"""Triton kernels compiled without a GPU, exactly as their launchers would launch them, and what they became.

with ahead_of_time(90) as compiled:
    attend(...)                     # on CPU tensors: nothing runs, the output is garbage
compiled[0].name, compiled[0].usage, list(compiled[0].loops())
"""

import collections
import contextlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
HAS_TOOLS = all((TOOLS / name).is_file() for name in ("ptxas", "nvdisasm", "cuobjdump"))
LANES = 32


class NoDevice:
    """As much of a GPU driver as a launch that only compiles asks for."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, LANES)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch

    def get_current_stream(self, device):
        return 0


@contextlib.contextmanager
def ahead_of_time(capability):
    """Within, launches compile for this compute capability and are recorded, but nothing is run."""
    compiled = []
    run = triton.JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append(Compiled(self.fn.__name__, kernel))
        return kernel

    driver.set_active(NoDevice(capability))
    triton.JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        triton.JITFunction.run = run
        driver.set_active(None)  # which is how it was: found when it is asked for


@dataclass(frozen=True)
class Compiled:
    """A kernel for one GPU, and its machine code."""

    name: str
    kernel: object

    @property
    def ptx(self):
        return self.kernel.asm["ptx"]

    @property
    def warps(self):
        return self.kernel.metadata.num_warps

    @property
    def shared(self):
        """Bytes of shared memory of a program."""
        return self.kernel.metadata.shared

    @cached_property
    def usage(self):
        """Registers, and bytes of stack, of each thread."""
        text = self._tool("cuobjdump", "-res-usage")
        registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text).groups()
        return int(registers), int(stack) + int(local)

    @cached_property
    def instructions(self):
        """All of them, with labels among them, as `(is_label, text)`."""
        found = []
        for line in self._tool("nvdisasm", "-c").splitlines():
            label = re.match(r"\s*(\.L_x?_?\w+):", line)
            instruction = re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
            if label:
                found.append((True, label.group(1)))
            elif instruction:
                found.append((False, re.sub(r"^@!?U?P\w+\s+", "", instruction.group(1).strip())))
        return found

    def loops(self):
        """Instructions of every loop, by kind."""
        labels = {text: index for index, (is_label, text) in enumerate(self.instructions) if is_label}
        for index, (_, text) in enumerate(self.instructions):
            target = re.match(r"BRA\S*\s+.*?(\.L_x?_?\w+)", text)
            start = labels.get(target.group(1), index) if target else index
            if start < index:
                body = [each for is_label, each in self.instructions[start : index + 1] if not is_label]
                yield_counts = collections.Counter(each.split()[0].split(".")[0] for each in body)
                yield yield_counts

    def _tool(self, name, *arguments):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.kernel.asm["cubin"])
            file.flush()
            return subprocess.run(
                [TOOLS / name, *arguments, file.name], capture_output=True, text=True, check=True
            ).stdout
