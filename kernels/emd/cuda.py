"""The CUDA side of `vitapack.kernels.emd`: calls csrc/emd/auction.cu on tensors.

The library has a C ABI and no dependency on torch; nvcc builds it and ctypes loads it. torch
allocates all memory. `emd` uses `solve_with` for CUDA tensors; the tests pass it the same source
compiled for the CPU, so both exercise this file.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_char_p, c_double, c_int, c_longlong, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vitapack

LIBRARY = Path(vitapack.__file__).parent / "libvitapack_cuda.so"
# Limits the pairs per launch. Further pairs run in later launches, with the same results.
_WORKSPACE_BYTES = 2**30
_NO_LIMIT = 2**62

_INTERLEAVE = (  # shifts and masks that spread 21 bits to every third of 63
    (32, 0x1F00000000FFFF),
    (16, 0x1F0000FF0000FF),
    (8, 0x100F00F00F00F00F),
    (4, 0x10C30C30C30C30C3),
    (2, 0x1249249249249249),
)


def open_library(path: Path) -> ctypes.CDLL:
    """Loads the solver and declares its functions."""
    library = ctypes.CDLL(str(path))
    library.vitapack_emd_workspace.restype = c_size_t
    library.vitapack_emd_workspace.argtypes = [c_int, c_int]
    library.vitapack_emd_solve.restype = c_int
    pointers: list[Any] = [c_void_p]
    numbers: list[Any] = [c_int]
    library.vitapack_emd_solve.argtypes = (
        4 * pointers  # x, y, centre, diagonal
        + 3 * numbers  # pairs, n, p
        + [c_double, c_longlong]  # gap, max_bids
        + [c_void_p, c_size_t]  # workspace
        + 7 * pointers  # distance, bound, assignment, prices, bids, phases, converged
        + 2 * numbers  # blocks, threads
        + pointers  # stream
    )
    library.vitapack_cuda_message.restype = c_char_p
    library.vitapack_cuda_message.argtypes = [c_int]
    return library


@functools.cache
def _installed() -> ctypes.CDLL:
    if not LIBRARY.is_file():
        raise ImportError(
            f"{LIBRARY} is not built, which EMD on CUDA tensors needs; build it with "
            "`VITAPACK_CUDA=1 pip install -e .` (needs nvcc), or pass CPU tensors"
        )
    return open_library(LIBRARY)


def solve_cuda(
    x: torch.Tensor, y: torch.Tensor, *, p: int, gap: float, max_bids: int | None, prices: bool
) -> dict[str, torch.Tensor | None]:
    """Solves CUDA tensors (B, N, 3) that `emd` has checked; returns the fields of an EMDResult."""
    with torch.cuda.device(x.device):
        return solve_with(
            _installed(),
            x,
            y,
            p=p,
            gap=gap,
            max_bids=max_bids,
            prices=prices,
            stream=torch.cuda.current_stream().cuda_stream,
        )


def solve_with(
    library: ctypes.CDLL,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    p: int,
    gap: float,
    max_bids: int | None,
    prices: bool,
    stream: int = 0,
    blocks: int = -1,
    threads: int = 0,
) -> dict[str, torch.Tensor | None]:
    """Runs the library on tensors (B, N, 3) on the device that the library is built for.

    `blocks`: blocks per pair of a cooperative launch; 0 for one block per pair, -1 to let the
    library choose. `threads`: threads per block (a power of two, 32 to 512); 0 to let the library
    choose. The result does not depend on `blocks`. Raises RuntimeError with CUDA's message if a
    launch fails.
    """
    count, n = x.shape[:2]
    device = x.device
    x, y = x.to(torch.float64), y.to(torch.float64)
    result: dict[str, torch.Tensor | None] = {
        "distance": torch.empty(count, dtype=torch.float64, device=device),
        "lower_bound": torch.empty(count, dtype=torch.float64, device=device),
        "assignment": torch.empty(count, n, dtype=torch.int64, device=device),
        "bids": torch.empty(count, dtype=torch.int64, device=device),
        "phases": torch.empty(count, dtype=torch.int64, device=device),
        "converged": torch.empty(count, dtype=torch.bool, device=device),
        "prices": torch.empty(count, n, dtype=torch.float64, device=device) if prices else None,
    }
    if count == 0:
        return result
    step = max(1, _WORKSPACE_BYTES // library.vitapack_emd_workspace(n, 1))
    for start in range(0, count, step):
        pairs = slice(start, min(count, start + step))
        solved = _solve_pairs(
            library, x[pairs], y[pairs], p, gap, max_bids, stream, blocks, threads
        )
        for name, value in result.items():
            if value is not None:
                value[pairs] = solved[name]
    return result


def _solve_pairs(
    library: ctypes.CDLL,
    x: torch.Tensor,
    y: torch.Tensor,
    p: int,
    gap: float,
    max_bids: int | None,
    stream: int,
    blocks: int,
    threads: int,
) -> dict[str, torch.Tensor]:
    count, n = x.shape[:2]
    device = x.device
    low = torch.minimum(x.amin(dim=1), y.amin(dim=1))  # (B, 3)
    high = torch.maximum(x.amax(dim=1), y.amax(dim=1))
    # A power of two, so that scaling is exact; computed on the host because ldexp is exact there.
    exponent = np.frexp((high - low).amax(dim=1).cpu().numpy())[1]
    scale = torch.from_numpy(np.ldexp(1.0, -np.maximum(exponent, -900))).to(device)  # (B,)
    wide = scale[:, None]
    centre = ((low / 2 + high / 2) * wide).contiguous()
    diagonal = torch.linalg.vector_norm((high - low) * wide, dim=1).contiguous()
    x_order, y_order = _compact_order(x), _compact_order(y)
    x = (_rows(x, x_order) * wide[..., None]).contiguous()
    y = (_rows(y, y_order) * wide[..., None]).contiguous()

    size = library.vitapack_emd_workspace(n, count)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    distance = torch.empty(count, dtype=torch.float64, device=device)
    bound, prices = torch.empty_like(distance), torch.empty_like(x[..., 0])
    assignment = torch.empty(count, n, dtype=torch.int32, device=device)
    bids = torch.empty(count, dtype=torch.int64, device=device)
    phases = torch.empty(count, dtype=torch.int32, device=device)
    converged = torch.empty(count, dtype=torch.int32, device=device)
    code = library.vitapack_emd_solve(
        *[t.data_ptr() for t in (x, y, centre, diagonal)],
        *[count, n, p, gap, _NO_LIMIT if max_bids is None else max_bids],
        *[workspace.data_ptr(), size],
        *[t.data_ptr() for t in (distance, bound, assignment, prices, bids, phases, converged)],
        *[blocks, threads, stream],
    )
    if code != 0:
        message = library.vitapack_cuda_message(code).decode()
        raise RuntimeError(f"emd: the CUDA solver failed with code {code}: {message}")
    mapped = torch.empty(count, n, dtype=torch.int64, device=device)
    mapped.scatter_(1, x_order, y_order.gather(1, assignment.long()))
    unmapped = torch.empty_like(prices).scatter_(1, y_order, prices / wide**p)
    return {
        "distance": distance / scale,
        "lower_bound": bound / scale,
        "assignment": mapped,
        "bids": bids,
        "phases": phases.long(),
        "converged": converged.bool(),
        "prices": unmapped,
    }


def _rows(cloud: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return cloud.gather(1, order[..., None].expand(-1, -1, 3))


def _compact_order(cloud: torch.Tensor) -> torch.Tensor:
    """Order of each cloud (B, N, 3) along a Morton curve of 2^21 steps per side: int64 (B, N)."""
    low = cloud.amin(dim=1, keepdim=True)
    side = (cloud.amax(dim=1, keepdim=True) - low).amax(dim=2, keepdim=True)
    steps = (cloud - low) / side.clamp_min(torch.finfo(cloud.dtype).tiny) * (2**21 - 1)
    code = steps.clamp(0, 2**21 - 1).to(torch.int64)
    for shift, mask in _INTERLEAVE:
        code = (code | (code << shift)) & mask
    key = code[..., 0] | (code[..., 1] << 1) | (code[..., 2] << 2)
    return key.argsort(dim=1, stable=True)
