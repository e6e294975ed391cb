/* The thread pool: runs a list of launches ("plan"), each a grid of independent programs, one launch after the other.
 *
 * Every thread walks the same list. At a launch it claims chunks of programs from a shared counter until none are left,
 * and goes on once all chunks of that launch are done. Nothing is handed from the caller to a worker, so a launch inside
 * a plan costs two or three cache misses and no system call; and the caller never waits for a worker that has not
 * claimed a chunk, so a busy machine slows it down no more than the lost core does.
 *
 * Counters only grow: replay number g of a plan uses claim numbers [g * chunks, (g + 1) * chunks). A worker that was
 * asleep and wakes up in an old replay finds every claim of its range taken, and does no harm.
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
  int chunk;                /* programs per claim */
  int64_t chunks;
  _Atomic int64_t claimed;
  char apart[64];           /* the two counters are written by different threads at the same time */
  _Atomic int64_t done;
};

struct plan {
  int64_t count;
  _Atomic int64_t replay;   /* number of the replay under way, from 0 */
  struct launch *launches;
};

enum { SPINS_BEFORE_SLEEP = 4000, SPINS_BEFORE_YIELD = 2000, CHUNKS_PER_THREAD = 8, STACK_BYTES = 16 << 20 };

static pthread_mutex_t one_caller = PTHREAD_MUTEX_INITIALIZER;
static _Atomic(struct plan *) current;
static _Atomic uint32_t calls, sleepers;
static int threads = 1;

static inline void pause_briefly(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

static void walk(struct plan *plan, int64_t replay) {
  for (int64_t i = 0; i < plan->count; i++) {
    struct launch *launch = &plan->launches[i];
    int64_t last = (replay + 1) * launch->chunks, first = replay * launch->chunks;
    int64_t claim = atomic_load(&launch->claimed);
    while (claim < last) {
      if (!atomic_compare_exchange_weak(&launch->claimed, &claim, claim + 1)) continue;
      long total = (long)launch->grid[0] * launch->grid[1] * launch->grid[2];
      long begin = (claim - first) * launch->chunk, end = begin + launch->chunk;
      launch->run(launch->arguments, begin, end < total ? end : total, launch->grid);
      atomic_fetch_add(&launch->done, 1);
      claim++;
      claim = atomic_load(&launch->claimed);
    }
    for (int spins = 0; atomic_load(&launch->done) < last;) {
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
    if (plan) walk(plan, atomic_load(&plan->replay));
  }
  return NULL;
}

/* A child process has no workers: it computes alone. */
static void after_fork(void) { threads = 1; pthread_mutex_init(&one_caller, NULL); }

int fd_start(int wanted) {
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, STACK_BYTES);
  if (threads == 1) pthread_atfork(NULL, NULL, after_fork);
  for (; threads < wanted; threads++) {
    pthread_t thread;
    if (pthread_create(&thread, &attributes, worker, NULL)) break;
    pthread_detach(thread);
  }
  return threads;
}

static void prepare(struct launch *launch, programs run, const void *arguments, const int *grid) {
  long total = (long)grid[0] * grid[1] * grid[2];
  long chunk = threads > 1 ? total / ((long)threads * CHUNKS_PER_THREAD) : total;
  launch->run = run;
  launch->arguments = arguments;
  for (int i = 0; i < 3; i++) launch->grid[i] = grid[i];
  launch->chunk = chunk < 1 ? 1 : (int)chunk;
  launch->chunks = (total + launch->chunk - 1) / launch->chunk;
}

static void execute(struct plan *plan) {
  atomic_fetch_add(&plan->replay, 1);
  if (threads > 1) {
    atomic_store(&current, plan);
    atomic_fetch_add(&calls, 1);
    if (atomic_load(&sleepers)) syscall(SYS_futex, &calls, FUTEX_WAKE_PRIVATE, threads - 1, NULL, NULL, 0);
  }
  walk(plan, atomic_load(&plan->replay));
}

void fd_launch(programs run, const void *arguments, int x, int y, int z) {
  int grid[3] = {x, y, z};
  if (threads == 1 || (long)x * y * z <= 1) {
    run(arguments, 0, (long)x * y * z, grid);
    return;
  }
  /* One launch is a plan of one. Its claims must not be mistaken for an earlier call's by a worker that woke late, and
   * its fields may change only when no worker can still claim from it: it is a fresh slot of a ring, and the counters
   * of a slot go on from call to call. */
  enum { SLOTS = 64 };
  static struct launch launches[SLOTS];
  static struct plan plans[SLOTS];
  static int next;
  pthread_mutex_lock(&one_caller);
  struct launch *launch = &launches[next % SLOTS];
  struct plan *plan = &plans[next++ % SLOTS];
  int64_t behind = atomic_load(&launch->claimed);
  prepare(launch, run, arguments, grid);
  /* start at the first multiple of `chunks` that no earlier call has reached */
  int64_t replay = behind / launch->chunks + 1;
  atomic_store(&launch->done, replay * launch->chunks);
  plan->count = 1;
  plan->launches = launch;
  atomic_store(&plan->replay, replay - 1);
  atomic_store(&launch->claimed, replay * launch->chunks);
  execute(plan);
  pthread_mutex_unlock(&one_caller);
}

struct recorded { programs run; const void *arguments; int grid[4]; };

struct plan *fd_plan_new(const struct recorded *list, int64_t count) {
  struct plan *plan = calloc(1, sizeof *plan);
  plan->launches = calloc(count ? count : 1, sizeof *plan->launches);
  plan->count = count;
  plan->replay = -1;
  for (int64_t i = 0; i < count; i++) prepare(&plan->launches[i], list[i].run, list[i].arguments, list[i].grid);
  return plan;
}

void fd_plan_replay(struct plan *plan) {
  pthread_mutex_lock(&one_caller);
  execute(plan);
  pthread_mutex_unlock(&one_caller);
}
