"""Commands in processes of their own, each forked from one process that has imported what they need.

Importing torch and transformers takes seconds, a fork some milliseconds. A fork has arguments, folder, environment and
streams of its own, signals reach it as they reach any process, and it ends as Python ends, except that torch's modules
are not taken apart, which takes half a second. What torch and transformers read from the environment when they are
imported has been read, so tests of that start Python anew; where there is no Linux, all of them do, because forking a
large process is not safe.

    python forking.py serve SOCKET MODULE ...     import the modules, then fork for every request
    python forking.py ask SOCKET ARGUMENT ...     `kvmix ARGUMENT ...` in a fork, for a shell script
"""

import atexit
import functools
import gc
import importlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

COMMAND = "import runpy; runpy.run_module('kvmix_cli', run_name='__main__', alter_sys=True)"


class Imports(NamedTuple):
    """What a process has imported before it is forked, and under which settings in the environment."""

    modules: tuple[str, ...]
    settings: tuple[tuple[str, str], ...] = ()


LIGHT = Imports(("kvmix_cli.main",))
"""What every command imports before it knows its arguments."""
HEAVY = Imports(
    (
        *LIGHT.modules,
        "transformers.models.llama.modeling_llama",
        "kvmix_cli.evaluation.runner",
        "kvmix_cli.evaluation.tasks.perplexity",
        "kvmix_cli.models.loading",
        "kvmix_cli.profiling",
        "kvmix_cli.studies.leaderboard",
        "kvmix_cli.studies.measure",
        "matplotlib.backends.backend_agg",
        "matplotlib.figure",
    )
)
"""What commands import that profile or evaluate the built-in model."""
INTERPRETER = Imports(
    ("interpreting", "transformers.models.llama.modeling_llama", "kvmix_cli.cache.mixed", "hypothesis"),
    (("TRITON_INTERPRET", "1"),),
)
"""What tests and benchmarks of the Triton kernels import; Triton decides then that it interprets."""
FORKS = sys.platform == "linux"


class Forked:
    """A program in a fork; as much of `subprocess.Popen` as tests need."""

    def __init__(self, connection):
        self._connection = connection
        self.pid = connection.recv()
        self.returncode = None

    def wait(self):
        if self.returncode is None:
            self.returncode = self._connection.recv()
            self._connection.close()
        return self.returncode

    def poll(self):
        return self.wait() if self.returncode is not None or self._connection.poll() else None

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def terminate(self):
        self.send_signal(signal.SIGTERM)


def start(*arguments, code=COMMAND, imports=HEAVY, cwd=None, env=None, stdout=None, stderr=None):
    """Start `kvmix ARGUMENTS`, or other code, where something is imported; streams are files or descriptors."""
    arguments = [str(argument) for argument in arguments]
    environment = {**(os.environ if env is None else env), **dict(imports.settings)}
    if not FORKS:
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.Popen(command, cwd=cwd, env=environment, stdout=stdout, stderr=stderr)
    streams = [default if given is None else given for default, given in enumerate((None, stdout, stderr))]
    numbers = [stream if isinstance(stream, int) else stream.fileno() for stream in streams]
    return _ask(_server(imports), numbers, (code, arguments, str(cwd or Path.cwd()), environment))


def run(*arguments, check=False, **options):
    """Start `kvmix ARGUMENTS` or other code and wait for its end; streams that are not given are kept, as text."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        code = start(*arguments, **{"stdout": stdout, "stderr": stderr, **options}).wait()
        for stream in (stdout, stderr):
            stream.seek(0)
        done = subprocess.CompletedProcess(arguments, code, stdout.read(), stderr.read())
    assert not check or done.returncode == 0, done.stderr
    return done


def in_shell(imports=HEAVY):
    """A command of a shell that does what `kvmix` does, and the descriptors that the shell must inherit for it."""
    if not FORKS:
        return f"{shlex.quote(sys.executable)} -m kvmix_cli", ()
    number = _server(imports).fileno()
    return shlex.join([sys.executable, "-E", "-S", __file__, "ask", str(number)]), (number,)


@functools.cache
def _server(imports):
    """The socket of a process that forks; it ends when the socket is closed, at the latest with the tests."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, __file__, "serve", str(theirs.fileno()), *imports.modules]
        environment = {**os.environ, **dict(imports.settings)}
        process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    atexit.register(process.wait)
    atexit.register(ours.close)  # the last registered is the first to be called
    return ours


def _ask(server, streams, program):
    ours, theirs = Pipe()
    with theirs:
        socket.send_fds(server, [b"."], [theirs.fileno(), *streams])
    ours.send(program)
    return Forked(ours)


def _serve(requests, modules):
    """Fork for every request; return in the fork alone, with the program to run."""
    for name in modules:
        importlib.import_module(name)
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    running = 0
    while True:
        data, numbers, *_ = socket.recv_fds(requests, 1, 4)
        while running and os.waitpid(-1, os.WNOHANG if data else 0) != (0, 0):
            running -= 1
        if not data:
            os._exit(0)
        if os.fork() == 0:
            requests.close()
            return _supervise(Connection(numbers[0]), numbers[1:])
        running += 1
        for number in numbers:
            os.close(number)


def _supervise(connection, streams):
    """Fork once more and report how that ends; return in the second fork alone."""
    program = connection.recv()
    child = os.fork()
    if child:
        connection.send(child)
        _, status = os.waitpid(child, 0)
        connection.send(os.waitstatus_to_exitcode(status))
        os._exit(0)
    connection.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115 - as Python does
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    return program


def _become(code, arguments, folder, environment):
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, sys.path[0], tempfile.tempdir = ["-c", *arguments], "", None
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


def _end(become):
    """Run a program and end as Python does, but leave modules as they are."""
    status = 0
    try:
        become()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            sys.stderr.write(f"{error.code}\n")
    except BaseException:  # noqa: BLE001 - as Python does
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError:
        traceback.print_exc()
        status = 120
    os._exit(status)


if __name__ == "__main__":
    kind, descriptor, *rest = sys.argv[1:]
    channel = socket.socket(fileno=int(descriptor))
    if kind == "serve":
        become = functools.partial(_become, *_serve(channel, rest))
        become() if tuple(rest) == LIGHT.modules else _end(become)
    else:
        program = (COMMAND, rest, str(Path.cwd()), dict(os.environ))
        sys.exit(_ask(channel, (0, 1, 2), program).wait())
