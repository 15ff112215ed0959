"""Python's search for garbage, put off while a command only imports. No torch.

torch and transformers make half a million objects that stay until the process ends. Python looks through them again and
again while they arrive, and once more at the end: 2.4 of the 7.7 s of processor time of a profile of one short sample.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_is_put_off = False


@contextmanager
def put_off() -> Iterator[None]:
    """Within this block look for garbage only from `look_again` on; after it pass over all that there is by then.

    For the whole of a process, which the system clears away when it ends.
    """
    global _is_put_off
    gc.disable()
    _is_put_off = True
    try:
        yield
    finally:
        look_again()
        gc.freeze()


def look_again() -> None:
    """Look for garbage from now on, among what is made from now on; does nothing where it was not put off."""
    global _is_put_off
    if _is_put_off:
        gc.freeze()
        gc.enable()
        _is_put_off = False
