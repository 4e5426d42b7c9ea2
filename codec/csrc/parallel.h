/* A pool of threads that share out numbered units of work. */
#ifndef QMOE_PARALLEL_H
#define QMOE_PARALLEL_H

/* Does one unit; `thread` < threads tells whose scratch it may use. */
typedef void (*parallel_task)(void *context, unsigned unit, unsigned thread);

/*
 * Run task(context, 0 … units - 1, …) on at most `threads` threads, the caller among them; returns when all are done.
 * While another call uses the pool, and where no threads can be had, the caller does everything itself.
 */
void qmoe_parallel(unsigned threads, unsigned units, parallel_task task, void *context);

enum { MAXIMUM_THREADS = 256 };

#endif
