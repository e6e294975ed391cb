/* Drives the thread pool from C and moves its counter of generations; test_pool.py compiles it and asks what went wrong.
 *
 * Every launch counts how often each of its programs runs. A plan is left alone while the counter advances by any number
 * that a narrower counter would take for little or for the past, and then has to run all of its programs once again.
 */
#include POOL

#include <stdio.h>

enum { PROGRAMS = 1000, LAUNCHES = 3, TURNS = 20 };

static _Atomic int runs[PROGRAMS];

static void count(const void *counts, long begin, long end, const int *grid) {
  (void)grid;
  for (long i = begin; i < end; i++) ((_Atomic int *)counts)[i]++;
}

static int check(const char *what, uint64_t moved, int expected) {
  for (int i = 0; i < PROGRAMS; i++) {
    int found = atomic_exchange(&runs[i], 0);
    if (found == expected) continue;
    printf("%s, generations moved by %llu: program %d ran %d times, not %d\n", what, (unsigned long long)moved, i, found,
           expected);
    return 1;
  }
  return 0;
}

int main(void) {
  const uint64_t moves[] = {0, 1, 1ull << 31, (1ull << 31) + 1, 3ull << 30, (1ull << 32) - 1, 1ull << 32,
                            (1ull << 32) + 1, 1ull << 40};
  struct recorded list[LAUNCHES];
  for (int i = 0; i < LAUNCHES; i++) list[i] = (struct recorded){count, runs, {PROGRAMS, 1, 1, 0}};
  int failed = fd_start(3, 0) != 3;
  struct plan *plan = fd_plan_new(list, LAUNCHES);
  for (unsigned m = 0; m < sizeof moves / sizeof *moves; m++) {
    fd_plan_replay(plan);
    fd_launch(count, runs, PROGRAMS, 1, 1);
    failed |= check("before", 0, LAUNCHES + 1);
    generations += moves[m];
    fd_plan_replay(plan);
    failed |= check("plan", moves[m], LAUNCHES);
    generations += moves[m];
    fd_launch(count, runs, 10, 10, 10);
    failed |= check("launch", moves[m], 1);
    for (int turn = 0; turn < TURNS; turn++) { /* a launch and a plan in turns: late workers find the other one */
      fd_launch(count, runs, turn % 2 ? PROGRAMS : 2, 1, 1);
      fd_plan_replay(plan);
    }
    for (int i = 2; i < PROGRAMS; i++) runs[i] += TURNS / 2;
    failed |= check("in turns", moves[m], TURNS * (LAUNCHES + 1));
    for (int turn = 0; turn < TURNS; turn++) { /* the last queue is longer than there is room for at a time */
      for (int i = 0; i < (turn < TURNS - 1 ? turn : 2 * MOST_QUEUED); i++) fd_queue(count, runs, PROGRAMS, 1, 1);
      if (turn % 2) fd_finish(); /* else the plan does it */
      fd_plan_replay(plan);
    }
    failed |= check("queue", moves[m], (TURNS - 1) * (TURNS - 2) / 2 + 2 * MOST_QUEUED + TURNS * LAUNCHES);
  }
  return failed;
}
