/* Memory that a thread keeps from one call to its next one, so that a call need not allocate. */
#ifndef QMOE_SCRATCH_H
#define QMOE_SCRATCH_H

#include <stddef.h>

enum {
    SCRATCH_PIECES,
    SCRATCH_FLOATS,
    SCRATCH_ROWS,
    SCRATCHES,
    /* What is kept of each at most: enough for some tokens; of more, an allocation is no part worth speaking of. */
    KEPT_BYTES = 1 << 20
};

/* At least `bytes` at a line of the cache, with any content; the calling thread's own until it asks for the same again.
 * NULL if memory is short. */
void *qmoe_scratch(unsigned which, size_t bytes);

/* Gives back what is more than is kept. */
void qmoe_scratch_done(void);

#endif
