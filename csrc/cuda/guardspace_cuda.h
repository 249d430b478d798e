/* The CUDA kernels of guardspace_kernels for programs in C and C++: pointers, sizes, strides and a stream.
 *
 * All pointers but those to items are device memory; strides count entries, and the entries of a row are adjacent.
 * Calls put work on `stream` (a cudaStream_t; NULL is the default stream) of the calling thread's current device, do
 * not wait for it, allocate nothing, and may be captured in a CUDA graph: items are read before they return. Results
 * have the same bits every time. Rows at multiples of 16 bytes (address and stride) are read fastest. Any size may be
 * zero; none, and no stride, may exceed 2000000000.
 *
 * A call returns 0 or an error: a positive number is CUDA's, a negative one says that an argument is wrong.
 * guardspace_cuda_error_text tells what. Chips from compute capability 8.0 on.
 *
 * Link the installed guardspace_kernels/_cuda.so, or compile csrc/cuda/ *.cu into your own program:
 *     nvcc -std=c++17 -O3 -arch=sm_90 -Icsrc/cuda -c csrc/cuda/covariance.cu
 */
#ifndef GUARDSPACE_CUDA_H
#define GUARDSPACE_CUDA_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define GUARDSPACE_API __attribute__((visibility("default")))

enum { GUARDSPACE_FLOAT32 = 1, GUARDSPACE_FLOAT16 = 2, GUARDSPACE_BFLOAT16 = 3 };

/* The text of an error that a call on this thread has returned; valid until its next failing call. */
GUARDSPACE_API const char* guardspace_cuda_error_text(int error);

/* How many devices there are; CUDA's error where there is no driver. */
GUARDSPACE_API int guardspace_cuda_device_count(int* count);

/* covariance (width, width), float32: the lower triangle of C += scale * X^T diag(mask) X, for X (tokens, width) of
 * `dtype`. Rows whose byte of `mask` is zero are not counted, whatever they hold; mask may be NULL: all are counted. */
typedef struct {
    float* covariance;
    const void* x;
    const uint8_t* mask;
    int64_t tokens, width, stride_covariance, stride_x, dtype;
} guardspace_covariance_update;

/* The covariances of one call must not overlap. Few of them use `workspace` to keep the whole chip busy:
 * guardspace_cuda_covariance_workspace says how many bytes, or -1 if an item is wrong; it may be 0. */
GUARDSPACE_API int64_t guardspace_cuda_covariance_workspace(const guardspace_covariance_update* items, int64_t count);
GUARDSPACE_API int guardspace_cuda_covariance_update(const guardspace_covariance_update* items, int64_t count,
                                                     float scale, void* workspace, int64_t workspace_bytes,
                                                     void* stream);

/* Mirrors the lower triangle of C (width, width), float32, into its upper one. */
GUARDSPACE_API int guardspace_cuda_symmetrize(float* covariance, int64_t width, int64_t stride, void* stream);

#ifdef __cplusplus
}
#endif

#endif
