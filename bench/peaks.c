/* What this machine can do at most, measured on the same thread pool as the kernels: each program is one thread's share.
 * Compiled by bench/backend.py with LANES defined, like every kernel. */
#include <stdint.h>
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
