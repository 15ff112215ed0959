"""The keys and values that an engine's blocks hold of every token, recorded in its workers while it answers."""

from pathlib import Path

import torch

from kvmix_cli.serving.batch import EngineBatch


class StoredTokens:
    """Everything that is stored while it records, read back from the blocks right after it was written.

    Attributes:
        sequences: in the order in which they began; by layer, parts `[H_kv, n, D]` of keys and of values.
    """

    def __init__(self):
        self.sequences, self._layers, self._running = [], {}, {}
        self._write = EngineBatch.write

    def begin(self):
        def write(batch, layer, blocks, keys, values):
            self._write(batch, layer, blocks, keys, values)
            self._read(batch, layer, blocks)

        EngineBatch.write = write

    def end(self):
        EngineBatch.write = self._write

    def _read(self, batch, layer, blocks):
        number = self._layers.setdefault(id(layer), len(self._layers))
        page, tensors = layer.keys.page, list(zip((layer.keys, layer.values), layer.parts(blocks), strict=True))
        rows = zip(batch.table, batch.lengths.tolist(), batch.starts[:-1], batch.starts[1:], strict=True)
        for table, stop, first, end in rows:
            start = stop - (end - first)
            if start == number == 0:  # a block can only be the first one of a sequence at a time
                self._running[int(table[0])] = {}
                self.sequences.append(self._running[int(table[0])])
            found = table[: -(-stop // page)]  # from the first block on, which has the sink
            read = [tensor.read(held, found, torch.float32)[:, start:stop] for tensor, held in tensors]
            self._running[int(table[0])].setdefault(number, []).append(read)


class RecordingWorker:
    """Methods for vLLM's workers (`worker_extension_cls`), to be called in each of them."""

    def begin_recording(self):
        self.recorded = StoredTokens()
        self.recorded.begin()

    def save_recorded(self, folder):
        """Write, of every sequence and layer, keys and values `[2, H_kv, T, D]` of this rank's heads."""
        self.recorded.end()
        whole = [
            [torch.stack([torch.cat(each, 1) for each in zip(*parts, strict=True)]) for parts in sequence.values()]
            for sequence in self.recorded.sequences
        ]
        torch.save(whole, Path(folder) / f"{self.rank}.pt")


def load_recorded(folder):
    """Return what all ranks have written, their heads side by side."""
    ranks = [torch.load(file) for file in sorted(Path(folder).glob("*.pt"))]
    return [[torch.cat(parts, dim=1) for parts in zip(*layers, strict=True)] for layers in zip(*ranks, strict=True)]
