// What the kernels are made of: element types, memory, asynchronous copies, fragments of matrices and their products.
// Here is the only PTX in the tree. All of it runs on every chip from sm_80 on.
//
// Compiled without nvcc, for tests, a header on the include path gives the same names, and CUDA's own, a meaning on the
// CPU.
#pragma once

#include <cstddef>
#include <cstdint>

#ifndef __CUDACC__
#include "cuda_shim.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Compiled for an older chip, which nvcc does unless told otherwise, kernels stop when they get here.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define GUARDSPACE_ASM(...) __trap()
#else
#define GUARDSPACE_ASM(...) asm volatile(__VA_ARGS__)
#endif

namespace guardspace {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

__device__ __forceinline__ float widened(float x) {
    return x;
}
__device__ __forceinline__ float widened(float16 x) {
    return __half2float(x);
}
__device__ __forceinline__ float widened(bfloat16 x) {
    return __bfloat162float(x);
}

template <class E>
__device__ __forceinline__ E rounded(float x) {
    if constexpr (sizeof(E) == 4)
        return x;
    else if constexpr (sizeof(E) == 2 && __is_same(E, float16))
        return __float2half_rn(x);
    else
        return __float2bfloat16_rn(x);
}

// Global memory, counted in tests.
template <class T>
__device__ __forceinline__ T load(const T* from) {
    return *from;
}
template <class T>
__device__ __forceinline__ void store(T* to, T value) {
    *to = value;
}

// A block's shared memory, aligned to 16 bytes.
__device__ __forceinline__ unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char memory[];
    return memory;
}

// All lanes of a warp read a number each: counts conflicts of banks in tests.
__device__ __forceinline__ float load_shared(const float* from) {
    return *from;
}

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Copies BYTES to shared memory, 4 or 16, of which those from ``bytes`` on are zero instead. They have arrived when the
// group that they were committed with has been waited for; other threads see them after a barrier.
template <int BYTES>
__device__ __forceinline__ void cp_async(void* to, const void* from, int bytes) {
    static_assert(BYTES == 4 || BYTES == 16, "other widths are not needed");
    if constexpr (BYTES == 16) {
        GUARDSPACE_ASM("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                       "r"(bytes) : "memory");
    } else {
        GUARDSPACE_ASM("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from),
                       "r"(bytes) : "memory");
    }
}
__device__ __forceinline__ void cp_async_commit() {
    GUARDSPACE_ASM("cp.async.commit_group;" :: : "memory");
}
// Until at most PENDING of this thread's groups are under way.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
    GUARDSPACE_ASM("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 × 8 matrices of 16-bit numbers: lane i gives the address of row i % 8 of matrix i / 8, 16 bytes, and gets
// entries 2 (i % 4) and the next of row i / 4 of each; of each transposed, if TRANSPOSED.
template <bool TRANSPOSED>
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], const void* row) {
    if constexpr (TRANSPOSED) {
        GUARDSPACE_ASM("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]),
                       "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
    } else {
        GUARDSPACE_ASM("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]),
                       "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
    }
}

// d (16 × 8) += a (16 × K) b (K × 8) by a warp: K = 16 of 16-bit numbers, two in a register, or 8 of TF32. Lane i, with
// g = i / 4 and t = i % 4, has of d the entries (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1). Of 16-bit numbers
// it has the pairs of a at (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), and of b at (2t, g), (2t + 8, g); of
// TF32 the entries of a at (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4), and of b at (t, g), (t + 4, g).
template <class E>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#define GUARDSPACE_MMA(NAME)                                                                                      \
    GUARDSPACE_ASM(                                                                                               \
        "mma.sync.aligned." NAME " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" : "+f"(d[0]), \
        "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
    if constexpr (sizeof(E) == 4)
        GUARDSPACE_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
    else if constexpr (__is_same(E, float16))
        GUARDSPACE_MMA("m16n8k16.row.col.f32.f16.f16.f32");
    else
        GUARDSPACE_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
#undef GUARDSPACE_MMA
}

// The nearest number with TF32's ten bits of fraction.
__device__ __forceinline__ float to_tf32(float x) {
    uint32_t bits = 0;
    GUARDSPACE_ASM("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return __uint_as_float(bits);
}

__device__ __forceinline__ uint32_t bits_of(float x) {
    return __float_as_uint(x);
}

// Runs a kernel; 0 or CUDA's error.
template <class Parameters>
int launch(void (*kernel)(Parameters), int64_t blocks, int threads, size_t shared, void* stream,
           const Parameters& parameters) {
    if (shared > 48 * 1024) {
        cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
        if (error != cudaSuccess) return error;
    }
    void* arguments[] = {const_cast<Parameters*>(&parameters)};
    return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)), dim3(threads),
                            arguments, shared, static_cast<cudaStream_t>(stream));
}

}  // namespace guardspace
#endif
