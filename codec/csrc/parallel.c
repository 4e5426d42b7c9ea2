/*
 * The pool. A job has seats for helpers: one that wakes up takes a seat and then units until none are left. When the
 * caller finds none left it takes the free seats away and waits for those who sit, so that a thread that wakes up
 * late holds nobody up. Units that follow each other go to one thread, since what they read does, too; a thread that
 * has done its own takes the last one of another. Helpers watch for the next job for a moment before they sleep, since
 * the calls of a forward pass follow each other closely.
 */
#define _POSIX_C_SOURCE 200809L
#include "parallel.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

enum { WATCH_TURNS = 4000 };

static struct {
    pthread_mutex_t users; /* held by the call that uses the pool */
    pthread_mutex_t lock;  /* guards what follows, but for the atomics */
    pthread_cond_t posted, finished;
    unsigned helpers, seats;
    parallel_task task;
    void *context;
    unsigned shares, seated;
    atomic_uint sitting;    /* helpers at work */
    atomic_uint generation; /* of the job; says to those who watch that there is a new one */
} pool = {
    .users = PTHREAD_MUTEX_INITIALIZER,
    .lock = PTHREAD_MUTEX_INITIALIZER,
    .posted = PTHREAD_COND_INITIALIZER,
    .finished = PTHREAD_COND_INITIALIZER,
};

/* Units that are left of each thread's share: the first in the low half, the one behind the last in the high half. */
static struct {
    _Alignas(64) _Atomic(uint64_t) left; /* on a line of its own */
} shares[MAXIMUM_THREADS];

static uint64_t units_from(uint64_t first, uint64_t end) { return end << 32 | first; }

/* Takes a share's first unit, or its last. False if none is left. */
static bool take_unit(unsigned share, bool last, unsigned *unit) {
    uint64_t left = atomic_load(&shares[share].left);
    for (;;) {
        uint64_t first = (uint32_t)left, end = left >> 32;
        if (first == end) {
            return false;
        }
        uint64_t rest = last ? units_from(first, end - 1) : units_from(first + 1, end);
        if (atomic_compare_exchange_weak(&shares[share].left, &left, rest)) {
            *unit = (unsigned)(last ? end - 1 : first);
            return true;
        }
    }
}

static void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static void take_units(unsigned thread) {
    for (unsigned turn = 0; turn < pool.shares; turn++) {
        unsigned unit;
        while (take_unit((thread + turn) % pool.shares, turn != 0, &unit)) {
            pool.task(pool.context, unit, thread);
        }
    }
}

static void *help(void *unused) {
    (void)unused;
    unsigned seen = 0;
    for (;;) {
        for (unsigned turn = 0; turn < WATCH_TURNS && atomic_load(&pool.generation) == seen; turn++) {
            pause_briefly();
        }
        pthread_mutex_lock(&pool.lock);
        while (pool.seats == 0 || atomic_load(&pool.generation) == seen) {
            seen = atomic_load(&pool.generation);
            pthread_cond_wait(&pool.posted, &pool.lock);
        }
        seen = atomic_load(&pool.generation);
        pool.seats--;
        unsigned thread = ++pool.seated;
        atomic_fetch_add(&pool.sitting, 1);
        pthread_mutex_unlock(&pool.lock);

        take_units(thread);

        pthread_mutex_lock(&pool.lock);
        if (atomic_fetch_sub(&pool.sitting, 1) == 1) {
            pthread_cond_signal(&pool.finished);
        }
        pthread_mutex_unlock(&pool.lock);
    }
    return NULL;
}

/* After fork() the child has no helpers, and nobody holds the locks. */
static void forget_helpers(void) {
    pthread_mutex_init(&pool.users, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.posted, NULL);
    pthread_cond_init(&pool.finished, NULL);
    pool.helpers = pool.seats = 0;
    atomic_store(&pool.sitting, 0);
}

static void watch_forks(void) { pthread_atfork(NULL, NULL, forget_helpers); }

/* Have `wanted` helpers if possible; returns how many there are. */
static unsigned have_helpers(unsigned wanted) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, watch_forks);
    while (pool.helpers < wanted) {
        pthread_t helper;
        if (pthread_create(&helper, NULL, help, NULL) != 0) {
            break;
        }
        pthread_detach(helper);
        pool.helpers++;
    }
    return pool.helpers < wanted ? pool.helpers : wanted;
}

void qmoe_parallel(unsigned threads, unsigned units, parallel_task task, void *context) {
    threads = threads < units ? threads : units;
    threads = threads < MAXIMUM_THREADS ? threads : MAXIMUM_THREADS;
    if (threads <= 1 || pthread_mutex_trylock(&pool.users) != 0) {
        for (unsigned unit = 0; unit < units; unit++) {
            task(context, unit, 0);
        }
        return;
    }
    pthread_mutex_lock(&pool.lock);
    pool.task = task;
    pool.context = context;
    pool.shares = threads;
    pool.seated = 0;
    for (unsigned share = 0; share < threads; share++) {
        uint64_t first = (uint64_t)units * share / threads, end = (uint64_t)units * (share + 1) / threads;
        atomic_store(&shares[share].left, units_from(first, end));
    }
    pool.seats = have_helpers(threads - 1);
    atomic_fetch_add(&pool.generation, 1);
    pthread_cond_broadcast(&pool.posted);
    pthread_mutex_unlock(&pool.lock);

    take_units(0);

    pthread_mutex_lock(&pool.lock);
    pool.seats = 0;
    pthread_mutex_unlock(&pool.lock);
    for (unsigned turn = 0; turn < WATCH_TURNS && atomic_load(&pool.sitting); turn++) {
        pause_briefly();
    }
    pthread_mutex_lock(&pool.lock);
    while (atomic_load(&pool.sitting)) {
        pthread_cond_wait(&pool.finished, &pool.lock);
    }
    pthread_mutex_unlock(&pool.lock);
    pthread_mutex_unlock(&pool.users);
}
