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

/* out = g P for g (rows, width) of `dtype`, out (rows, width) of `out_dtype` and an orthonormal basis (width, rank) of
 * float32: P = I - basis basis^T, or basis basis^T where `complement` is 0. out may be g, and must not overlap it
 * otherwise, nor anything else of the call. `workspace` holds g basis. */
typedef struct {
    void* out;
    const void* g;
    const float* basis;
    int64_t rows, width, rank, stride_out, stride_g, stride_basis, out_dtype, dtype, complement;
} guardspace_null_projection;

GUARDSPACE_API int64_t guardspace_cuda_null_project_workspace(const guardspace_null_projection* items, int64_t count);
GUARDSPACE_API int guardspace_cuda_null_project(const guardspace_null_projection* items, int64_t count, void* workspace,
                                                int64_t workspace_bytes, void* stream);

/* A step of AdamW by the projected gradient, after which param is projected: exp_avg += (1 - beta1) (g P - exp_avg),
 * exp_avg_sq += (1 - beta2) ((g P)^2 - exp_avg_sq), param = ((1 - lr weight_decay) param - lr / (1 - beta1^t) exp_avg /
 * (sqrt(exp_avg_sq / (1 - beta2^t)) + eps)) P. `step` holds t >= 1, which the caller counts, in device memory. All four
 * matrices are (rows, width) of `dtype`; basis and complement as above. 0 <= beta1, beta2 < 1. */
typedef struct {
    void* param;
    const void* grad;
    void *exp_avg, *exp_avg_sq;
    const float *step, *basis;
    int64_t rows, width, rank, stride_param, stride_grad, stride_exp_avg, stride_exp_avg_sq, stride_basis, dtype;
    int64_t complement;
} guardspace_projected_adamw;

GUARDSPACE_API int64_t guardspace_cuda_projected_adamw_workspace(const guardspace_projected_adamw* items,
                                                                 int64_t count);
GUARDSPACE_API int guardspace_cuda_projected_adamw(const guardspace_projected_adamw* items, int64_t count, double lr,
                                                   double beta1, double beta2, double eps, double weight_decay,
                                                   void* workspace, int64_t workspace_bytes, void* stream);

/* Dropout, in the three calls below: entry (row, column) of the adapter's input is kept, and multiplied by `factor`, if
 * word column % 4 of Philox4x32-10 with the counter (column / 4, row, 0, 0), shifted right by one, is at least
 * `threshold`. `seed` is the key, read on the device; it may be NULL where threshold is 0, which keeps everything.
 * Matrices of a call have one `dtype`, but for those declared as float*. */

/* y (tokens, outputs) = [y +] x W^T + bias + h up: [y +] if `add` is not 0, bias may be NULL, x (tokens, inputs),
 * h (tokens, rank), up (rank, outputs). W (outputs, inputs) has adjacent entries in its rows, or, if `weight_columns`
 * is not 0, in its columns: W^T (inputs, outputs) in its rows. Dropout's mask and factor apply to what the first
 * `dropped` columns of h add. y must not overlap what is read. */
typedef struct {
    void* y;
    const void *x, *weight, *bias, *h, *up;
    const int64_t* seed;
    int64_t tokens, inputs, outputs, rank, dropped, stride_y, stride_x, stride_weight, stride_h, stride_up;
    int64_t weight_columns, add, threshold, dtype;
} guardspace_lora_linear;

GUARDSPACE_API int guardspace_cuda_lora_linear(const guardspace_lora_linear* call, float factor, void* stream);

/* h (tokens, rank), contiguous, = factor * drop(x) down^T for x (tokens, width), down (rank, width); and, without
 * dropout and in 16 bits, outer (outer_rank, width), contiguous, = e^T x for e (tokens, outer_rank), outer_rank <=
 * rank: x is read once for both. outer_rank = 0 forms h alone. */
typedef struct {
    void* h;
    float* outer;
    const void *x, *down, *e;
    const int64_t* seed;
    int64_t tokens, width, rank, outer_rank, stride_x, stride_down, stride_e, threshold, dtype;
} guardspace_lora_down;

GUARDSPACE_API int64_t guardspace_cuda_lora_down_workspace(const guardspace_lora_down* call);
GUARDSPACE_API int guardspace_cuda_lora_down(const guardspace_lora_down* call, float factor, void* workspace,
                                             int64_t workspace_bytes, void* stream);

/* outer (rank, width), contiguous, = factor * e^T drop(x) for e (tokens, rank), x (tokens, width). */
typedef struct {
    float* outer;
    const void *e, *x;
    const int64_t* seed;
    int64_t tokens, width, rank, stride_e, stride_x, threshold, dtype;
} guardspace_lora_outer;

GUARDSPACE_API int64_t guardspace_cuda_lora_outer_workspace(const guardspace_lora_outer* call);
GUARDSPACE_API int guardspace_cuda_lora_outer(const guardspace_lora_outer* call, float factor, void* workspace,
                                              int64_t workspace_bytes, void* stream);

#ifdef __cplusplus
}
#endif

#endif
