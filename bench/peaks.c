/* What this machine can do at most, measured on the same thread pool as the kernels: each program is one thread's share.
 * Compiled by bench/backend.py with LANES defined, like every kernel. */
#include <stdint.h>
#ifdef __x86_64__
#include <immintrin.h>
#define SOME_VALUE(vector) __asm__("" : "+x"(vector)) /* so the compiler believes */
#else
#define SOME_VALUE(vector) __asm__("" : "+w"(vector))
#endif
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4 * LANES), may_alias));

struct arguments { const vec *data; int64_t vectors_per_program; float *sink; int64_t rounds; };

/* Reads a buffer once, in order, with eight running sums and a prefetch per cache line, as the kernels do. */
void read_memory(const struct arguments *a, long begin, long end, const int *grid) {
  for (long program = begin; program < end; program++) {
    const vec *data = a->data + program * a->vectors_per_program;
    vec sum[8] = {0};
    for (int64_t i = 0; i < a->vectors_per_program; i += 8) {
      for (int j = 0; j < 8; j++) {
        __builtin_prefetch((const char *)(data + i + j) + 4096);
        sum[j] += data[i + j];
      }
    }
    for (int j = 1; j < 8; j++) sum[0] += sum[j];
    a->sink[program * 16] = sum[0][0] + sum[0][1];
  }
}

/* Twelve independent chains of multiply-adds: as fast as this CPU can compute. (They hide a latency of 4 cycles, and fit
 * 16 registers: with sixteen chains AVX2 shows two thirds of what it can do.) */
#define CHAINS 12
void multiply_add(const struct arguments *a, long begin, long end, const int *grid) {
  for (long program = begin; program < end; program++) {
    vec x = a->data[0], y = a->data[1], sum[CHAINS];
    for (int j = 0; j < CHAINS; j++) sum[j] = x * (float)j; /* all different, or the compiler would compute one for all */
    for (int64_t i = 0; i < a->rounds; i++)
#pragma GCC unroll 12
      for (int j = 0; j < CHAINS; j++) sum[j] = sum[j] * x + y;
    for (int j = 1; j < CHAINS; j++) sum[0] += sum[j];
    a->sink[program * 16] = sum[0][0];
  }
}

/* sum + the four products of each word's bytes, of u without and of s with a sign: the least instructions that this
 * set needs for it (of AVX2 three, for bytes whose pairs fit 16 bits). On 512 bits, 256, or as the compiler likes. */
typedef int32_t words __attribute__((vector_size(4 * LANES), aligned(4 * LANES), may_alias));
static inline words add_products(words sum, words u, words s) {
#if LANES == 16 && defined(__AVX512VNNI__)
  return (words)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)u, (__m512i)s);
#elif LANES == 16 && defined(__AVX512BW__)
  return sum + (words)_mm512_madd_epi16(_mm512_maddubs_epi16((__m512i)u, (__m512i)s), _mm512_set1_epi16(1));
#elif LANES == 8 && defined(__AVXVNNI__)
  return (words)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)u, (__m256i)s);
#elif LANES == 8 && defined(__AVX2__)
  return sum + (words)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)u, (__m256i)s), _mm256_set1_epi16(1));
#else
  for (int i = 0; i < 32; i += 8) sum += (u >> i & 255) * (s << (24 - i) >> 24);
  return sum;
#endif
}

/* Twelve chains of these, which hide a latency of 4 cycles and fit 16 registers. */
void multiply_add_integers(const struct arguments *a, long begin, long end, const int *grid) {
  for (long program = begin; program < end; program++) {
    words u = *(const words *)a->data, s = u, sum[12];
    for (int j = 0; j < 12; j++) sum[j] = u * j;
    for (int64_t i = 0; i < a->rounds; i++)
#pragma GCC unroll 12
      for (int j = 0; j < 12; j++) {
        SOME_VALUE(u); /* or products would be computed once for all */
        sum[j] = add_products(sum[j], u, s);
      }
    for (int j = 1; j < 12; j++) sum[0] += sum[j];
    a->sink[program * 16] = sum[0][0];
  }
}
