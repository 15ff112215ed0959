"""A worker of a sweep, for a process of its own: two tasks that need no model, and notes of all that is measured."""

import os
import time
from pathlib import Path

from evaluating import INFO, Counting, stand_in, uniform

from kvmix_cli.cache.subject import Subject
from kvmix_cli.evaluation.base import Settings
from kvmix_cli.evaluation.runner import run_tasks
from kvmix_cli.evaluation.runs import RunFolders

TASKS = ("first", "second")
SUBJECTS = [Subject(f"plan-{bits}", uniform(bits, info=INFO)) for bits in (1, 2, 3, 4, 8)]
FEW = SUBJECTS[:2]
SAMPLES = 3


class Noted(Counting):
    """A task that takes a few milliseconds a sample, and notes in a file that it has begun one."""

    def __init__(self, name, notes, seconds):
        super().__init__(before=self._note)
        self.name, self._notes, self._seconds = name, notes, seconds

    def _note(self, subject, sample):
        handle = os.open(self._notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(handle, f"{self.name} {subject.name} {sample.name}\n".encode())  # a short line is appended at once
        os.close(handle)
        time.sleep(self._seconds)


def sweep(root, subjects=FEW, seconds=0.0):
    """Finish the sweep, or what other processes leave of it, and return its reports."""
    folders = RunFolders(Path(root), "m", resume=True, may_begin=True, is_shared=True)
    tasks = [Noted(name, Path(root, "notes.txt"), seconds) for name in TASKS]
    return run_tasks(tasks, stand_in(), subjects, Settings(limit=SAMPLES), folders)
