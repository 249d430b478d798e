// Sums that several blocks formed parts of, added in one order, and matrices whose type is known when a kernel runs.
#pragma once

#include "launcher.cuh"
#include "product.cuh"

namespace guardspace {

// Calls use(E()) with the type of a dtype's entries.
#pragma nv_exec_check_disable  // the host calls it for what runs there, a kernel for what runs in it
template <class Use>
__host__ __device__ __forceinline__ auto with_type(int64_t dtype, Use use) {
    if (dtype == GUARDSPACE_FLOAT32) return use(float());
    if (dtype == GUARDSPACE_FLOAT16) return use(float16());
    return use(bfloat16());
}

namespace {

struct Slices {
    const float* from;  // (slices, count)
    void* to;           // may be ``from``
    int64_t count;
    int slices, dtype, begin;
};

struct Nothing {};

__global__ void __launch_bounds__(256) add_slices(const __grid_constant__ Group<Slices, Nothing> items) {
    int block;
    const Slices& item = locate(items, block);
    const int64_t i = static_cast<int64_t>(block) * 256 + threadIdx.x;
    if (i >= item.count) return;
    float total = 0.0f;
    for (int slice = 0; slice < item.slices; ++slice) total += load(item.from + slice * item.count + i);
    with_type(item.dtype, [&](auto entry) {
        using E = decltype(entry);
        store(static_cast<E*>(item.to) + i, rounded<E>(total));
    });
}

// to = Σ over the slices, for each item.
inline int add_all(const std::vector<Slices>& items, void* stream) {
    const auto count = [](const Slices& item) { return blocks<int64_t>(item.count, 256); };
    return launch_items(add_slices, items, Nothing{}, count, 256, 0, stream);
}

}  // namespace
}  // namespace guardspace
