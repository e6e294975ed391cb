/* Functions of CUDA's libdevice that C's libm has not; libdevice.py names them. Only in kernels that use them. */
#ifdef USES_LIBDEVICE
#include <fenv.h>

INLINE uint64_t nv_reversed_bits(uint64_t x) {
  x = (x >> 1 & 0x5555555555555555u) | (x & 0x5555555555555555u) << 1;
  x = (x >> 2 & 0x3333333333333333u) | (x & 0x3333333333333333u) << 2;
  x = (x >> 4 & 0x0f0f0f0f0f0f0f0fu) | (x & 0x0f0f0f0f0f0f0f0fu) << 4;
  return __builtin_bswap64(x);
}
INLINE int32_t nv_byte_perm(uint32_t x, uint32_t y, uint32_t choice) { /* byte i is byte `choice nibble i` of y:x */
  uint64_t bytes = (uint64_t)y << 32 | x;
  uint32_t chosen = 0;
  for (int i = 0; i < 4; i++) chosen |= (uint32_t)(bytes >> 8 * (choice >> 4 * i & 7) & 255) << 8 * i;
  return (int32_t)chosen;
}
INLINE double nv_upper_half(double x) { return double_of_bits(bits_of_double(x) & 0xffffffff00000000u); }

/* Of a whole number. Beyond the type's range its nearest number; NaN is 0 or, as for 64 bits, the sign bit alone. */
#define TO_INTEGER(type, low, beyond, largest, sign_bit)                                                     \
  INLINE type nv_to_##type(double x, int sign_bit_of_nan) {                                                     \
    return x != x ? (sign_bit_of_nan ? sign_bit : 0) : x < low ? (type)low : x >= beyond ? largest : (type)x; \
  }
TO_INTEGER(int32_t, -0x1p31, 0x1p31, INT32_MAX, INT32_MIN)
TO_INTEGER(uint32_t, 0., 0x1p32, UINT32_MAX, 0x80000000u)
TO_INTEGER(int64_t, -0x1p63, 0x1p63, INT64_MAX, INT64_MIN)
TO_INTEGER(uint64_t, 0., 0x1p64, UINT64_MAX, 0x8000000000000000u)

/* ---- rounding toward zero, down or up: one machine operation in that mode ----------------------------------------
 * The compiler knows nothing of modes: operands and result are volatile, so that it can neither compute the operation
 * itself nor move it. */
#define IN_MODE(name, mode, type, expression, ...)                \
  static __attribute__((noinline)) type name(__VA_ARGS__) {       \
    int before = fegetround();                                    \
    fesetround(mode);                                             \
    volatile type result = expression;                            \
    fesetround(before);                                           \
    return result;                                                \
  }
#define IN_MODES(name, type, expression, ...)                           \
  IN_MODE(name##_rz, FE_TOWARDZERO, type, expression, __VA_ARGS__)      \
  IN_MODE(name##_rd, FE_DOWNWARD, type, expression, __VA_ARGS__)        \
  IN_MODE(name##_ru, FE_UPWARD, type, expression, __VA_ARGS__)
#define ARITHMETIC_IN_MODES(letter, type, ending)                                                   \
  IN_MODES(nv_##letter##add, type, x + y, volatile type x, volatile type y)                              \
  IN_MODES(nv_##letter##sub, type, x - y, volatile type x, volatile type y)                              \
  IN_MODES(nv_##letter##mul, type, x * y, volatile type x, volatile type y)                              \
  IN_MODES(nv_##letter##div, type, x / y, volatile type x, volatile type y)                              \
  IN_MODES(nv_##letter##rcp, type, 1 / x, volatile type x)                                               \
  IN_MODES(nv_##letter##sqrt, type, sqrt##ending(x), volatile type x)                                    \
  IN_MODES(nv_fma##ending, type, fma##ending(x, y, z), volatile type x, volatile type y, volatile type z)
ARITHMETIC_IN_MODES(f, float, f)
ARITHMETIC_IN_MODES(d, double, )
IN_MODES(nv_double2float, float, (float)x, volatile double x)
/* What is 0 is not converted: clang's way for uint64_t gives -0 where rounding is down. */
#define INTEGERS_IN_MODES(type)                                                \
  IN_MODES(nv_float_from_##type, float, x ? (float)x : 0, volatile type x)        \
  IN_MODES(nv_double_from_##type, double, x ? (double)x : 0, volatile type x)
INTEGERS_IN_MODES(int32_t)
INTEGERS_IN_MODES(uint32_t)
INTEGERS_IN_MODES(int64_t)
INTEGERS_IN_MODES(uint64_t)

/* ---- functions of doubles ---------------------------------------------------------------------------------------- */
static inline double nv_exp10(double x) { return pow(10, x); }
static inline double nv_powi(double x, int n) { return pow(x, n); }
static inline double nv_rcbrt(double x) { return 1 / cbrt(x); }
static inline double nv_norm3d(double x, double y, double z) { return hypot(hypot(x, y), z); }
static inline double nv_norm4d(double x, double y, double z, double w) { return hypot(hypot(x, y), hypot(z, w)); }
static inline double nv_rhypot(double x, double y) { return 1 / hypot(x, y); }
static inline double nv_rnorm3d(double x, double y, double z) { return 1 / nv_norm3d(x, y, z); }
static inline double nv_rnorm4d(double x, double y, double z, double w) { return 1 / nv_norm4d(x, y, z, w); }

/* sin(pi x + quarters pi / 2): x is 2 quarters and a rest, |rest| <= 1/4, without error. */
static inline double sine_of_pi_times(double x, int quarters) {
  double n = rint(2 * x), rest = M_PI * (x - n / 2);
  quarters += (int)fmod(n, 4);
  double y = quarters & 1 ? cos(rest) : sin(rest);
  return quarters & 2 ? -y : y;
}
static inline double nv_sinpi(double x) { return isfinite(x) ? x == trunc(x) ? copysign(0, x) : sine_of_pi_times(x, 0) : NAN; }
static inline double nv_cospi(double x) { return isfinite(x) ? sine_of_pi_times(x, 1) : NAN; }

/* Bessel functions. libm's of the first kind are right everywhere; of the second kind and of negative orders, not. */
static inline double nv_j0(double x) { return j0(x); }
static inline double nv_j1(double x) { return j1(x); }
static inline double nv_y0(double x) { return x > 0 ? y0(x) : x == 0 ? -INFINITY : NAN; }
static inline double nv_y1(double x) { return x > 0 ? y1(x) : x == 0 ? -INFINITY : NAN; }
static inline double nv_jn(int n, double x) { return n < 0 ? NAN : jn(n, x); }
static inline double nv_yn(int n, double x) { return n < 0 ? NAN : x > 0 ? yn(n, x) : x == 0 ? -INFINITY : NAN; }
/* I_n, n = 0 or 1: the power series, whose terms are all positive, or the expansion at infinity. (Abramowitz and Stegun
 * 9.6.10, 9.7.1.) e^x in two factors: it overflows before I_n does. */
static inline double modified_bessel(int n, double x) {
  double a = fabs(x), sum = 1, term = 1;
  if (a < 30) {
    for (int k = 1; term > 0x1p-55 * sum; k++) sum += term *= a * a / 4 / (k * (double)(k + n));
    return n ? x / 2 * sum : sum;
  }
  if (!(a < 800)) return n ? copysign(a * a, x) : a * a; /* infinite, or NaN */
  for (int k = 1; k < 30; k++) sum += term *= ((2 * k - 1) * (2 * k - 1) - 4 * n) / (8 * k * a);
  sum *= exp(a / 2) / sqrt(2 * M_PI * a) * exp(a / 2);
  return n ? copysign(sum, x) : sum;
}
static inline double nv_cyl_bessel_i0(double x) { return modified_bessel(0, x); }
static inline double nv_cyl_bessel_i1(double x) { return modified_bessel(1, x); }

/* The error function's relatives. exp(x^2) and erfc(x / sqrt(2)) magnify their argument's rounding error, which is
 * therefore computed and its effect added. */
static inline double nv_erfcx(double x) { /* exp(x^2) erfc(x) */
  if (x < 10) {
    double square = x * x, y = exp(square) * erfc(x);
    return isinf(square) || isinf(y) ? INFINITY : y + y * fma(x, x, -square);
  }
  double sum = 1;
  for (int k = 20; k > 0; k--) sum = 1 - (2 * k - 1) / (2 * x * x) * sum; /* the expansion at infinity */
  return sum / (x * 1.7724538509055160273);
}
static inline double nv_normcdf(double x) {
  double scale = -0.70710678118654752440, y = x * scale;
  double error = fma(x, scale, -y) + x * 4.8336466567264567e-17;
  return isinf(x) ? x > 0 : (erfc(y) - 1.1283791670955125739 * exp(-y * y) * error) / 2;
}
/* y with erf(y) = p and erfc(y) = q, p + q = 1, y >= 0: a guess (S. Winitzki's, 2008), and steps of Halley's method. */
static inline double inverse_of_erf(double p, double q) {
  if (!(q > 0)) return q == 0 ? INFINITY : NAN;
  double l = log(q * (1 + p)), t = 4.3307467 + l / 2, y = p < 0.5 ? 0.9 * p : sqrt(sqrt(t * t - l / 0.147) - t);
  for (int i = 0; i < 4; i++) {
    double u = (p < 0.5 ? p - erf(y) : erfc(y) - q) / (1.1283791670955125739 * exp(-y * y));
    y += u / (1 - y * u);
  }
  return y;
}
static inline double nv_erfinv(double x) { return copysign(inverse_of_erf(fabs(x), 1 - fabs(x)), x); }
static inline double nv_erfcinv(double x) { return x <= 1 ? inverse_of_erf(1 - x, x) : -inverse_of_erf(x - 1, 2 - x); }
static inline double nv_normcdfinv(double x) { return 0. - M_SQRT2 * nv_erfcinv(2 * x); }

/* fp8e4b15, a byte in TTIR: e4m3 with bias 15 and neither infinity nor NaN. Upstream's rounding: to nearest, ties away
 * from 0, at most 1.75. */
INLINE float nv_e4b15_to_float(uint8_t code) { return decode_small(code, 8, 3, 15); }
INLINE uint8_t nv_float_to_e4b15(float x) {
  float magnitude = __builtin_fabsf(x) < 1.75f ? __builtin_fabsf(x) : 1.75f;
  uint32_t f16 = float_to_f16(truncate_f16(magnitude));
  return (uint8_t)((bits_of_float(x) >> 31) << 7 | (2 * f16 + 0x80) >> 8);
}
#endif
