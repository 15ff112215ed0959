"""Warnings of kvmix's own, among whatever else a process warns of: files of earlier tests that garbage collection
closes, say.
"""

import re
import warnings
from contextlib import contextmanager

from kvmix_kernels.runtime.fallback import FallbackWarning


@contextmanager
def warns_once(category, match):
    """Require one warning of exactly this category, whose message contains the pattern."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    said = [str(each.message) for each in caught if each.category is category]
    assert len(said) == 1, said
    assert re.search(match, said[0]), said


def falls_back_once(match):
    """Require one warning that something else is done than what was meant."""
    return warns_once(FallbackWarning, match)


def fallbacks(recorded):
    """Return the messages of such warnings among those that pytest recorded."""
    return [str(each.message) for each in recorded if isinstance(each.message, FallbackWarning)]
