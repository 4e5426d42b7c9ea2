/* A thread's scratch hangs on a key whose destructor frees it when the thread ends. */
#define _POSIX_C_SOURCE 200809L
#include "scratch.h"

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

typedef struct {
    void *memory[SCRATCHES];
    size_t size[SCRATCHES];
} scratches;

static pthread_key_t key;
static int key_error;

static void free_scratches(void *value) {
    scratches *own = value;
    for (unsigned which = 0; which < SCRATCHES; which++) {
        free(own->memory[which]);
    }
    free(own);
}

static void make_key(void) { key_error = pthread_key_create(&key, free_scratches); }

/* The calling thread's scratches; NULL if there are none and none can be had. */
static scratches *own_scratches(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, make_key);
    if (key_error) {
        return NULL;
    }
    scratches *own = pthread_getspecific(key);
    if (!own) {
        own = calloc(1, sizeof *own);
        if (own && pthread_setspecific(key, own) != 0) {
            free(own);
            own = NULL;
        }
    }
    return own;
}

void *qmoe_scratch(unsigned which, size_t bytes) {
    scratches *own = own_scratches();
    if (!own || bytes > SIZE_MAX - 63) {
        return NULL;
    }
    if (own->size[which] < bytes || !own->memory[which]) {
        size_t size = (bytes + 63) / 64 * 64;
        free(own->memory[which]);
        own->memory[which] = aligned_alloc(64, size ? size : 64);
        own->size[which] = own->memory[which] ? size : 0;
    }
    return own->memory[which];
}

void qmoe_scratch_done(void) {
    scratches *own = own_scratches();
    for (unsigned which = 0; own && which < SCRATCHES; which++) {
        if (own->size[which] > KEPT_BYTES) {
            free(own->memory[which]);
            own->memory[which] = NULL;
            own->size[which] = 0;
        }
    }
}
