// Vectors of the width that this file is compiled for, as compiler extensions: one source for every instruction set.
//
// Everything in csrc/cpu that is compiled per instruction set lives in unnamed namespaces. A function with external
// linkage (std:: templates included) would exist once per object file, and the linker would keep any one of them: an
// AVX-512 copy on a CPU without it.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/kernels.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define GS_INLINE inline __attribute__((always_inline))

namespace {

using guardspace::Dtype;
using guardspace::Matrix;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRegisters = 32;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kRegisters = 32;
#else
constexpr int kVectorBytes = 16, kRegisters = 16;
#endif

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

template <class T, int N>
struct VectorOf {
    typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
template <class T>
using Vec = typename VectorOf<T, kLanes<T>>::type;

template <class V, class T>
GS_INLINE V load_as(const T* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}
template <class T>
GS_INLINE Vec<T> load(const T* p) {
    return load_as<Vec<T>>(p);
}
template <class V, class T>
GS_INLINE void store(T* p, V v) {
    memcpy(p, &v, sizeof v);
}

using F = Vec<float>;
using U32 = Vec<uint32_t>;
using U16 = VectorOf<uint16_t, kLanes<float>>::type;  // as many lanes as F

// Rounding to nearest, ties to even; a NaN stays one.
GS_INLINE U32 bf16_bits(F value) {
    U32 bits = (U32)value;
    U32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    U32 nan = (bits >> 16) | 0x40u;
    return (bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
}

GS_INLINE F float_from_f16_bits(U32 h) {
    U32 sign = (h & 0x8000u) << 16, magnitude = (h & 0x7fffu) << 13;
    // Multiplying by 2^112 moves the exponent's bias from 15 to 127 and makes subnormal halves normal floats.
    U32 finite = (U32)((F)magnitude * 0x1p112f);
    return (F)(sign | (magnitude >= (0x7c00u << 13) ? (magnitude | 0x7f800000u) : finite));
}

GS_INLINE U32 f16_bits(F value) {
    U32 bits = (U32)value, sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    U32 normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding 0.5 shifts a subnormal half's bits to the bottom of the mantissa, rounded by the adder.
    U32 subnormal = (U32)((F)magnitude + 0.5f) - (126u << 23);
    U32 finite = magnitude < (113u << 23) ? subnormal : normal;
    U32 overflow = magnitude > 0x7f800000u ? U32{} + 0x7e00u : U32{} + 0x7c00u;
    return sign | (magnitude >= 0x477ff000u ? overflow : finite);
}

template <class T>
struct Convert;  // vectors of T as wide as Vec<Acc>, from and to any element type

template <>
struct Convert<float> {
    static GS_INLINE F from(const float* p) { return load(p); }
    static GS_INLINE F from(const bf16* p) { return (F)(__builtin_convertvector(load_as<U16>(p), U32) << 16); }
    static GS_INLINE F from(const f16* p) { return float_from_f16_bits(__builtin_convertvector(load_as<U16>(p), U32)); }
    static GS_INLINE F from(const double* p) {
        F v;
        for (int i = 0; i < kLanes<float>; i++) v[i] = static_cast<float>(p[i]);
        return v;
    }
    static GS_INLINE void to(float* p, F v) { store(p, v); }
    static GS_INLINE void to(bf16* p, F v) { store(p, __builtin_convertvector(bf16_bits(v), U16)); }
    static GS_INLINE void to(f16* p, F v) { store(p, __builtin_convertvector(f16_bits(v), U16)); }
    static GS_INLINE void to(double* p, F v) {
        for (int i = 0; i < kLanes<float>; i++) p[i] = v[i];
    }
};

// Not a sum with zero, which loses the sign of a negative zero.
GS_INLINE F broadcast(float value) {
    return value - F{};
}

template <class To, class From>
GS_INLINE To convert_one(From value) {
    if constexpr (std::is_same_v<From, bf16>) {
        uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
        return convert_one<To>(load_as<float>(&bits));
    } else if constexpr (std::is_same_v<From, f16>) {
        return convert_one<To>(float_from_f16_bits(U32{} + value.bits)[0]);
    } else if constexpr (std::is_same_v<To, bf16>) {
        return {static_cast<uint16_t>(bf16_bits(broadcast(static_cast<float>(value)))[0])};
    } else if constexpr (std::is_same_v<To, f16>) {
        return {static_cast<uint16_t>(f16_bits(broadcast(static_cast<float>(value)))[0])};
    } else {
        return static_cast<To>(value);
    }
}

template <>
struct Convert<double> {
    using D = Vec<double>;
    template <class T>
    static GS_INLINE D from(const T* p) {
        D v;
        for (int i = 0; i < kLanes<double>; i++) v[i] = convert_one<double>(p[i]);
        return v;
    }
    static GS_INLINE D from(const double* p) { return load(p); }
    template <class T>
    static GS_INLINE void to(T* p, D v) {
        for (int i = 0; i < kLanes<double>; i++) p[i] = convert_one<T>(v[i]);
    }
    static GS_INLINE void to(double* p, D v) { store(p, v); }
};

// Calls f with a null pointer of the dtype's element type.
template <class Function>
GS_INLINE void with_type(Dtype dtype, Function f) {
    switch (dtype) {
        case guardspace::kFloat64:
            return f(static_cast<double*>(nullptr));
        case guardspace::kFloat32:
            return f(static_cast<float*>(nullptr));
        case guardspace::kFloat16:
            return f(static_cast<f16*>(nullptr));
        case guardspace::kBFloat16:
            return f(static_cast<bf16*>(nullptr));
    }
}

template <class T>
GS_INLINE T* at(const Matrix& m, int64_t row, int64_t col) {
    return static_cast<T*>(m.data) + row * m.row_stride + col * m.col_stride;
}
GS_INLINE Matrix transposed(const Matrix& m) {
    return {m.data, m.dtype, m.cols, m.rows, m.col_stride, m.row_stride};
}

template <class T>
GS_INLINE T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
GS_INLINE T max(T a, T b) {
    return a < b ? b : a;
}
GS_INLINE int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

}  // namespace
