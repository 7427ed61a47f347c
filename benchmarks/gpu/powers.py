"""How many powers of 2 a card takes in a second: a kernel that does nothing else."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benchmarks.gpu.clock import Clock


@triton.jit
def _powers_kernel(out, TIMES: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(out + place)
    for _ in range(TIMES):
        value = tl.exp2(-value)  # stays between 0 and 1
    tl.store(out + place, value)


def powers(clock: Clock, tiny: bool) -> float:
    """Per second."""
    programs, times, block = (2, 4, 128) if tiny else (132 * 64, 1024, 1024)
    values = torch.rand(programs * block, device=clock.device)

    def work() -> None:
        _powers_kernel[(programs,)](values, TIMES=times, BLOCK=block, num_warps=4)

    return programs * times * block / clock.medians({"powers": work})["powers"]
