"""lanes.py against brute force: whatever it claims of an index expression holds for every program and argument."""

from contextlib import suppress

import numpy as np

from fastdeploy.triton_cpu import ttir
from fastdeploy.triton_cpu.lanes import Lanes, Unknown, lanes

COUNT = 16  # lanes

OPERATIONS = {
    "arith.addi": lambda a, b: a + b,
    "arith.subi": lambda a, b: a - b,
    "arith.muli": lambda a, b: a * b,
    "arith.divsi": lambda a, b: np.sign(a) * (abs(a) // b),  # toward zero, as C and TTIR have it
    "arith.remsi": lambda a, b: np.fmod(a, b),
    "arith.andi": lambda a, b: a & b,
    "arith.shli": lambda a, b: a << b,
    "arith.shrsi": lambda a, b: a >> b,
    "arith.minsi": np.minimum,
}
CONSTANTS = {
    "arith.addi": (1, 3, 16, -5),
    "arith.divsi": (1, 4, 8, 16, 12),
    "arith.remsi": (4, 8, 16, 32, 12),
    "arith.andi": (3, 7, 15, 9),
    "arith.shli": (0, 1, 3),
    "arith.shrsi": (0, 2, 4),
    "arith.muli": (0, 1, 4, 16, -3),
}


def random_function(rng):
    """TTIR of random index arithmetic, and a Python function that computes all its values."""
    steps, text = [], []
    names = ["range", "program", "x"]
    for number in range(7):
        operation = str(rng.choice([*OPERATIONS, *["arith.addi", "arith.muli"] * 3]))
        left = names[-1] if rng.random() < 0.5 else str(rng.choice(names))
        right = str(rng.choice(names[:3] if operation == "arith.muli" else names))  # products stay below 2^63
        if operation in CONSTANTS and (operation not in ("arith.addi", "arith.muli") or rng.random() < 0.6):
            right = f"c{number}"
            value = int(rng.choice(CONSTANTS[operation]))
            text.append(f"%{right} = arith.constant dense<{value}> : tensor<64xi32>")
            steps.append((right, None, value, None))
        text.append(f"%v{number} = {operation} %{left}, %{right} : tensor<64xi32>")
        steps.append((f"v{number}", operation, left, right))
        names.append(f"v{number}")
    lines = [
        "tt.func public @f(%scalar: i32) {",
        "%pid = tt.get_program_id x : i32",
        "%program = tt.splat %pid : i32 -> tensor<64xi32>",
        "%x = tt.splat %scalar : i32 -> tensor<64xi32>",
        "%range = tt.make_range {end = 64 : i32, start = 0 : i32} : tensor<64xi32>",
        *text,
        "tt.return",
        "}",
    ]

    def compute(index, program, x):
        values = {"range": index, "program": 0 * index + program, "x": 0 * index + x}
        for name, operation, left, right in steps:
            values[name] = OPERATIONS[operation](values[left], values[right]) if operation else 0 * index + left
        return values

    return ttir.parse("\n".join(lines))[0], compute


def test_claims_hold_for_every_program_and_argument():
    rng = np.random.default_rng(11)
    claims = consecutive = 0
    for _ in range(1000):
        function, compute = random_function(rng)
        found = {}
        for op in function.body.ops:
            if op.results and op.result.type.is_tensor:
                with suppress(Unknown):
                    found[op.result.name[1:]] = lanes(op.result, (Lanes(COUNT, np.arange(COUNT)),), {})
        claims += len(found)
        consecutive += sum(claim.consecutive for claim in found.values())
        for program, x, start in zip(rng.integers(0, 50, 20), rng.integers(-200, 200, 20), rng.integers(0, 4, 20)):
            values = compute(COUNT * start + np.arange(COUNT), program, x)
            for name, claim in found.items():
                offset = values[name] - claim.pattern
                assert (offset == offset[0]).all(), name
                assert offset[0] == 0 if claim.known else offset[0] % claim.multiple == 0, name
                assert (values[name] >= 0).all() or not claim.nonnegative, name
    assert claims > 1000 and consecutive > 300
