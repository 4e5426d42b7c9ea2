/*
 * The pool. A job has seats for helpers: one that comes takes a seat and then units until none are left. When the
 * caller finds none left it takes the free seats away and waits for those who sit, so that a thread that wakes up
 * late holds nobody up. Units that follow each other go to one thread, since what they read does, too; a thread that
 * has done its own takes the last one of another. Helpers watch for the next job for a moment before they sleep, since
 * the calls of a forward pass follow each other closely. A short call has no time for a lock to go from one core to
 * another: who is awake agrees by atomics alone.
 */
#define _POSIX_C_SOURCE 200809L
#include "parallel.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/* Looks until one sleeps, and until one lets other threads have the core, since what is waited for may need it. */
enum { WATCH_TURNS = 4000, YIELD_TURNS = 500 };

/* Of the number of seats: helpers at work in the low half, free seats in the high half. */
enum { FREE_SEAT = 1 << 16, TAKEN_SEATS = FREE_SEAT - 1 };

static struct {
    _Alignas(PAIR_OF_LINES) atomic_uint seats; /* with the next four, which those who sit read, on one line of the cache */
    unsigned shares, kept;
    parallel_task task;
    void *context;
    _Alignas(PAIR_OF_LINES) pthread_mutex_t users; /* held by the call that uses the pool */
    unsigned helpers;                   /* that have been started */
    pthread_mutex_t lock;               /* for those who sleep */
    pthread_cond_t posted, finished;
    atomic_uint sleepers; /* helpers that wait for `posted` */
    atomic_bool awaited;  /* the caller waits for `finished` */
} pool = {
    .users = PTHREAD_MUTEX_INITIALIZER,
    .lock = PTHREAD_MUTEX_INITIALIZER,
    .posted = PTHREAD_COND_INITIALIZER,
    .finished = PTHREAD_COND_INITIALIZER,
};

/* Units that are left of each thread's share: the first in the low half, the one behind the last in the high half. */
static struct {
    _Alignas(PAIR_OF_LINES) _Atomic(uint64_t) left;
    uint32_t begin;                      /* the first of all */
} shares[MAXIMUM_THREADS];

static uint64_t units_from(uint64_t first, uint64_t end) { return end << 32 | first; }

/* Takes the first unit of the thread's own share, or the last of another's. False if none is left for it. */
static bool take_unit(unsigned share, bool own, unsigned *unit) {
    uint64_t left = atomic_load(&shares[share].left);
    for (;;) {
        uint64_t first = (uint32_t)left, end = left >> 32;
        bool begun = first != shares[share].begin;
        if (first == end || (!own && begun && end - first <= pool.kept)) {
            return false;
        }
        uint64_t rest = own ? units_from(first + 1, end) : units_from(first, end - 1);
        if (atomic_compare_exchange_weak(&shares[share].left, &left, rest)) {
            *unit = (unsigned)(own ? first : end - 1);
            return true;
        }
    }
}

static bool is_posted(unsigned seats) { return seats >= FREE_SEAT; }
static bool is_finished(unsigned seats) { return seats == 0; }

/* Watches the seats for a moment. Whether it came to be so. */
static bool watch_seats(bool (*so)(unsigned seats)) {
    for (unsigned turn = 1; turn <= WATCH_TURNS; turn++) {
        if (so(atomic_load(&pool.seats))) {
            return true;
        }
        if (turn % YIELD_TURNS == 0) {
            sched_yield();
        }
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    return false;
}

/* Takes a free seat; its number is that of the thread in the job. False if there is none. */
static bool take_seat(unsigned *thread) {
    unsigned seats = atomic_load(&pool.seats);
    while (is_posted(seats)) {
        if (atomic_compare_exchange_weak(&pool.seats, &seats, seats - FREE_SEAT + 1)) {
            *thread = seats / FREE_SEAT;
            return true;
        }
    }
    return false;
}

static void leave_seat(void) {
    /* Either the caller sees that this was the last seat, or it is seen here that the caller sleeps. */
    if (is_finished(atomic_fetch_sub(&pool.seats, 1) - 1) && atomic_load(&pool.awaited)) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_signal(&pool.finished);
        pthread_mutex_unlock(&pool.lock);
    }
}

static void take_units(unsigned thread) {
    for (unsigned turn = 0; turn < pool.shares; turn++) {
        unsigned unit;
        while (take_unit((thread + turn) % pool.shares, turn == 0, &unit)) {
            pool.task(pool.context, unit, thread);
        }
    }
}

/* One that is woken too late for a job does not sleep on, but watches: the next one may well come soon. */
static void sleep_until_woken(void) {
    pthread_mutex_lock(&pool.lock);
    atomic_fetch_add(&pool.sleepers, 1);
    if (!is_posted(atomic_load(&pool.seats))) {
        pthread_cond_wait(&pool.posted, &pool.lock);
    }
    atomic_fetch_sub(&pool.sleepers, 1);
    pthread_mutex_unlock(&pool.lock);
}

static void *help(void *unused) {
    (void)unused;
    for (;;) {
        unsigned thread;
        if (!watch_seats(is_posted)) {
            sleep_until_woken();
        }
        if (take_seat(&thread)) {
            take_units(thread);
            leave_seat();
        }
    }
    return NULL;
}

/* Wakes as many helpers as the free seats want beyond those who are awake. */
static void wake_helpers(unsigned wanted) {
    unsigned sleepers = atomic_load(&pool.sleepers), awake = pool.helpers - sleepers;
    if (awake < wanted) {
        pthread_mutex_lock(&pool.lock);
        for (; awake < wanted; awake++) {
            pthread_cond_signal(&pool.posted);
        }
        pthread_mutex_unlock(&pool.lock);
    }
}

static void wait_until_finished(void) {
    atomic_fetch_and(&pool.seats, TAKEN_SEATS);
    if (watch_seats(is_finished)) {
        return;
    }
    pthread_mutex_lock(&pool.lock);
    atomic_store(&pool.awaited, true);
    while (!is_finished(atomic_load(&pool.seats))) {
        pthread_cond_wait(&pool.finished, &pool.lock);
    }
    atomic_store(&pool.awaited, false);
    pthread_mutex_unlock(&pool.lock);
}

/* After fork() the child has no helpers, and nobody holds the locks. */
static void forget_helpers(void) {
    pthread_mutex_init(&pool.users, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.posted, NULL);
    pthread_cond_init(&pool.finished, NULL);
    pool.helpers = 0;
    atomic_store(&pool.sleepers, 0);
    atomic_store(&pool.awaited, false);
    atomic_store(&pool.seats, 0);
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

void qmoe_parallel(unsigned threads, unsigned units, unsigned kept, parallel_task task, void *context) {
    threads = threads < units ? threads : units;
    threads = threads < MAXIMUM_THREADS ? threads : MAXIMUM_THREADS;
    if (threads <= 1 || pthread_mutex_trylock(&pool.users) != 0) {
        for (unsigned unit = 0; unit < units; unit++) {
            task(context, unit, 0);
        }
        return;
    }
    pool.task = task;
    pool.context = context;
    pool.shares = threads;
    pool.kept = kept;
    for (unsigned share = 0; share < threads; share++) {
        uint64_t first = (uint64_t)units * share / threads, end = (uint64_t)units * (share + 1) / threads;
        shares[share].begin = (uint32_t)first;
        atomic_store(&shares[share].left, units_from(first, end));
    }
    unsigned helpers = have_helpers(threads - 1);
    atomic_store(&pool.seats, helpers * FREE_SEAT);
    wake_helpers(helpers);
    take_units(0);
    wait_until_finished();
    pthread_mutex_unlock(&pool.users);
}
