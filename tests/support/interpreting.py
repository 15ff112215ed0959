"""Triton's interpreter with less to do, as a plugin of pytest (`-p interpreting`) or before a script is run.

The interpreter replaces the functions of `triton.language` whenever one compiled function calls another, and looks
through everything in there for what to replace: half of its time. Here it looks once.
"""

import functools
import inspect
import runpy
import sys
import warnings
from pathlib import Path

import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def names_of_builtins(package):
    """Everything in a module or class of Triton that the interpreter replaces."""
    return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def patch_builtin(package, builder, scope):
    for name in names_of_builtins(package):
        member = getattr(package, name)
        if tl.core.is_builtin(member):  # not replaced yet
            interpreter._patch_attr(package, name, member, builder, scope)


interpreter._patch_builtin = patch_builtin


def run_script(path):
    """Run a script as `python PATH` with the arguments of this process, without warnings."""
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")
