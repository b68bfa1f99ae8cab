"""Executes the few PTX instructions of our inline assembly on numpy arrays of 32-bit words.

run(asm, outputs=1, inputs=[words, ...]) -> [words, ...]; operands $0, $1, ... as in Triton's
`inline_asm_elementwise`, outputs first. An instruction or operand that is not known is an error.
"""

from __future__ import annotations

import re

import numpy as np

U32 = np.uint32


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Byte permute, default mode: nibble i of the selector names byte i of the result."""
    if np.any(selector & U32(0x8888)):
        raise NotImplementedError("prmt with sign replication")
    pool = np.stack([(word >> U32(8 * i)) & U32(255) for word in (a, b) for i in range(4)])
    out = np.zeros_like(a)
    for i in range(4):
        index = (selector >> U32(4 * i)) & U32(7)
        out |= np.take_along_axis(pool, index[None].astype(np.int64), 0)[0] << U32(8 * i)
    return out


def _sub_f16x2(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    halves = a.view(np.float16) - b.view(np.float16)
    return halves.view(U32)


INSTRUCTIONS = {
    "mov.b32": lambda a: a.copy(),
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shr.u32": lambda a, b: a >> b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "prmt.b32": _prmt,
    "sub.f16x2": _sub_f16x2,
}


def run(asm: str, outputs: int, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """The output words after executing `asm`; inputs are uint32 arrays of one shape."""
    shape = inputs[0].shape
    registers = {f"${outputs + i}": np.ascontiguousarray(x, U32) for i, x in enumerate(inputs)}
    writable = {f"${i}" for i in range(outputs)}
    text = re.sub(r"//[^\n]*", "", asm).strip()
    text = re.sub(r"^\{(.*)\}$", r"\1", text, flags=re.S)
    for statement in filter(None, (part.strip() for part in text.split(";"))):
        name, rest = statement.split(None, 1)
        operands = [operand.strip() for operand in rest.split(",")]
        if name == ".reg":
            writable |= {operands[0].split()[-1], *operands[1:]}
            continue
        target, *sources = operands
        if target not in writable:
            raise ValueError(f"{statement}: writes {target}, which is no output and not declared")
        values = []
        for source in sources:
            if re.fullmatch(r"0x[0-9a-fA-F]+|\d+", source):
                values.append(np.full(shape, int(source, 0), U32))
            else:
                values.append(registers[source])
        registers[target] = np.ascontiguousarray(INSTRUCTIONS[name](*values), U32)
    return [registers[f"${i}"] for i in range(outputs)]
