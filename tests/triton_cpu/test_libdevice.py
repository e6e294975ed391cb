"""Every function of Triton's libdevice, for every type that it takes, against NumPy, `math` and exact fractions."""

import functools
import inspect
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

from fastdeploy.triton_cpu.context import UnsupportedOperation

from .arrays import Tensor, empty

_TYPES = {"fp32": "float32", "fp64": "float64"}
_DTYPE = r'core\.dtype\("\w+"\)'
_ROW = re.compile(rf'\(((?:\s*{_DTYPE},?\s*)+)\)\s*:\s*\("\w+", ({_DTYPE})\)')


def signatures() -> list[tuple[str, tuple[str, ...], str]]:
    """(function, operand types, result type) as Triton's own source lists them."""
    found = []
    for name, body in re.findall(r"def (\w+)\(.*?\n(.*?)(?=\n@core|\Z)", inspect.getsource(libdevice), re.S):
        for row in _ROW.findall(body):
            *types, result = [_TYPES.get(t, t) for t in re.findall(r'"(\w+)"', " ".join(row))]
            found.append((name, tuple(types), result))
    return found


SIGNATURES = signatures()
N = 128


@triton.jit
def functions_kernel(x_ptr, y_ptr, z_ptr, w_ptr, out_ptr, NAMES: tl.constexpr, ARITY: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y, z, w = tl.load(x_ptr + i), tl.load(y_ptr + i), tl.load(z_ptr + i), tl.load(w_ptr + i)
    for k in tl.static_range(len(NAMES)):
        if ARITY == 1:
            found = getattr(libdevice, NAMES[k])(x)
        elif ARITY == 2:
            found = getattr(libdevice, NAMES[k])(x, y)
        elif ARITY == 3:
            found = getattr(libdevice, NAMES[k])(x, y, z)
        else:
            found = getattr(libdevice, NAMES[k])(x, y, z, w)
        tl.store(out_ptr + k * N + i, found)


SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 0.5, -0.5, 2.0, -2.5, 3.5, -7.0, 1e10, -3e9, 1e19, 1e-40]


def operand(dtype: str, seed: int) -> np.ndarray:
    """Of an integer all magnitudes; of floats mostly what is near 1, some of all magnitudes, and the special ones."""
    rng = np.random.default_rng(seed)
    if "int" in dtype:
        limits = np.iinfo(dtype)
        x = rng.integers(limits.min, limits.max, N, dtype, endpoint=True) >> rng.integers(0, limits.bits, N).astype(
            dtype
        )
        x[:3] = [0, limits.min, limits.max]
    else:
        x = (rng.standard_normal(N) * 10.0 ** rng.choice([0, 0, 0, 1, -3, -9, 12], N)).astype(dtype)
        x[: len(SPECIAL)] = SPECIAL
    return rng.permutation(x)


def operands(types: tuple[str, ...]) -> list[np.ndarray]:
    found = [operand(dtype, seed) for seed, dtype in enumerate(types)]
    if len(types) == 2 and types[0][:3] == "int" and types[1][0] == "f":  # jn, yn: small orders, and arguments > n
        found[0] = np.random.default_rng(0).integers(-1, 5, N).astype("int32")
    if len(types) == 2 and types[0][0] == "f" and types[1] == "int32":  # ldexp, scalbn, powi
        found[1] = np.random.default_rng(0).integers(-40, 40, N).astype("int32")
    return found


@functools.lru_cache(None)
def results(types: tuple[str, ...], result: str) -> dict[str, np.ndarray]:
    """All functions of one signature, by one kernel."""
    names = tuple(name for name, t, r in SIGNATURES if (t, r) == (types, result))
    out = empty((len(names), N), result)
    tensors = [Tensor(x) for x in operands(types)]
    functions_kernel[(1,)](*tensors, *[tensors[0]] * (4 - len(types)), out, names, len(types), N)
    return dict(zip(names, out.stored))


# ---- exact references: of Python's integers and fractions ------------------------------------------------------------
def rounded(exact: Fraction, way: str, dtype: str) -> float:
    """A fraction rounded to a float type: to nearest (even), toward zero, down or up."""
    kind = np.dtype(dtype).type
    with np.errstate(over="ignore"):
        near = kind(math.inf if abs(exact) >= 2**1024 else float(exact)) * (
            1 if exact >= 0 or abs(exact) < 2**1024 else -1
        )
        around = [np.nextafter(near, kind(-np.inf)), near, np.nextafter(near, kind(np.inf))]
    value = {x: Fraction(float(x)) if np.isfinite(x) else math.copysign(math.inf, x) for x in around}
    below = max((x for x in around if value[x] <= exact), default=kind(-np.inf))
    above = min((x for x in around if value[x] >= exact), default=kind(np.inf))
    if way == "rz":
        way = "rd" if exact > 0 else "ru"
    if way != "rn":
        return below if way == "rd" else above
    largest = Fraction(float(np.finfo(dtype).max))
    if abs(exact) > largest:  # rounds as if the exponents went on
        step = Fraction(2) ** (np.finfo(dtype).maxexp - np.finfo(dtype).nmant - 1)
        return math.copysign(float(largest) if abs(exact) - largest < step / 2 else math.inf, exact)
    ties = sorted((abs(value[x] - exact), int(x.view(f"u{x.itemsize}")) & 1, x) for x in (below, above))
    return ties[0][2]


def zero(way: str, *signs: float) -> float:
    """The sum of numbers that cancel."""
    negative = all(math.copysign(1, x) < 0 for x in signs) or (
        way == "rd" and any(math.copysign(1, x) < 0 for x in signs)
    )
    return -0.0 if negative else 0.0


def arithmetic(name: str, way: str, dtype: str, *operands: np.ndarray) -> float:
    """add, sub, mul, div, rcp, sqrt and fma of floats, rounded once."""
    x, y, z = (float(v) for v in [*operands, 1.0, 0.0][:3])
    if name == "rcp":
        x, y = 1.0, x
    if name == "sub":
        y = -y
    if not np.isfinite([x, y, z]).all() or (name in ("div", "rcp") and y == 0) or (name == "sqrt" and x <= 0):
        with np.errstate(all="ignore"):
            x, y, z = np.float64([x, y, z])
            by_name = {"add": x + y, "sub": x + y, "mul": x * y, "sqrt": np.sqrt(x), "fma": x * y + z}
            return by_name[name] if name in by_name else np.divide(x, y)
    a, b, c = Fraction(x), Fraction(y), Fraction(z)
    if name == "sqrt":
        return rounded_root(a, way, dtype)
    exact = {"add": a + b, "sub": a + b, "mul": a * b, "fma": a * b + c}[name] if name not in ("div", "rcp") else a / b
    if exact:
        return rounded(exact, way, dtype)
    product = math.copysign(1, x) * math.copysign(1, y)
    return {"add": zero(way, x, y), "sub": zero(way, x, y), "fma": zero(way, product, z)}.get(name, 0.0 * product)


def rounded_root(x: Fraction, way: str, dtype: str) -> float:
    """A root that is no float is replaced by a fraction on its side of all floats and of the middles between them."""
    scale = 4**300
    root = Fraction(math.isqrt(x.numerator * scale * x.denominator), 2**300 * x.denominator)
    return rounded(root if root * root == x else root + Fraction(1, 2**320), way, dtype)


def whole(x: float, way: str, dtype: str) -> int:
    """A float as an integer, at most the type's largest."""
    limits = np.iinfo(dtype)
    if math.isnan(x):
        return limits.min if limits.min else limits.max // 2 + 1
    if math.isinf(x):
        return limits.max if x > 0 else limits.min
    exact = Fraction(x)
    found = {"rn": round(exact), "rz": math.trunc(exact), "rd": math.floor(exact), "ru": math.ceil(exact)}[way]
    return min(max(found, limits.min), limits.max)


def bits(x: np.generic) -> int:
    return int(x.view(f"u{x.itemsize}"))


def of_bits(value: int, dtype: str) -> np.generic:
    size = np.dtype(dtype).itemsize
    return np.array(value % 2 ** (8 * size), f"u{size}").view(dtype)[()]


_EXACT = {
    "clz": lambda x: 8 * x.itemsize - bits(x).bit_length(),
    "popc": lambda x: bits(x).bit_count(),
    "ffs": lambda x: (bits(x) & -bits(x)).bit_length(),
    "brev": lambda x: int(f"{bits(x):0{8 * x.itemsize}b}"[::-1], 2),
    "byte_perm": lambda x, y, choice: chosen_bytes(bits(y) << 32 | bits(x), bits(choice)),
    "mulhi": lambda x, y: int(x) * int(y) >> 8 * x.itemsize,
    "mul24": lambda x, y: low24(x) * low24(y),
    "sad": lambda x, y, z: abs(int(x) - int(y)) + int(z),
    "hadd": lambda x, y: (int(x) + int(y)) // 2,
    "rhadd": lambda x, y: (int(x) + int(y) + 1) // 2,
    "hiloint2double": lambda high, low: bits(high) << 32 | bits(low),
    "double2hiint": lambda x: bits(x) >> 32,
    "isnan": lambda x: int(math.isnan(x)),
    "isinf": lambda x: int(math.isinf(x)),
    "finitef": lambda x: int(math.isfinite(x)),
    "isfinited": lambda x: int(math.isfinite(x)),
    "signbit": lambda x: int(math.copysign(1, x) < 0),
    "llrint": lambda x: whole(float(x), "rn", "int64"),
    "llround": lambda x: whole(away_from_zero(float(x)), "rz", "int64"),
    "ilogb": lambda x: -(2**31) if x == 0 or math.isnan(x) else 2**31 - 1 if math.isinf(x) else math.frexp(x)[1] - 1,
    **dict.fromkeys(
        ("double2loint", "int_as_float", "uint_as_float", "float_as_int", "float_as_uint", "longlong_as_double"), bits
    ),
    "double_as_longlong": bits,
}  # fmt: skip


def chosen_bytes(word: int, choice: int) -> int:
    return sum((word >> 8 * (choice >> 4 * i & 7) & 255) << 8 * i for i in range(4))


def low24(x: np.generic) -> int:
    low = bits(x) & 0xFFFFFF
    return low - 2**24 if x.dtype.kind == "i" and low >= 2**23 else low


def away_from_zero(x: float) -> float:
    return math.copysign(math.floor(abs(x) + 0.5), x) if abs(x) < 2**52 else x


def exact_reference(name: str, result: str):  # type: ignore[no-untyped-def]
    """The function of NumPy scalars whose result must be right in every bit, or None."""
    if name in _EXACT:
        return _EXACT[name]
    stem, _, way = name.rpartition("_")
    if stem in ("add", "sub", "mul", "div", "rcp", "sqrt", "fma"):
        return lambda *x: arithmetic(stem, way, result, *x)
    if stem == "rsqrt":
        return None
    source, _, target = stem.partition("2")
    if target in ("int", "uint", "ll", "ull"):
        dtype = {"int": "int32", "uint": "uint32", "ll": "int64", "ull": "uint64"}[target]
        no_number = None if source == "double" or "ll" in target else 0
        return lambda x: no_number if no_number is not None and math.isnan(x) else whole(float(x), way, dtype)
    if target in ("float", "double"):
        return lambda x: x if not np.isfinite(x) or x == 0 else rounded(Fraction(x.item()), way, result)
    return None


EXACT = [s for s in SIGNATURES if exact_reference(s[0], s[2])]


@pytest.mark.parametrize(
    "name, types, result", EXACT, ids=lambda value: "-".join(value) if isinstance(value, tuple) else value
)
def test_exact_functions_are_right_in_every_bit(name, types, result):
    found = results(types, result)[name]
    reference = exact_reference(name, result)
    for *x, y in zip(*operands(types), found):
        expected = reference(*x)
        if isinstance(expected, int):
            expected = of_bits(expected, result)
        expected = np.dtype(result).type(expected)
        assert bits(y) == bits(expected) or (y != y and expected != expected), f"{name}{tuple(x)} = {y}, not {expected}"


# ---- references of 64 bits of mantissa, where NumPy has them --------------------------------------------------------
def quadrature(f, begin: float, end: float):  # type: ignore[no-untyped-def]
    """The integral of a smooth function, by Gauss and Legendre in 24 pieces; nodes are the last axis."""
    node, weight = np.polynomial.legendre.leggauss(40)
    edges = np.linspace(begin, end, 25)
    middle, half = (edges[1:] + edges[:-1])[:, None] / 2, (edges[1:] - edges[:-1])[:, None] / 2
    return f((middle + half * node).ravel()) @ (half * weight).ravel()


def first_kind(n, x):  # type: ignore[no-untyped-def]
    """Bessel's integral of J_n."""
    n, x = np.asarray(n, float)[..., None], np.asarray(x, float)[..., None]
    found = quadrature(lambda t: np.cos(n * t - x * np.sin(t)), 0, np.pi) / np.pi
    return np.where(n[..., 0] < 0, np.nan, found)


def second_kind(n, x):  # type: ignore[no-untyped-def]
    """Schlaefli's integral of Y_n, x at least 0.3."""
    n, x = np.asarray(n, float)[..., None], np.asarray(x, float)[..., None]
    sign = np.where(n % 2, -1, 1)
    first = quadrature(lambda t: np.sin(x * np.sin(t) - n * t), 0, np.pi)
    second = quadrature(lambda t: (np.exp(n * t) + sign * np.exp(-n * t)) * np.exp(-x * np.sinh(t)), 0, 7)
    return np.where(n[..., 0] < 0, np.nan, (first - second) / np.pi)


def modified(n: int):  # type: ignore[no-untyped-def]
    def reference(x):  # type: ignore[no-untyped-def]
        x = np.asarray(x, float)[..., None]
        return quadrature(lambda t: np.exp(x * np.cos(t)) * np.cos(n * t), 0, np.pi) / np.pi

    return reference


def scaled_erfc(x: float) -> np.longdouble:
    """exp(x^2) erfc(x): by the continued fraction where it converges."""
    x = np.longdouble(x)
    if x < 3:
        return np.exp(x * x) * np.longdouble(math.erfc(x))
    below = x
    for k in range(400, 0, -1):
        below = x + np.longdouble(k) / 2 / below
    return 1 / (below * np.sqrt(np.longdouble(np.pi)))


def normal_cdf(x: float) -> np.longdouble:
    x = np.longdouble(x)
    root = np.sqrt(np.longdouble(2))
    return 1 - normal_cdf(-x) if x > 0 else np.exp(-x * x / 2) * scaled_erfc(-x / root) / 2


def inverse(function, low: float, high: float):  # type: ignore[no-untyped-def]
    """Of a monotonic function, by bisection."""

    def reference(y: float) -> float:
        if not function(low) <= y <= function(high) and not function(high) <= y <= function(low):
            return math.nan
        a, b = low, high
        for _ in range(1100):
            middle = (a + b) / 2
            if middle in (a, b):
                break
            a, b = (middle, b) if (function(middle) < y) == (function(high) > function(low)) else (a, middle)
        return a if abs(function(a) - y) < abs(function(b) - y) else b

    return reference


def inverse_erf(y: float) -> float:
    if abs(y) <= 0.5:
        return inverse(math.erf, -5.8, 5.8)(y)
    return math.copysign(inverse(math.erfc, 0, 27)(1 - abs(y)), y)


def each(function):  # type: ignore[no-untyped-def]
    """Of Python's floats; where it raises, there is no number."""

    def one(*x: float) -> float:
        try:
            return function(*map(float, x))
        except (ValueError, OverflowError):
            return math.nan

    return np.vectorize(one, otypes=[np.longdouble])


def of_pi(function):  # type: ignore[no-untyped-def]
    """sin or cos of pi x, from x's distance to an even number."""
    return lambda x: function(np.arctan(np.longdouble(1)) * 4 * np.fmod(x, 2))


_SAME_NAME = """cbrt ceil copysign cos cosh exp exp2 expm1 floor fmod hypot log log10 log1p log2 rint sin sinh
sqrt tan tanh trunc"""
APPROXIMATE = {
    **{name: getattr(np, name) for name in _SAME_NAME.split()},
    **{f"a{name}": getattr(np, f"arc{name}") for name in "cos cosh sin sinh tan tan2 tanh".split()},
    **{f"fast_{name}f": getattr(np, name) for name in "cos exp log log10 log2 sin tan".split()},
    "abs": np.abs,
    "cospi": of_pi(np.cos),
    "cyl_bessel_i0": modified(0),
    "cyl_bessel_i1": modified(1),
    "erf": each(math.erf),
    "erfc": each(math.erfc),
    "erfcinv": each(lambda y: inverse_erf(1 - y) if y > 0.5 else inverse(math.erfc, 0, 27)(y)),
    "erfcx": each(scaled_erfc),
    "erfinv": each(inverse_erf),
    "exp10": lambda x: np.longdouble(10) ** x,
    "fast_dividef": np.divide,
    "fast_exp10f": lambda x: np.longdouble(10) ** x,
    "fast_powf": np.power,
    "fdim": lambda x, y: np.where(np.isnan(x) | np.isnan(y), np.nan, np.where(x > y, x - y, 0)),
    "fma": lambda x, y, z: x * y + z,
    "j0": functools.partial(first_kind, 0),
    "j1": functools.partial(first_kind, 1),
    "jn": first_kind,
    "ldexp": np.ldexp,
    "lgamma": each(math.lgamma),
    "logb": lambda x: np.where(x == 0, -np.inf, np.where(np.isinf(x), np.inf, np.frexp(x)[1] - 1.0 + 0 * x)),
    "nearbyint": np.rint,
    "norm3d": lambda x, y, z: np.sqrt(x * x + y * y + z * z),
    "norm4d": lambda x, y, z, w: np.sqrt(x * x + y * y + z * z + w * w),
    "normcdf": each(normal_cdf),
    "normcdfinv": each(inverse(normal_cdf, -38, 8)),
    "pow": np.power,
    "rcbrt": lambda x: 1 / np.cbrt(x),
    "remainder": each(math.remainder),
    "rhypot": lambda x, y: 1 / np.hypot(x, y),
    "rnorm3d": lambda x, y, z: 1 / np.sqrt(x * x + y * y + z * z),
    "rnorm4d": lambda x, y, z, w: 1 / np.sqrt(x * x + y * y + z * z + w * w),
    "round": lambda x: np.copysign(np.floor(np.abs(x) + 0.5), x),
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "rsqrt_rn": lambda x: 1 / np.sqrt(x),
    "saturatef": lambda x: np.where(np.isnan(x), 0, np.clip(x, 0, 1)),
    "scalbn": np.ldexp,
    "sinpi": of_pi(np.sin),
    "tgamma": each(math.gamma),
    "y0": functools.partial(second_kind, 0),
    "y1": functools.partial(second_kind, 1),
    "yn": second_kind,
}
# How many units in the last place a result may be off, where that is not 3.
UNITS = {
    "rsqrt_rn": 0.5,
    "tgamma": 10,
    "rcbrt": 5,
    **dict.fromkeys(("erfcx", "normcdf", "normcdfinv"), 6),
    **dict.fromkeys(("cyl_bessel_i0", "cyl_bessel_i1", "j0", "j1", "jn", "y0", "y1", "yn"), 10),
}
# Near their zeros these are right to an absolute error, in units of 1.
ABSOLUTE = ("cyl_bessel_i1", "j0", "j1", "jn", "y0", "y1", "yn", "lgamma", "log2", "sinpi", "cospi")
# Where the reference holds; elsewhere, only special values are tested, below.
DOMAINS = {
    "erfcx": lambda x: (x > -5) & (x < 100),
    "normcdf": lambda x: (x > -37) & (x < 30),
    "normcdfinv": lambda x: (x > 1e-300) & (x < 1) & (x != 0.5),
    "erfcinv": lambda x: (x > 1e-300) & (x < 2) & (x != 1),
    "erfinv": lambda x: np.abs(x) < 1,
    "cospi": lambda x: np.abs(x) < 1e9,
    "sinpi": lambda x: np.abs(x) < 1e9,
    "lgamma": lambda x: (x > 0) & (x < 1e9),
    "tgamma": lambda x: (np.abs(x) < 30) & (x != np.trunc(x)),
    "remainder": lambda x, y: np.isfinite(x) & (y != 0),
    **dict.fromkeys(("cyl_bessel_i0", "cyl_bessel_i1", "j0", "j1"), lambda x: np.abs(x) < 40),
    "jn": lambda n, x: np.abs(x) < 40,
    **dict.fromkeys(("y0", "y1"), lambda x: (x > 0.3) & (x < 40)),
    "yn": lambda n, x: (x > 0.3) & (x < 40),
}
INEXACT = [s for s in SIGNATURES if s[0] in APPROXIMATE and "int" not in s[2]]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name, types, result", INEXACT, ids=lambda value: "-".join(value) if isinstance(value, tuple) else value
)
def test_the_other_functions_are_close(name, types, result):
    found = results(types, result)[name]
    x = [v.astype(np.longdouble) if v.dtype.kind == "f" else v for v in operands(types)]
    there = DOMAINS[name](*x) if name in DOMAINS else np.ones(N, bool)
    found, x = found[there], [v[there] for v in x]
    exact = np.asarray(APPROXIMATE[name](*x), np.longdouble)
    nearest = exact.astype(result)
    unit = np.spacing(np.minimum(np.abs(nearest), np.finfo(result).max)).astype(np.longdouble)
    if name in ABSOLUTE:
        unit = np.maximum(unit, np.finfo(result).eps)
    error = np.where((found == nearest) | (np.isnan(found) & np.isnan(exact)), 0, np.abs(found - exact) / unit)
    assert there.sum() > 20
    worst = np.argmax(np.where(np.isnan(error), np.inf, error))
    message = f"{name}{tuple(v[worst] for v in x)} = {found[worst]}, not {exact[worst]}"
    assert error[worst] <= UNITS.get(name, 3), message


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_neighbouring_float(dtype):
    x, y = operands((dtype, dtype))
    np.testing.assert_array_equal(results((dtype, dtype), dtype)["nextafter"], np.nextafter(x, y))


def test_the_reciprocal_of_an_upper_half():
    x = operand("float64", 0)
    found = results(("float64",), "float64")["rcp64h"]
    assert not (found.view("u8") & 0xFFFFFFFF).any()
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(found, 1 / x, rtol=2e-6)


def test_integers_have_a_magnitude():
    for dtype in ("int32", "int64"):
        np.testing.assert_array_equal(results((dtype,), dtype)["abs"], np.abs(operand(dtype, 0)))


def test_every_function_has_a_test():
    tested = {*EXACT, *INEXACT} | {s for s in SIGNATURES if s[0] in ("nextafter", "rcp64h", "abs")}
    assert set(SIGNATURES) == tested


@triton.jit
def special_kernel(x_ptr, n_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, n = tl.load(x_ptr + i), tl.load(n_ptr + i)
    tl.store(out_ptr + 0 * N + i, libdevice.y0(x))
    tl.store(out_ptr + 1 * N + i, libdevice.yn(n, x))
    tl.store(out_ptr + 2 * N + i, libdevice.cyl_bessel_i1(x))
    tl.store(out_ptr + 3 * N + i, libdevice.erfcx(x))
    tl.store(out_ptr + 4 * N + i, libdevice.normcdf(x))
    tl.store(out_ptr + 5 * N + i, libdevice.erfinv(x))
    tl.store(out_ptr + 6 * N + i, libdevice.erfcinv(x))
    tl.store(out_ptr + 7 * N + i, libdevice.sinpi(x))


def test_special_values():
    x = np.array([0.0, -1.0, np.inf, -np.inf, np.nan, 2.0, 1.0, -0.0], "float64")
    out = empty((8, 8), "float64")
    special_kernel[(1,)](Tensor(x), Tensor(np.array([2, 2, 2, 2, 2, -1, -1, 1], np.int32)), out, 8)
    inf, nan = np.inf, np.nan
    y0_of_1, y0_of_2 = second_kind(0, [1.0, 2.0])
    i1 = modified(1)(x[[1, 5, 6]])
    erfcx = [float(scaled_erfc(v)) for v in (-1, 2, 1)]
    cdf = [float(normal_cdf(v)) for v in (-1, 2, 1)]
    expected = [
        [-inf, nan, 0, nan, nan, y0_of_2, y0_of_1, -inf],
        [-inf, nan, 0, nan, nan, nan, nan, -inf],
        [0.0, i1[0], inf, -inf, nan, i1[1], i1[2], -0.0],
        [1, erfcx[0], 0, inf, nan, erfcx[1], erfcx[2], 1],
        [0.5, cdf[0], 1, 0, nan, cdf[1], cdf[2], 0.5],
        [0.0, -inf, nan, nan, nan, nan, inf, -0.0],
        [inf, nan, nan, nan, nan, -inf, 0, inf],
        [0.0, -0.0, nan, nan, nan, 0.0, 0.0, -0.0],
    ]
    np.testing.assert_allclose(out.stored, expected, rtol=1e-13, atol=1e-14)
    np.testing.assert_array_equal(np.signbit(out.stored[:, -1]), np.signbit(np.array(expected)[:, -1]))


@triton.jit
def unknown_kernel(x_ptr, out_ptr):
    x = tl.load(x_ptr)
    tl.store(out_ptr, unknown_function(x))


@tl.core.extern
def unknown_function(x, _semantic=None):
    table = {(tl.float32,): ("__nv_no_such_function", tl.float32)}
    return tl.core.extern_elementwise("", "", [x], table, is_pure=True, _semantic=_semantic)


def test_an_unknown_function_is_named_with_its_line():
    with pytest.raises(UnsupportedOperation, match=r"test_libdevice\.py:\d+.*__nv_no_such_function"):
        unknown_kernel[(1,)](Tensor(np.zeros(1, np.float32)), empty(1))
