// What the launchers have in common: checks of arguments, errors, and launches that serve many items.
#pragma once

#include <algorithm>
#include <cstdarg>
#include <vector>

#include "guardspace_cuda.h"
#include "primitives.cuh"

namespace guardspace {

// Keeps a text for guardspace_cuda_error_text and returns the error that belongs to it.
int wrong(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Sizes and strides, so that sums of a few of them and a tile still fit 32 bits.
constexpr int64_t kMost = 2000000000;

// Blocks from which sums are not split into more slices: two for each multiprocessor of an H100.
constexpr int64_t kBlocks = 264;

inline size_t entry_bytes(int64_t dtype) {
    return dtype == GUARDSPACE_FLOAT32 ? 4 : 2;
}

// 0 if the matrix ``name`` of item i, (rows, cols) at ``data``, can be used, else the error. Rows that are only read
// may overlap: ``least_stride`` is 0 for them, for others ``cols``.
inline int check_matrix(const char* call, int64_t i, const char* name, const void* data, int64_t rows, int64_t cols,
                        int64_t stride, size_t entry, int64_t least_stride = 0) {
    if (rows < 0 || cols < 0 || rows > kMost || cols > kMost) {
        return wrong("%s: items[%lld]: %s is (%lld, %lld); sizes must be from 0 to 2000000000", call,
                     static_cast<long long>(i), name, static_cast<long long>(rows), static_cast<long long>(cols));
    }
    if (rows == 0 || cols == 0) return 0;
    if (data == nullptr || reinterpret_cast<uintptr_t>(data) % entry != 0) {
        return wrong("%s: items[%lld]: %s is at %p; it must be a multiple of its entries' %d bytes, and not NULL", call,
                     static_cast<long long>(i), name, data, static_cast<int>(entry));
    }
    if (rows > 1 && (stride < least_stride || stride > kMost)) {
        return wrong(
            "%s: items[%lld]: %s is (%lld, %lld) with a row stride of %lld; from %lld to 2000000000 was expected", call,
            static_cast<long long>(i), name, static_cast<long long>(rows), static_cast<long long>(cols),
            static_cast<long long>(stride), static_cast<long long>(least_stride));
    }
    return 0;
}

inline int check_dtype(const char* call, int64_t i, int64_t dtype) {
    if (dtype >= GUARDSPACE_FLOAT32 && dtype <= GUARDSPACE_BFLOAT16) return 0;
    return wrong("%s: items[%lld]: dtype is %lld; 1 (float32), 2 (float16) or 3 (bfloat16) was expected", call,
                 static_cast<long long>(i), static_cast<long long>(dtype));
}

// Items that one launch serves, and what they share. It is passed by value: nothing is sent to the device beforehand,
// and a CUDA graph keeps it. An item has a field ``begin``: the number of its first block.
template <class Item, class Shared>
struct Group {
    static constexpr int kMostItems = static_cast<int>((4096 - sizeof(Shared) - 16) / sizeof(Item));  // of arguments
    Item items[kMostItems];
    Shared shared;
    int count;
};

// The item of this block, and the block's number within it.
template <class Item, class Shared>
__device__ __forceinline__ const Item& locate(const Group<Item, Shared>& group, int& block) {
    int i = 0;
    block = static_cast<int>(blockIdx.x);
    while (i + 1 < group.count && block >= group.items[i + 1].begin) ++i;
    block -= group.items[i].begin;
    return group.items[i];
}

// Runs a kernel on items, each with as many blocks as blocks_of_item(item) says, in as few launches as can be.
template <class Item, class Shared, class Blocks>
int launch_items(void (*kernel)(Group<Item, Shared>), const std::vector<Item>& items, const Shared& shared,
                 Blocks blocks_of_item, int threads, size_t bytes, void* stream) {
    Group<Item, Shared> group;
    group.shared = shared;
    group.count = 0;
    int64_t begin = 0;
    for (size_t i = 0; i <= items.size(); ++i) {
        const int64_t more = i < items.size() ? blocks_of_item(items[i]) : 0;
        if (more > kMost) return wrong("%lld blocks are too many for a launch", static_cast<long long>(more));
        if (begin > 0 && (i == items.size() || group.count == group.kMostItems || begin + more > kMost)) {
            const int error = launch(kernel, begin, threads, bytes, stream, group);
            if (error != 0) return error;
            group.count = 0;
            begin = 0;
        }
        if (more == 0) continue;
        group.items[group.count] = items[i];
        group.items[group.count++].begin = static_cast<int>(begin);
        begin += more;
    }
    return 0;
}

}  // namespace guardspace
