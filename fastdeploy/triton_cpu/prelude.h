/* What generated kernels stand on: bit casts, small floats, elementary functions and vectors of LANES floats.
 *
 * Every function is inlined into a loop that the C compiler turns into vector code, so there are no branches, no
 * tables and no calls. Results are the same for every vector width: nothing here depends on LANES but the last part.
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

INLINE float float_of_bits(uint32_t bits) { union { uint32_t u; float f; } v = {bits}; return v.f; }
INLINE uint32_t bits_of_float(float x) { union { float f; uint32_t u; } v = {x}; return v.u; }
INLINE double double_of_bits(uint64_t bits) { union { uint64_t u; double f; } v = {bits}; return v.f; }
INLINE uint64_t bits_of_double(double x) { union { double f; uint64_t u; } v = {x}; return v.u; }

/* One rounding where the machine has the instruction; two on CPUs older than 2013. */
#if defined(__FMA__) || defined(__aarch64__)
INLINE float fusedf(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
INLINE double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
INLINE float fusedf(float a, float b, float c) { return a * b + c; }
INLINE double fused(double a, double b, double c) { return a * b + c; }
#endif

/* Where x86 traps (division by zero, INT_MIN / -1) these give a number, as GPUs do: a masked lane may hold anything. */
#define DIVISIONS(width)                                                                                            \
  INLINE int##width##_t divide_i##width(int##width##_t a, int##width##_t b) {                                       \
    return b == -1 ? -a : b == 0 ? -1 : a / b;                                                                      \
  }                                                                                                                 \
  INLINE int##width##_t remainder_i##width(int##width##_t a, int##width##_t b) {                                    \
    return b == -1 ? 0 : b == 0 ? a : a % b;                                                                        \
  }                                                                                                                 \
  INLINE int##width##_t udivide_i##width(uint##width##_t a, uint##width##_t b) { return b == 0 ? -1 : a / b; }      \
  INLINE int##width##_t uremainder_i##width(uint##width##_t a, uint##width##_t b) { return b == 0 ? a : a % b; }
DIVISIONS(32)
DIVISIONS(64)

/* maxnum ignores one NaN, as Triton's tl.maximum does by default; the _nan forms pass it on. The first selection is an
 * instruction of its own; with both comparisons in one condition gcc jumps, and no CPU foresees which number is larger. */
INLINE float max_numf(float a, float b) { float c = b > a ? b : a; return a != a ? b : c; }
INLINE float min_numf(float a, float b) { float c = b < a ? b : a; return a != a ? b : c; }
INLINE float max_nanf(float a, float b) { float c = a > b ? a : b; return a != a ? a : c; }
INLINE float min_nanf(float a, float b) { float c = a < b ? a : b; return a != a ? a : c; }
INLINE double max_num(double a, double b) { double c = b > a ? b : a; return a != a ? b : c; }
INLINE double min_num(double a, double b) { double c = b < a ? b : a; return a != a ? b : c; }
INLINE double max_nan(double a, double b) { double c = a > b ? a : b; return a != a ? a : c; }
INLINE double min_nan(double a, double b) { double c = a < b ? a : b; return a != a ? a : c; }
INLINE float clamp_numf(float x, float low, float high) { return min_numf(max_numf(x, low), high); }
INLINE float clamp_nanf(float x, float low, float high) { return x != x ? x : clamp_numf(x, low, high); }
INLINE double clamp_num(double x, double low, double high) { return min_num(max_num(x, low), high); }
INLINE double clamp_nan(double x, double low, double high) { return x != x ? x : clamp_num(x, low, high); }

/* ---- small floats ------------------------------------------------------------------------------------------------
 * bf16 is the upper half of a float. The others have `mantissa` bits and an exponent bias; a code, shifted to a
 * float's place, is off by a power of two, and multiplying by it is exact for subnormal codes too. */
INLINE float bf16_to_float(uint16_t code) { return float_of_bits((uint32_t)code << 16); }
INLINE uint16_t float_to_bf16(float x) { return (uint16_t)(bits_of_float(x) >> 16); } /* of a value already rounded */
INLINE float round_bf16(float x) {
  uint32_t bits = bits_of_float(x);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u; /* to nearest, ties to even */
  return float_of_bits(x != x ? 0x7fc00000u : rounded);
}

INLINE float decode_small(uint32_t code, int width, int mantissa, int bias) {
  uint32_t magnitude = code & ((1u << (width - 1)) - 1);
  float x = float_of_bits(magnitude << (23 - mantissa)) * float_of_bits((uint32_t)(254 - bias) << 23);
  return float_of_bits(bits_of_float(x) | (code >> (width - 1)) << 31);
}
INLINE uint32_t encode_small(float x, int width, int mantissa, int bias, uint32_t largest, uint32_t nan) {
  uint32_t bits = bits_of_float(x), sign = (bits >> 31) << (width - 1), magnitude = bits & 0x7fffffffu;
  int shift = 23 - mantissa;
  uint32_t normal = (magnitude - ((uint32_t)(127 - bias) << 23) + (1u << (shift - 1)) - 1 + ((magnitude >> shift) & 1)) >> shift;
  uint32_t anchor = (uint32_t)(127 + 24 - bias - mantissa) << 23; /* a float whose last bit is the smallest code's value */
  uint32_t subnormal = bits_of_float(float_of_bits(magnitude) + float_of_bits(anchor)) - anchor;
  uint32_t code = magnitude < ((uint32_t)(128 - bias) << 23) ? subnormal : normal;
  code = magnitude >= 0x7f800000u || code > largest ? largest : code;
  return sign | (x != x ? nan : code);
}
INLINE float f16_to_float(uint16_t code) {
  float x = decode_small(code, 16, 10, 15);
  return (code & 0x7c00) == 0x7c00 ? float_of_bits(bits_of_float(x) | 0x7f800000u) : x;
}
INLINE uint16_t float_to_f16(float x) { return (uint16_t)encode_small(x, 16, 10, 15, 0x7c00, 0x7e00); }
INLINE float round_f16(float x) { return f16_to_float(float_to_f16(x)); }
/* Rounding to fp8 saturates at the largest finite number, as NVIDIA's conversions do; storing what is fp8 changes nothing. */
INLINE float e5m2_to_float(uint8_t code) { return f16_to_float((uint16_t)(code << 8)); }
INLINE uint8_t float_to_e5m2(float x) { return (uint8_t)encode_small(x, 8, 2, 15, 0x7c, 0x7f); }
INLINE float round_e5m2(float x) { return e5m2_to_float((uint8_t)encode_small(x, 8, 2, 15, 0x7b, 0x7f)); }
INLINE float e4m3_to_float(uint8_t code) {
  float x = decode_small(code, 8, 3, 7);
  return (code & 0x7f) == 0x7f ? float_of_bits(bits_of_float(x) | 0x7fc00000u) : x;
}
INLINE uint8_t float_to_e4m3(float x) { return (uint8_t)encode_small(x, 8, 3, 7, 0x7e, 0x7f); }
INLINE float round_e4m3(float x) { return e4m3_to_float(float_to_e4m3(x)); }
/* Rounding toward zero: one code back where rounding to nearest went away from it. */
#define TRUNCATE(name, code_type)                                                                   \
  INLINE float truncate_##name(float x) {                                                           \
    float magnitude = __builtin_fabsf(x), nearest = round_##name(magnitude);                        \
    float kept = name##_to_float((code_type)(float_to_##name(nearest) - (nearest > magnitude)));    \
    return name##_to_float(float_to_##name(__builtin_copysignf(kept, x)));                          \
  }
TRUNCATE(bf16, uint16_t)
TRUNCATE(f16, uint16_t)
TRUNCATE(e5m2, uint8_t)
TRUNCATE(e4m3, uint8_t)
#ifdef USES_FNUZ /* no infinities and no -0, whose code is NaN's */
#define FNUZ(name, mantissa, bias)                                                     \
  INLINE float name##_to_float(uint8_t code) {                                         \
    float x = decode_small(code, 8, mantissa, bias);                                   \
    return code == 0x80 ? NAN : x;                                                     \
  }                                                                                    \
  INLINE uint8_t float_to_##name(float x) {                                            \
    uint8_t code = (uint8_t)encode_small(x, 8, mantissa, bias, 0x7f, 0x80);            \
    return code == 0x80 && x == x ? 0 : code;                                          \
  }                                                                                    \
  INLINE float round_##name(float x) { return name##_to_float(float_to_##name(x)); }   \
  TRUNCATE(name, uint8_t)
FNUZ(e4m3fnuz, 3, 8)
FNUZ(e5m2fnuz, 2, 16)
#endif
#ifdef USES_MX /* tl.dot_scaled */
INLINE float mx_e2m1_to_float(uint32_t code) { return decode_small(code, 4, 1, 1); }
INLINE float mx_e8m0_to_float(uint8_t code) { /* 2^(code - 127) */
  return float_of_bits(code == 255 ? 0x7fc00000u : code == 0 ? 0x00400000u : (uint32_t)code << 23);
}
#endif
/* A double on its way to a small float: toward zero, or, so that a second rounding is right, with the last bit 1 where
 * it is inexact. */
INLINE float truncate_float(double x) {
  float nearest = (float)x;
  return float_of_bits(bits_of_float(nearest) - (__builtin_fabs((double)nearest) > __builtin_fabs(x)));
}
INLINE float odd_float(double x) {
  float cut = truncate_float(x);
  return float_of_bits(bits_of_float(cut) | (cut != x));
}

/* ---- elementary functions, within 2 units in the last place ------------------------------------------------------
 * Polynomials: Cephes' single-precision ones (S. Moshier), which are minimax on the reduced interval. */
INLINE float scale_by_power_of_two(float x, int32_t n) { /* in two steps: subnormal results and n = 128 come out right */
  int32_t half = n >> 1;
  return x * float_of_bits((uint32_t)(half + 127) << 23) * float_of_bits((uint32_t)(n - half + 127) << 23);
}
/* What rounds to 0 is not computed: on Intel an instruction whose result underflows takes 150 cycles, and masks of
 * attention ask for 2^-inf all the time. */
INLINE float fast_exp2(float x) { /* 2^x = 2^n 2^r, |r| <= 1/2 */
  float y = x <= -150.f ? 0.f : x;
  y = y > 129.f ? 129.f : y;
  float n = __builtin_rintf(y), r = y - n, p = 1.535336188319500e-4f;
  p = fusedf(p, r, 1.339887440266574e-3f);
  p = fusedf(p, r, 9.618437357674640e-3f);
  p = fusedf(p, r, 5.550332471162809e-2f);
  p = fusedf(p, r, 2.402264791363012e-1f);
  p = fusedf(p, r, 6.931472028550421e-1f);
  p = scale_by_power_of_two(fusedf(p, r, 1.f), (int32_t)n);
  return x <= -150.f ? 0.f : p;
}
INLINE float fast_exp(float x) { /* e^x = 2^n e^r, |r| <= ln(2)/2 */
  float y = x <= -104.f ? 0.f : x;
  y = y > 89.f ? 89.f : y;
  float n = __builtin_rintf(y * 1.44269504088896341f);
  float r = fusedf(n, -0.693359375f, y), p = 1.9875691500e-4f;
  r = fusedf(n, 2.12194440e-4f, r);
  p = fusedf(p, r, 1.3981999507e-3f);
  p = fusedf(p, r, 8.3334519073e-3f);
  p = fusedf(p, r, 4.1665795894e-2f);
  p = fusedf(p, r, 1.6666665459e-1f);
  p = fusedf(p, r, 5.0000001201e-1f);
  p = scale_by_power_of_two(fusedf(p, r * r, r) + 1.f, (int32_t)n);
  return x <= -104.f ? 0.f : p;
}
/* x = 2^e m with m in [sqrt(1/2), sqrt(2)); returns log(m), sets *e. */
INLINE float log_of_mantissa(float x, float *exponent) {
  float normal = x < 1.17549435e-38f ? x * 8388608.f : x;
  int32_t offset = (int32_t)(bits_of_float(normal) - 0x3f3504f3u);
  float f = float_of_bits((uint32_t)(offset & 0x7fffff) + 0x3f3504f3u) - 1.f, z = f * f, p = 7.0376836292e-2f;
  *exponent = (float)((offset >> 23) - (x < 1.17549435e-38f ? 23 : 0));
  p = fusedf(p, f, -1.1514610310e-1f);
  p = fusedf(p, f, 1.1676998740e-1f);
  p = fusedf(p, f, -1.2420140846e-1f);
  p = fusedf(p, f, 1.4249322787e-1f);
  p = fusedf(p, f, -1.6668057665e-1f);
  p = fusedf(p, f, 2.0000714765e-1f);
  p = fusedf(p, f, -2.4999993993e-1f);
  p = fusedf(p, f, 3.3333331174e-1f);
  return fusedf(p * f, z, fusedf(-0.5f, z, f));
}
INLINE float log_special(float x, float y) { /* log(0) = -inf, log(inf) = inf, log of a negative number or NaN = NaN */
  y = x == 0.f ? -INFINITY : y;
  y = x == INFINITY ? INFINITY : y;
  return (x < 0.f) | (x != x) ? NAN : y;
}
INLINE float fast_log(float x) {
  float e, m = log_of_mantissa(x, &e);
  return log_special(x, fusedf(e, 0.693359375f, fusedf(e, -2.12194440e-4f, m)));
}
INLINE float fast_log2(float x) {
  float e, m = log_of_mantissa(x, &e);
  return log_special(x, fusedf(m, 1.44269504088896341f, e));
}
INLINE float fast_tanh(float x) {
  float a = __builtin_fabsf(x), z = x * x, p = -5.70498872745e-3f;
  float e = fast_exp(-2.f * a), large = (1.f - e) / (1.f + e);
  p = fusedf(p, z, 2.06390887954e-2f);
  p = fusedf(p, z, -5.37397155531e-2f);
  p = fusedf(p, z, 1.33314422036e-1f);
  p = fusedf(p, z, -3.33332819422e-1f);
  return a < 0.625f ? fusedf(p * z, x, x) : x < 0.f ? -large : large;
}
INLINE float fast_rsqrt(float x) { return 1.f / sqrtf(x); }

/* ---- vectors: the register tiles of tl.dot ------------------------------------------------------------------------
 * Only in kernels that use them: the compiler needs 0.1 s for immintrin.h alone. */
#ifdef USES_VECTORS
#if defined(__x86_64__)
#include <immintrin.h>
#endif
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#if LANES == 16 && defined(__AVX512F__)
INLINE vec vec_fused(vec a, vec b, vec c) { return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
INLINE vec vec_from_bf16(const uint16_t *p) {
  return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
}
INLINE vec vec_from_f16(const uint16_t *p) { return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE vec vec_from_int8_t(const int8_t *p) {
  return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
#elif LANES == 8 && defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
INLINE vec vec_fused(vec a, vec b, vec c) { return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
INLINE vec vec_from_bf16(const uint16_t *p) {
  return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
}
INLINE vec vec_from_f16(const uint16_t *p) { return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE vec vec_from_int8_t(const int8_t *p) {
  return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
#else
INLINE vec vec_fused(vec a, vec b, vec c) { for (int i = 0; i < LANES; i++) c[i] = fusedf(a[i], b[i], c[i]); return c; }
INLINE vec vec_from_bf16(const uint16_t *p) { vec v; for (int i = 0; i < LANES; i++) v[i] = bf16_to_float(p[i]); return v; }
INLINE vec vec_from_f16(const uint16_t *p) { vec v; for (int i = 0; i < LANES; i++) v[i] = f16_to_float(p[i]); return v; }
INLINE vec vec_from_int8_t(const int8_t *p) { vec v; for (int i = 0; i < LANES; i++) v[i] = p[i]; return v; }
#endif
INLINE vec vec_from_float(const float *p) { return *(const vec *)p; }
INLINE vec vec_splat(float x) { return x - (vec){0}; } /* x - 0 is x, sign of zero included: one broadcast */

/* Integers, for the register-tile loops of registers.py: LANES words, or four bytes in each word. */
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef int16_t halves __attribute__((vector_size(4 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
INLINE ivec ivec_splat(int32_t x) { return x - (ivec){0}; }
#define IN_MEMORY(array) __asm__ volatile("" : "+m"(array)) /* what follows reads it from there */
INLINE int32_t four_bytes(const void *p) { int32_t word; memcpy(&word, p, 4); return word; }
typedef int32_t four_words __attribute__((vector_size(16), aligned(4), may_alias));
typedef int16_t eight_halves __attribute__((vector_size(16), aligned(1), may_alias));
typedef int16_t sixteen_halves __attribute__((vector_size(32), aligned(1), may_alias));
typedef int32_t eight_words __attribute__((vector_size(32), aligned(4), may_alias));
INLINE void flip_bytes(int32_t *to, const void *from, int words) { /* gcc would do it bit by bit */
  for (; words >= 8; words -= 8, to += 8, from = (const char *)from + 32)
    *(eight_words *)to = *(const eight_words *)from ^ (int32_t)0x80808080;
  for (; words >= 4; words -= 4, to += 4, from = (const char *)from + 16)
    *(four_words *)to = *(const four_words *)from ^ (int32_t)0x80808080;
  for (int i = 0; i < words; i++) to[i] = four_bytes((const char *)from + 4 * i) ^ 0x80808080;
}
/* Shifts of bytes by a number that is known at run time only. */
INLINE bytes bytes_shifted_right(bytes x, int by) { return (bytes)((halves)x >> (int16_t)by) & (uint8_t)(255 >> by); }
INLINE bytes bytes_shifted_left(bytes x, int by) { return (bytes)((halves)x << (int16_t)by) & (uint8_t)(255 << by); }
/* Tables of 16 elements, picked by numbers from 0 to 15. */
#if LANES == 16 && defined(__AVX512BW__)
INLINE bytes bytes_of_table(const void *p) { return (bytes)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p)); }
INLINE bytes bytes_picked(bytes table, bytes index) { return (bytes)_mm512_shuffle_epi8((__m512i)table, (__m512i)index); }
INLINE ivec ivec_picked(const ivec *table, ivec index) {
  return (ivec)_mm512_permutexvar_epi32((__m512i)index, (__m512i)*table);
}
#elif LANES == 8 && defined(__AVX2__)
INLINE bytes bytes_of_table(const void *p) { return (bytes)_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p)); }
INLINE bytes bytes_picked(bytes table, bytes index) { return (bytes)_mm256_shuffle_epi8((__m256i)table, (__m256i)index); }
INLINE ivec ivec_picked(const ivec *table, ivec index) { /* an instruction looks at three bits; the fourth selects */
  __m256 low = (__m256)_mm256_permutevar8x32_epi32((__m256i)table[0], (__m256i)index);
  __m256 high = (__m256)_mm256_permutevar8x32_epi32((__m256i)table[1], (__m256i)index);
  return (ivec)_mm256_blendv_ps(low, high, (__m256)(index << 28));
}
#else
INLINE bytes bytes_of_table(const void *p) { bytes v; for (int i = 0; i < 4 * LANES; i++) v[i] = ((const uint8_t *)p)[i % 16]; return v; }
INLINE bytes bytes_picked(bytes table, bytes index) { bytes v; for (int i = 0; i < 4 * LANES; i++) v[i] = table[index[i]]; return v; }
INLINE ivec ivec_picked(const ivec *table, ivec index) {
  ivec v; for (int i = 0; i < LANES; i++) v[i] = ((const int32_t *)table)[index[i]]; return v;
}
#endif
INLINE ivec ivec_lane_numbers(void) { ivec v; for (int i = 0; i < LANES; i++) v[i] = i; return v; }
INLINE vec vec_select(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }
INLINE ivec ivec_select(ivec mask, ivec a, ivec b) { return (mask & a) | (~mask & b); }
/* Memory is touched where the mask is -1 only. */
#if LANES == 16 && defined(__AVX512DQ__)
INLINE vec vec_from_some(const float *p, ivec mask, vec other) {
  return (vec)_mm512_mask_loadu_ps((__m512)other, _mm512_movepi32_mask((__m512i)mask), p);
}
#define HALF_OF_SOME(p, mask) _mm256_maskz_loadu_epi16(_mm512_movepi32_mask((__m512i)(mask)), p)
INLINE vec vec_from_some_bf16(const uint16_t *p, ivec mask) {
  return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(HALF_OF_SOME(p, mask)), 16);
}
INLINE vec vec_from_some_f16(const uint16_t *p, ivec mask) { return (vec)_mm512_cvtph_ps(HALF_OF_SOME(p, mask)); }
INLINE vec vec_from_some_int8_t(const int8_t *p, ivec mask) {
  __m128i bytes = _mm_maskz_loadu_epi8(_mm512_movepi32_mask((__m512i)mask), p);
  return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
INLINE void vec_store_some(float *p, ivec mask, vec x) { _mm512_mask_storeu_ps(p, _mm512_movepi32_mask((__m512i)mask), (__m512)x); }
#elif LANES == 8 && defined(__AVX2__)
INLINE vec vec_from_some(const float *p, ivec mask, vec other) {
  return vec_select(mask, (vec)_mm256_maskload_ps(p, (__m256i)mask), other);
}
INLINE void vec_store_some(float *p, ivec mask, vec x) { _mm256_maskstore_ps(p, (__m256i)mask, (__m256)x); }
#else
INLINE vec vec_from_some(const float *p, ivec mask, vec other) {
  for (int i = 0; i < LANES; i++) if (mask[i]) other[i] = p[i];
  return other;
}
INLINE void vec_store_some(float *p, ivec mask, vec x) { for (int i = 0; i < LANES; i++) if (mask[i]) p[i] = x[i]; }
#endif
#if LANES == 16 && defined(__AVX512DQ__)
INLINE int ivec_any(ivec mask) { return _mm512_movepi32_mask((__m512i)mask) != 0; }
#elif LANES == 8 && defined(__AVX2__)
INLINE int ivec_any(ivec mask) { return _mm256_movemask_ps((__m256)mask) != 0; }
#else
INLINE int ivec_any(ivec mask) { int any = 0; for (int i = 0; i < LANES; i++) any |= mask[i]; return any; }
#endif
INLINE int ivec_all(ivec mask) { return !ivec_any(~mask); }
#if !(LANES == 16 && defined(__AVX512DQ__))
#define FROM_SOME(name, type)                                     \
  INLINE vec vec_from_some_##name(const type *p, ivec mask) {     \
    type kept[LANES];                                             \
    if (ivec_all(mask)) return vec_from_##name(p);                \
    if (!ivec_any(mask)) return vec_splat(0);                     \
    for (int i = 0; i < LANES; i++) kept[i] = mask[i] ? p[i] : 0; \
    return vec_from_##name(kept);                                 \
  }
FROM_SOME(bf16, uint16_t)
FROM_SOME(f16, uint16_t)
FROM_SOME(int8_t, int8_t)
#endif
INLINE vec vec_from_some_float(const float *p, ivec mask) { return vec_from_some(p, mask, vec_splat(0)); }
INLINE ivec ivec_exchanged(ivec x, int bit) { /* lane i of the result is lane i ^ bit */
#ifdef __clang__
  ivec v; for (int i = 0; i < LANES; i++) v[i] = x[i ^ bit]; return v;
#else
  return __builtin_shuffle(x, ivec_lane_numbers() ^ bit);
#endif
}
INLINE vec vec_exchanged(vec x, int bit) { return (vec)ivec_exchanged((ivec)x, bit); }
/* Of the lanes i and i | bit of a, then of b, the first ones and the second ones. */
INLINE ivec ivec_of_two(ivec a, ivec b, ivec number) { /* of the lanes of a, followed by those of b */
#ifdef __clang__
  ivec v; for (int i = 0; i < LANES; i++) v[i] = number[i] < LANES ? a[number[i]] : b[number[i] - LANES]; return v;
#else
  return __builtin_shuffle(a, b, number);
#endif
}
INLINE ivec ivec_lower(ivec a, ivec b, int bit) {
  ivec i = ivec_lane_numbers(); return ivec_of_two(a, b, (i & ~bit) | (((i & bit) != 0) & LANES));
}
INLINE ivec ivec_upper(ivec a, ivec b, int bit) {
  ivec i = ivec_lane_numbers(); return ivec_of_two(a, b, i | bit | (((i & bit) != 0) & LANES));
}
INLINE vec vec_lower(vec a, vec b, int bit) { return (vec)ivec_lower((ivec)a, (ivec)b, bit); }
INLINE vec vec_upper(vec a, vec b, int bit) { return (vec)ivec_upper((ivec)a, (ivec)b, bit); }
/* The same numbers as max_numf, clamp_numf, fast_exp2 and so on give, in every lane and bit. */
INLINE vec vec_min_num(vec a, vec b) { return vec_select((ivec)(b < a) | (ivec)(a != a), b, a); }
#if LANES == 16 && defined(__AVX512F__)
INLINE vec vec_max_num(vec a, vec b) { /* the instruction gives its second operand where one is NaN */
  __mmask16 nan = _mm512_cmp_ps_mask((__m512)a, (__m512)a, _CMP_UNORD_Q);
  return (vec)_mm512_mask_mov_ps(_mm512_max_ps((__m512)b, (__m512)a), nan, (__m512)b);
}
INLINE ivec ivec_max(ivec a, ivec b) { return (ivec)_mm512_max_epi32((__m512i)a, (__m512i)b); }
INLINE vec vec_rounded(vec x) { return (vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vec vec_where_above(vec x, float limit, vec value) { /* 0 where x <= limit */
  return (vec)_mm512_maskz_mov_ps(_mm512_cmp_ps_mask((__m512)x, (__m512)vec_splat(limit), _CMP_NLE_UQ), (__m512)value);
}
INLINE vec vec_scaled(vec x, vec n) { return (vec)_mm512_scalef_ps((__m512)x, (__m512)n); } /* x 2^n */
#else
INLINE vec vec_max_num(vec a, vec b) { return vec_select((ivec)(b > a) | (ivec)(a != a), b, a); }
INLINE ivec ivec_max(ivec a, ivec b) { return ivec_select((ivec)(b > a), b, a); }
INLINE vec vec_rounded(vec x) { return (x + 0x1.8p23f) - 0x1.8p23f; } /* to the nearest, even, of up to 2^22 */
INLINE vec vec_where_above(vec x, float limit, vec value) { return (vec)((ivec)value & ~(ivec)(x <= limit)); }
INLINE vec vec_scaled(vec x, vec n) {
  ivec whole = __builtin_convertvector(n, ivec), half = whole >> 1;
  return x * (vec)((half + 127) << 23) * (vec)((whole - half + 127) << 23);
}
#endif
INLINE ivec ivec_min(ivec a, ivec b) { return ~ivec_max(~a, ~b); }
INLINE ivec ivec_max_unsigned(ivec a, ivec b) { return ivec_max(a ^ INT32_MIN, b ^ INT32_MIN) ^ INT32_MIN; }
INLINE ivec ivec_min_unsigned(ivec a, ivec b) { return ~ivec_max_unsigned(~a, ~b); }
INLINE vec vec_max_nan(vec a, vec b) { return vec_select((ivec)(a > b) | (ivec)(a != a), a, b); }
INLINE vec vec_min_nan(vec a, vec b) { return vec_select((ivec)(a < b) | (ivec)(a != a), a, b); }
INLINE vec vec_clamp_num(vec x, vec low, vec high) { return vec_min_num(vec_max_num(x, low), high); }
INLINE vec vec_clamp_nan(vec x, vec low, vec high) { return vec_select((ivec)(x != x), x, vec_clamp_num(x, low, high)); }
INLINE vec vec_exp2(vec x) {
#if LANES == 16 && defined(__AVX512DQ__) /* these instructions know infinities and what rounds to 0 */
  vec r = (vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), n = x - r;
#else
  vec y = vec_where_above(x, -150.f, x);
  y = vec_select((ivec)(y > 129.f), vec_splat(129.f), y);
  vec n = vec_rounded(y), r = y - n;
#endif
  vec p = vec_fused(vec_splat(1.535336188319500e-4f), r, vec_splat(1.339887440266574e-3f));
  p = vec_fused(p, r, vec_splat(9.618437357674640e-3f));
  p = vec_fused(p, r, vec_splat(5.550332471162809e-2f));
  p = vec_fused(p, r, vec_splat(2.402264791363012e-1f));
  p = vec_fused(p, r, vec_splat(6.931472028550421e-1f));
  p = vec_scaled(vec_fused(p, r, vec_splat(1.f)), n);
#if LANES == 16 && defined(__AVX512DQ__)
  return p;
#else
  return vec_where_above(x, -150.f, p);
#endif
}
INLINE vec vec_exp(vec x) {
  vec y = vec_where_above(x, -104.f, x);
  y = vec_select((ivec)(y > 89.f), vec_splat(89.f), y);
  vec n = vec_rounded(y * 1.44269504088896341f), p = vec_splat(1.9875691500e-4f);
  vec r = vec_fused(n, vec_splat(2.12194440e-4f), vec_fused(n, vec_splat(-0.693359375f), y));
  p = vec_fused(p, r, vec_splat(1.3981999507e-3f));
  p = vec_fused(p, r, vec_splat(8.3334519073e-3f));
  p = vec_fused(p, r, vec_splat(4.1665795894e-2f));
  p = vec_fused(p, r, vec_splat(1.6666665459e-1f));
  p = vec_fused(p, r, vec_splat(5.0000001201e-1f));
  return vec_where_above(x, -104.f, vec_scaled(vec_fused(p, r * r, r) + 1.f, n));
}
INLINE vec vec_abs(vec x) { return (vec)((ivec)x & 0x7fffffff); }
INLINE ivec ivec_shifted_unsigned(ivec x, ivec by) { return (ivec)((words)x >> (words)by); }
INLINE vec vec_from_unsigned(ivec x) { return __builtin_convertvector((words)x, vec); }
INLINE vec vec_from_ivec(ivec x) { return __builtin_convertvector(x, vec); }
INLINE ivec ivec_from_vec(vec x) { return __builtin_convertvector(x, ivec); } /* towards 0 */
#if LANES == 16 && defined(__AVX512F__)
INLINE ivec ivec_from_int8_t(const int8_t *p) { return (ivec)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)); }
INLINE void ivec_to_int8_t(int8_t *p, ivec x) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8((__m512i)x)); } /* low bytes */
#define MULTIPLY_ADD_PAIRS(a, b) (ivec)_mm512_madd_epi16((__m512i)(a), (__m512i)(b))
#define MULTIPLY_ADD_BYTES(u, s) (halves)_mm512_maddubs_epi16((__m512i)(u), (__m512i)(s))
#elif LANES == 8 && defined(__AVX2__)
INLINE ivec ivec_from_int8_t(const int8_t *p) { return (ivec)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
INLINE void ivec_to_int8_t(int8_t *p, ivec x) { /* low bytes: of each half's words the first four */
  __m256i low = _mm256_shuffle_epi8((__m256i)x, _mm256_set1_epi32(0x0c080400));
  __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  _mm_storel_epi64((__m128i *)p, both);
}
#define MULTIPLY_ADD_PAIRS(a, b) (ivec)_mm256_madd_epi16((__m256i)(a), (__m256i)(b))
#define MULTIPLY_ADD_BYTES(u, s) (halves)_mm256_maddubs_epi16((__m256i)(u), (__m256i)(s))
#else
INLINE ivec ivec_from_int8_t(const int8_t *p) { ivec v; for (int i = 0; i < LANES; i++) v[i] = p[i]; return v; }
INLINE void ivec_to_int8_t(int8_t *p, ivec x) { for (int i = 0; i < LANES; i++) p[i] = (int8_t)x[i]; }
#if LANES == 4 && defined(__SSE2__)
#define MULTIPLY_ADD_PAIRS(a, b) (ivec)_mm_madd_epi16((__m128i)(a), (__m128i)(b))
#endif
#endif
/* fp8 without multiplications of subnormal floats, which may be slow. */
#if LANES == 16 && defined(__AVX512F__)
/* 2^(e - 7) (1 + m / 8), or 2^-6 m / 8 where e is 0: what e and the sign decide, and eighths, are picked from tables. */
#define OF_EXPONENTS(of, first) \
  _mm512_set_ps(of(8), of(7), of(6), of(5), of(4), of(3), of(2), of(1), of(0), of(-1), of(-2), of(-3), of(-4), of(-5), of(-6), first)
#define POWER(e) ((float)(1 << (e + 6)) / 64)
#define MINUS_POWER(e) -POWER(e)
#define EIGHTHS 7 / 8.f, 6 / 8.f, 5 / 8.f, 4 / 8.f, 3 / 8.f, 2 / 8.f, 1 / 8.f, 0
INLINE vec vec_of_e4m3(ivec codes) {
  const __m512 units = OF_EXPONENTS(POWER, POWER(-6)), minus_units = OF_EXPONENTS(MINUS_POWER, MINUS_POWER(-6));
  const __m512 ones = OF_EXPONENTS(POWER, 0.f), minus_ones = OF_EXPONENTS(MINUS_POWER, -0.f);
  __m512i e = _mm512_srli_epi32((__m512i)codes, 3); /* an instruction looks at as many bits as its table needs */
  __m512 unit = _mm512_permutex2var_ps(units, e, minus_units), one = _mm512_permutex2var_ps(ones, e, minus_ones);
  __m512i x = (__m512i)_mm512_fmadd_ps(unit, _mm512_permutexvar_ps((__m512i)codes, _mm512_set_ps(EIGHTHS, EIGHTHS)), one);
  __mmask16 nan = _mm512_cmpeq_epi32_mask((__m512i)(codes | -128), _mm512_set1_epi32(-1));
  return (vec)_mm512_mask_or_epi32(x, nan, x, _mm512_set1_epi32(0x7fc00000));
}
INLINE vec vec_from_e4m3(const uint8_t *p) { return vec_of_e4m3(ivec_from_int8_t((const int8_t *)p)); }
#elif LANES == 8 && defined(__AVX2__) && defined(__F16C__)
INLINE vec vec_of_eight_e4m3(__m128i codes) { /* as f16 of a 256th: its conversion knows subnormals */
  __m128i f16 = _mm_and_si128(_mm_slli_epi16(codes, 7), _mm_set1_epi16((short)0xbfff));
  vec x = (vec)_mm256_cvtph_ps(f16) * 256.f;
  return (vec)((ivec)x | ((ivec)(vec_abs(x) == 480.f) & 0x7fc00000));
}
INLINE vec vec_from_e4m3(const uint8_t *p) { return vec_of_eight_e4m3(_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)p))); }
INLINE vec vec_of_e4m3(ivec codes) {
  __m256i packed = _mm256_packs_epi32((__m256i)codes, (__m256i)codes);
  return vec_of_eight_e4m3(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}
#else
INLINE vec vec_of_e4m3(ivec codes) { vec v; for (int i = 0; i < LANES; i++) v[i] = e4m3_to_float((uint8_t)codes[i]); return v; }
INLINE vec vec_from_e4m3(const uint8_t *p) { vec v; for (int i = 0; i < LANES; i++) v[i] = e4m3_to_float(p[i]); return v; }
#endif
/* The four products in two steps where no instruction adds them at once: two of them go into each half of a word, as a
 * sum that the caller knows to fit, then the halves into the word. Or bytes become halves before, the even ones and the
 * odd ones of words; of those any products fit. */
#ifdef MULTIPLY_ADD_BYTES
/* gcc would put off all additions till the last, and keep every product until then. */
#define AT_ONCE(sum) __asm__("" : "+v"(sum))
INLINE halves dot2_of_bytes(bytes u, bytes s) { return MULTIPLY_ADD_BYTES(u, s); }
INLINE halves add_dot2_of_bytes(halves sum, bytes u, bytes s) { sum += MULTIPLY_ADD_BYTES(u, s); AT_ONCE(sum); return sum; }
INLINE ivec add_dot2_of_halves(ivec sum, halves a, halves b) { sum += MULTIPLY_ADD_PAIRS(a, b); AT_ONCE(sum); return sum; }
INLINE ivec add_halves(ivec sum, halves x) { return sum + MULTIPLY_ADD_PAIRS(x, (halves){0} + 1); }
INLINE halves even_bytes(bytes x) { return (halves)x << 8 >> 8; }
INLINE halves odd_bytes(bytes x) { return (halves)x >> 8; }
INLINE halves unsigned_even_bytes(bytes x) { return (halves)x & 255; }
INLINE halves unsigned_odd_bytes(bytes x) { return (halves)x >> 8 & 255; }
INLINE void widen_bytes(int32_t *even, int32_t *odd, const void *from, int words) { /* a multiple of four words */
  for (; words >= 8; words -= 8, even += 8, odd += 8, from = (const char *)from + 32) {
    *(sixteen_halves *)even = *(const sixteen_halves *)from << 8 >> 8;
    *(sixteen_halves *)odd = *(const sixteen_halves *)from >> 8;
  }
  for (; words > 0; words -= 4, even += 4, odd += 4, from = (const char *)from + 16) {
    *(eight_halves *)even = *(const eight_halves *)from << 8 >> 8;
    *(eight_halves *)odd = *(const eight_halves *)from >> 8;
  }
}
#endif
/* sum[i] + the four products of word i's unsigned bytes in u with its signed ones in s. Exact: nothing saturates. */
INLINE ivec add_dot4(ivec sum, bytes u, bytes s) {
#if LANES == 16 && defined(__AVX512VNNI__)
  return (ivec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)u, (__m512i)s);
#elif LANES == 8 && defined(__AVXVNNI__)
  return (ivec)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)u, (__m256i)s);
#elif defined(MULTIPLY_ADD_PAIRS) /* even and odd bytes as 16-bit numbers */
  sum += MULTIPLY_ADD_PAIRS((halves)u & 255, ((halves)s << 8) >> 8);
  return sum + MULTIPLY_ADD_PAIRS(((halves)u >> 8) & 255, (halves)s >> 8);
#else
  for (int i = 0; i < 32; i += 8) sum += ((ivec)u >> i & 255) * ((ivec)s << (24 - i) >> 24);
  return sum;
#endif
}
/* Products of bf16 in pairs, pairs.py. */
#if LANES == 16 && defined(__AVX512BF16__)
typedef uint16_t half __attribute__((vector_size(2 * LANES), aligned(2), may_alias)); /* of a vector: bf16 of a row */
INLINE half half_splat(float x) { return float_to_bf16(x) - (half){0}; }
INLINE half half_from_bf16(const uint16_t *p) { return *(const half *)p; }
INLINE half half_from_some_bf16(const uint16_t *p, ivec mask) { return (half)HALF_OF_SOME(p, mask); }
INLINE ivec pairs_of(half even, half odd) {
  const __m512i order = _mm512_mullo_epi32(_mm512_set1_epi32(0x10001), (__m512i)ivec_lane_numbers());
  __m512i low = _mm512_castsi256_si512((__m256i)even), high = _mm512_castsi256_si512((__m256i)odd);
  return (ivec)_mm512_permutex2var_epi16(low, _mm512_or_si512(order, _mm512_set1_epi32(32 << 16)), high);
}
INLINE int32_t pair_of(float even, float odd) { return bits_of_float(even) >> 16 | (bits_of_float(odd) & 0xffff0000u); }
INLINE vec add_dot2(vec sum, ivec a, ivec b) { return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
INLINE float add_dot2_to_one(float sum, int32_t a, int32_t b) {
  return _mm_cvtss_f32(_mm_dpbf16_ps(_mm_set_ss(sum), (__m128bh)_mm_cvtsi32_si128(a), (__m128bh)_mm_cvtsi32_si128(b)));
}
#endif
#endif

/* ---- atomics: any operation on any word, by compare and swap; they return the old value -------------------------- */
#ifdef USES_ATOMICS
/* Of small floats `from_memory` and `to_memory` convert codes; of others they are nothing. */
#define ATOMIC(kind, suffix, type, memory, word, from_memory, to_memory, combined)                                     \
  static inline type atomic_##kind##_##suffix(memory *p, type operand) {                                               \
    word seen = __atomic_load_n((word *)p, __ATOMIC_RELAXED), wanted;                                                  \
    memory before, after;                                                                                              \
    type old;                                                                                                          \
    do {                                                                                                               \
      memcpy(&before, &seen, sizeof before);                                                                           \
      old = from_memory(before);                                                                                       \
      after = to_memory(combined);                                                                                     \
      memcpy(&wanted, &after, sizeof wanted);                                                                          \
    } while (!__atomic_compare_exchange_n((word *)p, &seen, wanted, 1, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED));           \
    return old;                                                                                                        \
  }
#define EXCHANGES(suffix, type, memory, word, from_memory, to_memory)                                                  \
  ATOMIC(exch, suffix, type, memory, word, from_memory, to_memory, operand)                                            \
  static inline type atomic_cas_##suffix(memory *p, type expected, type desired) { /* of bits, whatever they mean */   \
    memory before = to_memory(expected), after = to_memory(desired);                                                   \
    word seen, wanted;                                                                                                 \
    memcpy(&seen, &before, sizeof seen);                                                                               \
    memcpy(&wanted, &after, sizeof wanted);                                                                            \
    __atomic_compare_exchange_n((word *)p, &seen, wanted, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);                      \
    memcpy(&before, &seen, sizeof seen);                                                                               \
    return from_memory(before);                                                                                        \
  }
#define LIMITS(suffix, type, word)                                                                                     \
  ATOMIC(max, suffix, type, type, word, , , old > operand ? old : operand)                                             \
  ATOMIC(min, suffix, type, type, word, , , old < operand ? old : operand)
#define INTEGER_ATOMICS(suffix, type, word)                                                                            \
  EXCHANGES(suffix, type, type, word, , )                                                                              \
  LIMITS(suffix, type, word)                                                                                           \
  ATOMIC(add, suffix, type, type, word, , , old + operand)                                                             \
  ATOMIC(umax, suffix, type, type, word, , , (word)old > (word)operand ? old : operand)                                \
  ATOMIC(umin, suffix, type, type, word, , , (word)old < (word)operand ? old : operand)                                \
  ATOMIC(and, suffix, type, type, word, , , old & operand)                                                             \
  ATOMIC(or, suffix, type, type, word, , , old | operand)                                                              \
  ATOMIC(xor, suffix, type, type, word, , , old ^ operand)
#define FLOAT_ATOMICS(suffix, type, word)                                                                              \
  EXCHANGES(suffix, type, type, word, , )                                                                              \
  LIMITS(suffix, type, word)                                                                                           \
  ATOMIC(fadd, suffix, type, type, word, , , old + operand)
#define SMALL_FLOAT_ATOMICS(name)                                                                                      \
  EXCHANGES(name, float, uint16_t, uint16_t, name##_to_float, float_to_##name)                                         \
  ATOMIC(fadd, name, float, uint16_t, uint16_t, name##_to_float, float_to_##name, round_##name(old + operand))
EXCHANGES(i16, int16_t, int16_t, uint16_t, , )
INTEGER_ATOMICS(i32, int32_t, uint32_t)
INTEGER_ATOMICS(i64, int64_t, uint64_t)
FLOAT_ATOMICS(f32, float, uint32_t)
FLOAT_ATOMICS(f64, double, uint64_t)
SMALL_FLOAT_ATOMICS(f16)
SMALL_FLOAT_ATOMICS(bf16)
#endif

#ifdef USES_POLL
#include <sched.h>
#include <time.h>
static inline int64_t nanoseconds(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec * INT64_C(1000000000) + t.tv_nsec; }
static inline int64_t deadline_after(uint64_t time) { return nanoseconds() + (int64_t)(time < INT64_MAX / 2 ? time : INT64_MAX / 2); }
#define POLL(suffix, type)                                                                           \
  static inline _Bool atomic_poll_##suffix(type *p, type expected, int64_t deadline) {               \
    while (__atomic_load_n(p, __ATOMIC_ACQUIRE) != expected) {                                       \
      if (nanoseconds() >= deadline) return 0;                                                       \
      sched_yield(); /* the program that it waits for may want this core */                          \
    }                                                                                                \
    return 1;                                                                                        \
  }
POLL(i16, int16_t)
POLL(i32, int32_t)
POLL(i64, int64_t)
#endif

/* ---- failures: a program that finds something wrong says so and ends; the others of its launch run. The launch's
 * `struct failure` (the same is in runtime.py) keeps the words of the first program of the grid that failed. --------- */
#ifdef USES_FAILURES
#include <setjmp.h>
#include <stdarg.h>
struct failure { int64_t count, program; int32_t locked, kind; char message[4072]; };
enum { ASSERTION, OUT_OF_BOUNDS };
static _Thread_local struct failure *failure_of_launch;
static _Thread_local long current_program;
static _Thread_local jmp_buf end_of_program;
__attribute__((cold, noinline, noreturn)) static void fail(int kind, const char *format, ...) {
  struct failure *failure = failure_of_launch;
  while (__atomic_exchange_n(&failure->locked, 1, __ATOMIC_ACQUIRE)) {}
  if (!failure->count++ || current_program < failure->program) {
    va_list values;
    va_start(values, format);
    vsnprintf(failure->message, sizeof failure->message, format, values);
    va_end(values);
    failure->program = current_program;
    failure->kind = kind;
  }
  __atomic_store_n(&failure->locked, 0, __ATOMIC_RELEASE);
  longjmp(end_of_program, 1);
}
#endif

/* ---- bounds: where an argument points, and the bytes [begin, end) that belong to it (see bounds.py) ---------------- */
#ifdef CHECKS_BOUNDS
struct extent { uintptr_t pointer, begin, end; };
struct argument { const char *name; int bytes; }; /* of an element */
static _Thread_local const struct extent *extents_of_launch; /* a function keeps it in a variable, `extents` */

/* Do `bytes` from an address on lie in none of some arguments? */
static inline int is_outside(
    const struct extent *extents, const void *address, size_t bytes, const int *arguments, int count) {
  uintptr_t first = (uintptr_t)address;
  for (int i = 0; i < count; i++) {
    const struct extent *extent = &extents[arguments[i]];
    if (first >= extent->begin && first < extent->end && bytes <= extent->end - first) return 0;
  }
  return 1;
}

/* Before an atomic operation, by which a program may wait for what one that has failed was to do. */
static inline void end_if_another_failed(void) {
  if (__atomic_load_n(&failure_of_launch->count, __ATOMIC_RELAXED)) longjmp(end_of_program, 1);
}

static int64_t divided_down(int64_t bytes, int64_t size) { return (bytes - (bytes < 0) * (size - 1)) / size; }

/* `format` is for the values that follow: what accesses the address, and where. Named is the nearest argument. */
__attribute__((cold, noinline, noreturn)) static void out_of_bounds(
    const struct argument *known, const void *address, const int *arguments, int count, const char *format, ...) {
  char access[2048], elements[64] = "no elements";
  va_list values;
  va_start(values, format);
  vsnprintf(access, sizeof access, format, values);
  va_end(values);
  const struct extent *extents = extents_of_launch;
  uintptr_t place = (uintptr_t)address, least = UINTPTR_MAX;
  int nearest = arguments[0];
  for (int i = 0; i < count; i++) {
    const struct extent *extent = &extents[arguments[i]];
    uintptr_t end = extent->end, distance = place < extent->begin ? extent->begin - place : place > end ? place - end : 0;
    if (distance < least) least = distance, nearest = arguments[i];
  }
  struct extent extent = extents[nearest];
  const char *name = known[nearest].name;
  int64_t size = known[nearest].bytes, index = divided_down(place - extent.pointer, size);
  if (extent.begin < extent.end) {
    int64_t low = divided_down(extent.begin - extent.pointer, size);
    int64_t high = divided_down(extent.end - 1 - extent.pointer, size);
    snprintf(elements, sizeof elements, "elements %lld to %lld", (long long)low, (long long)high);
  }
  fail(OUT_OF_BOUNDS, "%s: %s[%lld] is out of bounds, as %s has %s", access, name, (long long)index, name, elements);
}

/* An lvalue in memory that must belong to one of some arguments; what follows them says who accesses it. */
#define CHECKED(place, arguments, ...) \
  (*({ \
    __auto_type at = &(place); \
    enum { COUNT = sizeof arguments / sizeof(int) }; \
    if (is_outside(extents, at, sizeof *at, arguments, COUNT)) \
      out_of_bounds(known_arguments, at, arguments, COUNT, __VA_ARGS__); \
    at; \
  }))
#endif
