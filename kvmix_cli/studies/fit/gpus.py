"""Graphics processors as their vendors describe them: memory, bandwidth, products and links. Data only.

Memory in bytes (GB of 10^9), bandwidths in bytes a second, products in FLOP a second of dense bfloat16 and of dense fp8
with sums in float32, links in bytes a second in one direction. Sources: the data sheets NVIDIA A100 (80 GB, SXM), H100
(SXM), H200 (SXM), DGX B200 (an eighth of the system), L40S, the whitepapers of the GeForce RTX 4090 (Ada) and 5090
(Blackwell), and AMD's Instinct MI300X and MI325X. Where a sheet gives products with sparsity only, they are halved.
docs/scale.md says where each figure was compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ...errors import BudgetError
from ...registry import Registry

GB: Final = 10**9
TERA: Final = 10**12


@dataclass(frozen=True)
class Gpu:
    """One graphics processor.

    Attributes:
        name: in words.
        memory: bytes.
        bandwidth: of the memory, bytes a second.
        flops: products and sums of dense bfloat16 a second.
        fp8_flops: the same of fp8; as of bfloat16 where there are none.
        link: to its neighbours within a machine, bytes a second in one direction.
    """

    name: str
    memory: int
    bandwidth: float
    flops: float
    fp8_flops: float
    link: float


GPUS: Registry[Gpu] = Registry("GPU", BudgetError)
for _key, _gpu in {
    "a100": Gpu("NVIDIA A100 SXM 80 GB", 80 * GB, 2.039 * TERA, 312 * TERA, 312 * TERA, 300 * GB),
    "h100": Gpu("NVIDIA H100 SXM 80 GB", 80 * GB, 3.35 * TERA, 989 * TERA, 1979 * TERA, 450 * GB),
    "h200": Gpu("NVIDIA H200 SXM 141 GB", 141 * GB, 4.8 * TERA, 989 * TERA, 1979 * TERA, 450 * GB),
    "b200": Gpu("NVIDIA B200 180 GB", 180 * GB, 8 * TERA, 2250 * TERA, 4500 * TERA, 900 * GB),
    "l40s": Gpu("NVIDIA L40S 48 GB", 48 * GB, 0.864 * TERA, 362 * TERA, 733 * TERA, 32 * GB),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090 24 GB", 24 * GB, 1.008 * TERA, 165.2 * TERA, 330.3 * TERA, 32 * GB),
    "rtx5090": Gpu("NVIDIA GeForce RTX 5090 32 GB", 32 * GB, 1.792 * TERA, 209.5 * TERA, 419 * TERA, 64 * GB),
    "mi300x": Gpu("AMD Instinct MI300X 192 GB", 192 * GB, 5.3 * TERA, 1307 * TERA, 2615 * TERA, 448 * GB),
    "mi325x": Gpu("AMD Instinct MI325X 256 GB", 256 * GB, 6 * TERA, 1307 * TERA, 2615 * TERA, 448 * GB),
}.items():
    GPUS.add(_key, _gpu)
