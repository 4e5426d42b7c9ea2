/* The hot loops for x86-64 with AVX-512 (F, BW, DQ, VL). */
#define KERNELS qmoe_kernels_avx512
#define KERNELS_NAME "avx512"
#include "kernels_body.h"
