/* The hot loops for any processor. */
#define KERNELS qmoe_kernels_portable
#define KERNELS_NAME "portable"
#include "kernels_body.h"
