/* A pool of threads that share out numbered units of work. */
#ifndef QMOE_PARALLEL_H
#define QMOE_PARALLEL_H

/* Does one unit; `thread` < threads tells whose scratch it may use. */
typedef void (*parallel_task)(void *context, unsigned unit, unsigned thread);

/*
 * Run task(context, 0 … units - 1, …) on at most `threads` threads, the caller among them; returns when all are done.
 * While another call uses the pool, and where no threads can be had, the caller does everything itself.
 *
 * Each thread has a share of units that follow each other, and helps with another's when it has done its own. The last
 * `kept` units of a thread's share, once it has begun, are left to it: more than 0 is for units that take a thread
 * longer than they take the one that has done those before.
 */
void qmoe_parallel(unsigned threads, unsigned units, unsigned kept, parallel_task task, void *context);

enum {
    MAXIMUM_THREADS = 256,
    /* Bytes that go from cache to cache together: processors fetch a line's neighbour along with it. */
    PAIR_OF_LINES = 128
};

#endif
