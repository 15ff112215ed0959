"""Triton's interpreter with less to do, as a plugin of pytest (`-p interpreting`) or before a script is run.

The interpreter replaces the functions of `triton.language` before every call of a compiled function, also by another
one, and looks through everything in there for what to replace: half of its time. Here it looks once, and replaces what
is not replaced yet.
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


@functools.cache
def languages(function):
    """Triton's modules among what a compiled function can name."""
    return [value for value in function.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)]


def patch_lang(function):
    is_done = all(language.static_range is not STATIC_RANGE for language in languages(function))
    return interpreter._LangPatchScope() if is_done else PATCH_LANG(function)


STATIC_RANGE, PATCH_LANG = tl.static_range, interpreter._patch_lang
interpreter._patch_builtin, interpreter._patch_lang = patch_builtin, patch_lang


def run_script(path):
    """Run a script as `python PATH` with the arguments of this process, without warnings."""
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")
