"""The two places of vLLM that are changed: its configuration is checked, and layers of the plan get our backend."""

from __future__ import annotations

import errno
import functools
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import KvmixError
from ..plan import Plan
from .contract import check_version, missing_hooks

LOG = logging.getLogger("kvmix")
"""Logger of what is held otherwise than planned, at level WARNING: without a handler Python writes it to stderr."""
PROGRAMS = ("vllm", "api_server.py")
"""Names of vLLM's own programs, whose users read one line instead of a traceback."""


@functools.cache
def install(path: str) -> None:
    """Make the vLLM of this process hold a plan; a second call with the same plan does nothing.

    Raises:
        KvmixError: if the plan cannot be read, or vLLM is not one that was tested.
    """
    import vllm

    if Path(sys.argv[0]).name in PROGRAMS:
        sys.excepthook = one_line
    check_version(vllm.__version__)
    if missing := missing_hooks():
        raise KvmixError(f"vLLM {vllm.__version__} lacks {'; '.join(missing)}, which kvmix relies on: install it anew")
    plan = Plan.load(path)
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.attention.attention import Attention

    EngineArgs.create_engine_config = _checked(EngineArgs.create_engine_config, plan, path)
    Attention.__init__ = _with_backend(Attention.__init__, plan)


def _checked(create: Callable[..., Any], plan: Plan, path: str) -> Callable[..., Any]:
    """Return vLLM's function that makes its configuration, with a check that the plan can be held under it."""

    @functools.wraps(create)
    def create_engine_config(*args: Any, **kwargs: Any) -> Any:
        from .checks import check_engine, difference, untried

        config = create(*args, **kwargs)
        check_engine(plan, path, config)
        for said in (difference(plan, path), untried()):
            if said:
                LOG.warning(said)
        return config

    return create_engine_config


def _with_backend(initialize: Callable[..., None], plan: Plan) -> Callable[..., None]:
    """Return the initializer of vLLM's attention layers, with our backend for those that the plan quantizes."""

    @functools.wraps(initialize)
    def init(self: Any, *args: Any, prefix: str = "", attn_backend: Any = None, **kwargs: Any) -> None:
        from vllm.model_executor.models.utils import extract_layer_index

        if attn_backend is None and prefix and (index := extract_layer_index(prefix)) in plan.layers:
            from .backend import backend_of

            attn_backend = backend_of(plan, index, getattr(kwargs.get("cache_config"), "block_size", None))
        initialize(self, *args, prefix=prefix, attn_backend=attn_backend, **kwargs)

    return init


def one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Write what a user can mend in one line, and everything else as Python does."""
    if isinstance(error, KvmixError):
        sys.stderr.write(f"kvmix: {error}\n")
    elif isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        sys.stderr.write("kvmix: the server's port is in use: choose another with --port, or stop what listens there\n")
    else:
        sys.__excepthook__(kind, error, trace)
