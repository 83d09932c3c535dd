// Every kernel of the head for the three operand types, so that nvcc sees them all:
// test/40.cuda-kernels.spec.ts compiles this file and reads ptxas's report.
#include "cuda/head.cu"
