#pragma once

// Functions that nvcc must compile for the device as well.
#ifdef __CUDACC__
#define PYFAST_XAI_HD __host__ __device__
#else
#define PYFAST_XAI_HD
#endif
