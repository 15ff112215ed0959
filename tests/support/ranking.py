"""Ranks without torchrun: threads that share a store, or forked commands that find each other as torchrun's would."""

import os
import socket
import tempfile
from concurrent.futures import ThreadPoolExecutor

import forking
from torch.distributed import HashStore

from kvmix_cli.ranks import LAUNCHED, Ranks


def together(work, world=2, **options):
    """Call `work(ranks)` in as many threads, and return what they return."""
    store = HashStore()

    def run(rank):
        ranks = Ranks(rank, world, store, **options)
        try:
            return work(ranks)
        except BaseException:
            ranks.claim_failure(1)
            raise

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(run, range(world)))


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def torchrun(*arguments, world=2, **options):
    """Run `kvmix ARGUMENTS` on as many ranks; return the exit code, stdout and stderr of each."""
    shared = {LAUNCHED: "test", "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = []
    for rank in range(world):
        own = {**shared, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1}
        streams = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115 - closed below
        environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
        process = forking.start(*arguments, env=environment, stdout=streams[0], stderr=streams[1], **options)
        ranks.append((process, *streams))
    found = []
    for process, *streams in ranks:
        code = process.wait()
        said = []
        for stream in streams:
            stream.seek(0)
            said.append(stream.read())
            stream.close()
        found.append((code, *said))
    return found
