/* The hot loops for x86-64 with AVX2, FMA and BMI2. */
#define KERNELS qmoe_kernels_avx2
#define KERNELS_NAME "avx2"
#include "kernels_body.h"
