/* The thread pool: runs a list of launches ("plan"), each a grid of independent programs, one launch after the other.
 *
 * Every thread walks the same list. At a launch it claims chunks of programs from a shared word until none are left, and
 * goes on once all chunks of that launch are done. Nothing is handed from the caller to a worker, so a launch inside a
 * plan costs two or three cache misses and no system call; and the caller never waits for a worker that has not
 * claimed a chunk, so a busy machine slows it down by no more than the lost core.
 *
 * A worker may be put to sleep by the system anywhere and wake up much later. So every execution of a plan has a number
 * of its own, its generation, and the words `claimed` and `done` hold (generation << 32 | count). A worker from an old
 * generation sees a newer one there and claims nothing; the first thread of a new one starts the count again.
 */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef void (*programs)(const void *arguments, long begin, long end, const int *grid);

struct launch {
  programs run;
  const void *arguments;
  int grid[3];
  uint32_t chunk, chunks; /* programs per claim, number of claims */
  _Atomic uint64_t claimed;
  char apart[64]; /* the two words are written by different threads at the same time */
  _Atomic uint64_t done;
};

struct plan {
  int64_t count;
  _Atomic uint32_t generation;
  struct launch *launches;
};

enum { SPINS_BEFORE_SLEEP = 4000, SPINS_BEFORE_YIELD = 2000, CHUNKS_PER_THREAD = 8, STACK_BYTES = 16 << 20 };

static pthread_mutex_t one_caller = PTHREAD_MUTEX_INITIALIZER;
static _Atomic(struct plan *) current;
static _Atomic uint32_t calls, sleepers;
static uint32_t generations;
static int threads = 1;

static inline void pause_briefly(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

static inline int newer(uint64_t word, uint32_t generation) { return (int32_t)((uint32_t)(word >> 32) - generation) > 0; }

/* Adds one to a word, which counts from 0 if it is of an older generation. Returns the old count, or `limit` and adds
 * nothing if the count has reached `limit` or the word is of a newer generation. */
static uint32_t count_up(_Atomic uint64_t *word, uint32_t generation, uint32_t limit) {
  uint64_t seen = atomic_load(word), start = (uint64_t)generation << 32;
  for (;;) {
    uint64_t from = (uint32_t)(seen >> 32) == generation ? seen : start;
    if (newer(seen, generation) || (uint32_t)from >= limit) return limit;
    if (atomic_compare_exchange_weak(word, &seen, from + 1)) return (uint32_t)from;
  }
}

static int finished(struct launch *launch, uint32_t generation) {
  uint64_t word = atomic_load(&launch->done);
  return newer(word, generation) || ((uint32_t)(word >> 32) == generation && (uint32_t)word == launch->chunks);
}

static void walk(struct plan *plan, uint32_t generation) {
  for (int64_t i = 0; i < plan->count; i++) {
    struct launch *launch = &plan->launches[i];
    for (;;) {
      /* Fields first, claim second: a claim that succeeds proves that they belonged to this generation. */
      programs run = launch->run;
      const void *arguments = launch->arguments;
      int grid[3] = {launch->grid[0], launch->grid[1], launch->grid[2]};
      long chunk = launch->chunk, total = (long)grid[0] * grid[1] * grid[2];
      uint32_t chunks = launch->chunks, claim = count_up(&launch->claimed, generation, chunks);
      if (claim == chunks) break;
      long begin = claim * chunk, end = begin + chunk;
      run(arguments, begin, end < total ? end : total, grid);
      count_up(&launch->done, generation, UINT32_MAX);
    }
    for (int spins = 0; !finished(launch, generation);) {
      pause_briefly();
      if (++spins > SPINS_BEFORE_YIELD) sched_yield(), spins = 0;
    }
  }
}

static void *worker(void *unused) {
  uint32_t seen = 0;
  for (;;) {
    for (int spins = 0; atomic_load(&calls) == seen && spins < SPINS_BEFORE_SLEEP; spins++) pause_briefly();
    if (atomic_load(&calls) == seen) {
      atomic_fetch_add(&sleepers, 1);
      while (atomic_load(&calls) == seen) syscall(SYS_futex, &calls, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
      atomic_fetch_sub(&sleepers, 1);
    }
    seen = atomic_load(&calls);
    struct plan *plan = atomic_load(&current);
    if (plan) walk(plan, atomic_load(&plan->generation));
  }
  return NULL;
}

/* A child process has no workers: it computes alone. */
static void after_fork(void) {
  threads = 1;
  pthread_mutex_init(&one_caller, NULL);
}

/* A core for each worker, none for the caller, who takes the one that is left: usually the one it runs on now. */
static void pin(pthread_attr_t *attributes, int number, const cpu_set_t *allowed, int callers_core) {
  for (int core = 0; core < CPU_SETSIZE; core++) {
    if (!CPU_ISSET(core, allowed) || core == callers_core || --number > 0) continue;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(core, &one);
    pthread_attr_setaffinity_np(attributes, sizeof one, &one);
    return;
  }
}

/* Starts workers until `wanted` threads compute, the caller counted; with `pinned`, each stays on a core of its own. */
int fd_start(int wanted, int pinned) {
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, STACK_BYTES);
  if (threads == 1) pthread_atfork(NULL, NULL, after_fork);
  cpu_set_t allowed;
  pinned = pinned && !sched_getaffinity(0, sizeof allowed, &allowed);
  int callers_core = sched_getcpu();
  for (; threads < wanted; threads++) {
    pthread_t thread;
    if (pinned) pin(&attributes, threads, &allowed, callers_core);
    if (pthread_create(&thread, &attributes, worker, NULL)) break;
    pthread_detach(thread);
  }
  return threads;
}

static void fill(struct launch *launch, programs run, const void *arguments, const int *grid) {
  long total = (long)grid[0] * grid[1] * grid[2];
  long chunk = threads > 1 ? total / ((long)threads * CHUNKS_PER_THREAD) : total;
  launch->run = run;
  launch->arguments = arguments;
  for (int i = 0; i < 3; i++) launch->grid[i] = grid[i];
  launch->chunk = chunk < 1 ? 1 : chunk > INT32_MAX ? INT32_MAX : (uint32_t)chunk;
  launch->chunks = (uint32_t)((total + launch->chunk - 1) / launch->chunk);
}

static void execute(struct plan *plan, uint32_t generation) {
  atomic_store(&plan->generation, generation);
  if (threads > 1) {
    atomic_store(&current, plan);
    atomic_fetch_add(&calls, 1);
    if (atomic_load(&sleepers)) syscall(SYS_futex, &calls, FUTEX_WAKE_PRIVATE, threads - 1, NULL, NULL, 0);
  }
  walk(plan, generation);
}

/* One launch is a plan of one, always the same one: it is closed to old generations before its fields change. */
void fd_launch(programs run, const void *arguments, int x, int y, int z) {
  static struct launch launch;
  static struct plan plan = {1, 0, &launch};
  int grid[3] = {x, y, z};
  if (threads == 1 || (long)x * y * z <= 1) {
    run(arguments, 0, (long)x * y * z, grid);
    return;
  }
  pthread_mutex_lock(&one_caller);
  uint32_t generation = ++generations;
  atomic_store(&launch.claimed, (uint64_t)generation << 32 | UINT32_MAX);
  fill(&launch, run, arguments, grid);
  atomic_store(&launch.claimed, (uint64_t)generation << 32);
  execute(&plan, generation);
  pthread_mutex_unlock(&one_caller);
}

struct recorded {
  programs run;
  const void *arguments;
  int grid[4];
};

struct plan *fd_plan_new(const struct recorded *list, int64_t count) {
  struct plan *plan = calloc(1, sizeof *plan);
  plan->launches = calloc(count ? count : 1, sizeof *plan->launches);
  plan->count = count;
  for (int64_t i = 0; i < count; i++) fill(&plan->launches[i], list[i].run, list[i].arguments, list[i].grid);
  return plan;
}

void fd_plan_replay(struct plan *plan) {
  pthread_mutex_lock(&one_caller);
  execute(plan, ++generations);
  pthread_mutex_unlock(&one_caller);
}
