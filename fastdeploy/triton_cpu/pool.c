/* The thread pool: runs a list of launches ("plan"), each a grid of independent programs, one launch after the other. A
 * plan is recorded, or made while it runs ("the queue"): then workers begin what there is, and the caller joins them when
 * it has added all.
 *
 * Every thread walks the same list. At a launch it claims chunks of programs, first those of its own share of the grid
 * and then what others have left of theirs, and goes on once all chunks of that launch are done. Nothing is handed from
 * the caller to a worker, so a launch inside a plan costs two or three cache misses and no system call; and the caller
 * never waits for a worker that has not claimed a chunk, so a busy machine slows it down by no more than the lost core.
 *
 *     programs   | thread 0's share: chunk 0, chunk 1, ... | thread 1's share: ...      where a thread runs the same part
 *                                                           of every grid, it finds what it wrote in its own cache
 *
 * A worker may be put to sleep by the system anywhere and wake up much later. So every execution of a plan has a number
 * of its own, its generation, and the words `claimed` and `done` hold (generation << 16 | count). A worker from an old
 * generation sees a newer one there and claims nothing; the first thread of a new one starts the count again.
 *
 * Both numbers fit. 2^48 generations last for nine years at one in a microsecond. A launch has at most twice as many
 * chunks as it is meant to have, 16 for each of 1024 threads: 2^15.
 */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef void (*programs)(const void *arguments, long begin, long end, const int *grid);

struct share {
  _Alignas(64) _Atomic uint64_t claimed; /* chunks; alone in its cache line, which its thread writes most */
};

/* Atomic is what `fill` writes, for a worker of an old generation may be reading it. One cache line. */
struct launch {
  _Alignas(64) _Atomic(programs) run;
  _Atomic(const void *) arguments;
  _Atomic int grid[3];
  _Atomic uint32_t chunks; /* their number */
  _Atomic int64_t chunk;   /* programs in each */
  struct share *share;
  uint32_t shares;
  _Atomic uint64_t done; /* chunks */
};

struct plan {
  _Atomic int64_t count; /* of launches */
  _Atomic int is_open;   /* whether more may be added */
  _Atomic uint64_t generation;
  struct launch *launches;
};

enum { SPINS_BEFORE_SLEEP = 4000, SPINS_BEFORE_YIELD = 2000, CHUNKS_PER_THREAD = 16, STACK_BYTES = 16 << 20 };
enum { MOST_THREADS = 1024, MOST_QUEUED = 512, COUNT_BITS = 16, MOST = (1 << COUNT_BITS) - 1 /* that a count may be */ };
_Static_assert(2 * CHUNKS_PER_THREAD * MOST_THREADS < MOST, "MOST stands for a launch that is closed");

static pthread_mutex_t one_caller = PTHREAD_MUTEX_INITIALIZER;
static _Atomic(struct plan *) current;
static _Atomic uint32_t calls, sleepers;
static uint64_t generations;
static int threads = 1;

static inline void pause_briefly(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

static inline uint64_t generation_of(uint64_t word) { return word >> COUNT_BITS; }

/* Adds to a word, which counts from 0 if it is of an older generation. Returns the old count, or `limit` and adds
 * nothing if the count has reached `limit` or the word is of a newer generation. */
static uint32_t count_up(_Atomic uint64_t *word, uint64_t generation, uint32_t by, uint32_t limit) {
  uint64_t seen = atomic_load(word), start = generation << COUNT_BITS;
  for (;;) {
    uint64_t from = seen < start ? start : seen;
    if (generation_of(from) > generation || (from & MOST) >= limit) return limit;
    if (atomic_compare_exchange_weak(word, &seen, from + by)) return from & MOST;
  }
}

static int finished(struct launch *launch, uint64_t generation) {
  uint64_t word = atomic_load(&launch->done);
  return generation_of(word) > generation || word == (generation << COUNT_BITS | launch->chunks);
}

/* Runs chunks of one share until none are left; returns how many. */
static uint32_t work(struct launch *launch, uint64_t generation, uint32_t number) {
  for (uint32_t ran = 0;; ran++) {
    /* Fields first, claim second: a claim that succeeds proves that they belonged to this generation. */
    programs run = launch->run;
    const void *arguments = launch->arguments;
    int grid[3] = {launch->grid[0], launch->grid[1], launch->grid[2]};
    long chunk = launch->chunk, chunks = launch->chunks, total = (long)grid[0] * grid[1] * grid[2];
    long first = chunks * number / launch->shares, count = chunks * (number + 1) / launch->shares - first;
    long claim = count_up(&launch->share[number].claimed, generation, 1, count);
    if (claim == count) return ran;
    long begin = (first + claim) * chunk, end = begin + chunk;
    run(arguments, begin, end < total ? end : total, grid);
  }
}

static void wait_a_moment(int *spins) {
  pause_briefly();
  if (++*spins > SPINS_BEFORE_YIELD) sched_yield(), *spins = 0;
}

/* Waits for launch i; 0 if it won't come. */
static int comes(struct plan *plan, uint64_t generation, int64_t i) {
  for (int spins = 0; plan->generation == generation; wait_a_moment(&spins)) {
    int is_open = plan->is_open; /* first: of a plan that is closed the count is final */
    if (i < plan->count) return 1;
    if (!is_open) return 0;
  }
  return 0;
}

static void walk(struct plan *plan, uint64_t generation, uint32_t thread) {
  for (int64_t i = 0; comes(plan, generation, i); i++) {
    struct launch *launch = &plan->launches[i];
    uint32_t ran = 0;
    for (uint32_t k = 0; k < launch->shares; k++) ran += work(launch, generation, (thread + k) % launch->shares);
    if (ran) count_up(&launch->done, generation, ran, MOST);
    for (int spins = 0; !finished(launch, generation);) wait_a_moment(&spins);
  }
}

static void *worker(void *number) {
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
    if (plan) walk(plan, atomic_load(&plan->generation), (uint32_t)(uintptr_t)number);
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
  for (; threads < wanted && threads < MOST_THREADS; threads++) {
    pthread_t thread;
    if (pinned) pin(&attributes, threads, &allowed, callers_core);
    if (pthread_create(&thread, &attributes, worker, (void *)(uintptr_t)threads)) break;
    pthread_detach(thread);
  }
  return threads;
}

/* Whoever sees what is written here also sees what was written before, by which a launch is closed to them. */
#define release(field, value) atomic_store_explicit(&(field), value, memory_order_release)

static void fill(struct launch *launch, programs run, const void *arguments, const int *grid) {
  long total = (long)grid[0] * grid[1] * grid[2];
  long chunk = threads > 1 ? total / ((long)threads * CHUNKS_PER_THREAD) : total;
  if (chunk < 1) chunk = 1;
  release(launch->run, run);
  release(launch->arguments, arguments);
  for (int i = 0; i < 3; i++) release(launch->grid[i], grid[i]);
  release(launch->chunk, chunk);
  release(launch->chunks, (uint32_t)((total + chunk - 1) / chunk));
}

static void *zeros(size_t bytes) { return memset(aligned_alloc(64, bytes), 0, bytes); }

/* Has workers walk a plan from now on. */
static void wake_for(struct plan *plan, uint64_t generation) {
  atomic_store(&plan->generation, generation);
  if (threads == 1) return;
  atomic_store(&current, plan);
  atomic_fetch_add(&calls, 1);
  if (atomic_load(&sleepers)) syscall(SYS_futex, &calls, FUTEX_WAKE_PRIVATE, threads - 1, NULL, NULL, 0);
}

static struct plan queue;
static _Thread_local int queueing; /* this thread has opened the queue, and holds `one_caller` */

static void open_queue(void) {
  pthread_mutex_lock(&one_caller);
  queueing = 1;
  if (!queue.launches) {
    queue.launches = zeros(MOST_QUEUED * sizeof *queue.launches);
    struct share *shares = zeros(MOST_QUEUED * threads * sizeof *shares);
    for (int64_t i = 0; i < MOST_QUEUED; i++) {
      queue.launches[i].share = shares + i * threads;
      queue.launches[i].shares = threads;
    }
  }
  queue.count = 0;
  queue.is_open = 1;
  wake_for(&queue, ++generations);
}

/* Runs what is in this thread's queue to its end. */
void fd_finish(void) {
  if (!queueing) return;
  queue.is_open = 0;
  walk(&queue, queue.generation, 0);
  queueing = 0;
  pthread_mutex_unlock(&one_caller);
}

/* Adds a launch, whose arguments stay where they are until `fd_finish`. */
void fd_queue(programs run, const void *arguments, int x, int y, int z) {
  int grid[3] = {x, y, z};
  if (threads == 1) {
    run(arguments, 0, (long)x * y * z, grid);
    return;
  }
  if (queueing && queue.count == MOST_QUEUED) fd_finish();
  if (!queueing) open_queue();
  struct launch *launch = &queue.launches[queue.count];
  uint64_t closed = queue.generation << COUNT_BITS | MOST; /* to older generations, before its fields change */
  for (uint32_t k = 0; k < launch->shares; k++) atomic_store(&launch->share[k].claimed, closed);
  fill(launch, run, arguments, grid);
  for (uint32_t k = 0; k < launch->shares; k++) atomic_store(&launch->share[k].claimed, closed - MOST);
  atomic_fetch_add(&queue.count, 1);
}

void fd_launch(programs run, const void *arguments, int x, int y, int z) {
  int grid[3] = {x, y, z};
  if (!queueing && (long)x * y * z <= 1) {
    run(arguments, 0, (long)x * y * z, grid);
    return;
  }
  fd_queue(run, arguments, x, y, z);
  fd_finish();
}

struct recorded {
  programs run;
  const void *arguments;
  int grid[4];
};

struct plan *fd_plan_new(const struct recorded *list, int64_t count) {
  struct plan *plan = calloc(1, sizeof *plan);
  plan->launches = zeros(count * sizeof *plan->launches);
  plan->count = count;
  struct share *shares = zeros(count * threads * sizeof *shares);
  for (int64_t i = 0; i < count; i++) {
    struct launch *launch = &plan->launches[i];
    fill(launch, list[i].run, list[i].arguments, list[i].grid);
    launch->share = shares + i * threads;
    launch->shares = threads;
  }
  return plan;
}

void fd_plan_replay(struct plan *plan) {
  fd_finish();
  pthread_mutex_lock(&one_caller);
  wake_for(plan, ++generations);
  walk(plan, plan->generation, 0);
  pthread_mutex_unlock(&one_caller);
}
