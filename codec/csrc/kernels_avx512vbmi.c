/* The hot loops for x86-64 with AVX-512 (F, BW, DQ, VL, VBMI, VBMI2, IFMA): Ice Lake, Zen 4 and later. */
#define KERNELS qmoe_kernels_avx512vbmi
#define KERNELS_NAME "avx512vbmi"
#include "kernels_body.h"
