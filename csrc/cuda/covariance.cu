// Covariance accumulation: tiles on and below the diagonal only, no float32 copy of X, all pairs in a launch.
//
// Where there are too few tiles to fill a GPU, the tokens are split into slices, whose sums a second launch adds in one
// order.
#include "launcher.cuh"
#include "product.cuh"

namespace guardspace {
namespace {

// A slice of fewer tokens costs more in traffic of its sums than it saves.
constexpr int64_t kLeastTokens = 1024;
constexpr int kSumTile = 32;

template <class E>
struct Layout {
    using Tile = guardspace::Tile<128, 128, 32, 2, 4, 4>;
};
template <>
struct Layout<float> {
    using Tile = guardspace::Tile<64, 64, 32, 2, 2, 3>;
};

struct Item {
    const void* x;
    float* c;
    const uint8_t* mask;
    int64_t sums;  // where the slices' sums begin in the workspace, (d, d) each
    int tokens, d, stride_x, stride_c, slices, begin;
};

struct Shared {
    float scale;
    float* workspace;
};

using Items = Group<Item, Shared>;

// Row and column of entry t of a lower triangle, counted row by row.
__device__ __forceinline__ void triangle(int t, int& i, int& j) {
    i = static_cast<int>((sqrtf(8.0f * static_cast<float>(t) + 1.0f) - 1.0f) * 0.5f);
    while (i * (i + 1) / 2 > t) --i;  // float32 may put the root on the other side of a whole number
    while ((i + 1) * (i + 2) / 2 <= t) ++i;
    j = t - i * (i + 1) / 2;
}

// Row and column of tile t of the lower triangle of ``high`` rows of tiles, counted band by band.
__device__ __forceinline__ void lower_tile(int t, int high, int& i, int& j) {
    triangle(t, i, j);
    const int band = i / kBand * kBand, rows = min(high - band, kBand);
    t -= band * (band + 1) / 2;
    if (t < band * rows) {
        i = band + t % rows;
        j = t / rows;
    } else {
        triangle(t - band * rows, i, j);
        i += band;
        j += band;
    }
}

template <class E>
constexpr size_t shared_bytes() {
    using T = typename Layout<E>::Tile;
    return sizeof(E) * T::stages * 2 * Part<E, T::m, T::k, Adjacent::kOther>::size;
}

// A tile of C += scale · Xᵀ diag(mask) X, or of a slice's product, kept in the workspace.
template <class E>
__global__ void __launch_bounds__(Layout<E>::Tile::threads, 2) add_tiles(const __grid_constant__ Items items) {
    using T = typename Layout<E>::Tile;
    using P = Part<E, T::m, T::k, Adjacent::kOther>;
    int block;
    const Item& item = locate(items, block);
    const int high = blocks(item.d, T::m), tiles = high * (high + 1) / 2, slice = block / tiles;
    int i, j;
    lower_tile(block % tiles, high, i, j);
    const int row = i * T::m, col = j * T::n;
    const int in_slice = blocks(blocks(item.tokens, T::k), item.slices) * T::k, token = slice * in_slice;
    const View<E> x(static_cast<const E*>(item.x) + static_cast<int64_t>(token) * item.stride_x,
                    min(item.tokens - token, in_slice), item.d, item.stride_x);
    E* memory = reinterpret_cast<E*>(shared_memory());

    // The mask of the next copy is read one step before it, so that no copy waits for it: a bit for each 16 bytes.
    uint32_t counts = 0;
    const auto read_mask = [&](int step) {
        if (item.mask == nullptr) return;
        counts = 0;
        each_chunk<P, E, T::threads>([&](int i, int r, int) {
            r += step * T::k;
            if (r < x.rows) counts |= static_cast<uint32_t>(load(item.mask + token + r) != 0) << i;
        });
    };
    const auto copy = [&](int step, int stage) {
        const auto counted = [&](int i, int) { return item.mask == nullptr || (counts >> i & 1) != 0; };
        E* to = memory + stage * 2 * P::size;
        copy_part<P, T::threads>(to, x, step * T::k, row, counted);
        if (i != j) copy_part<P, T::threads>(to + P::size, x, step * T::k, col, counted);
        read_mask(step + 1);
    };
    Sums<T> total;
    read_mask(0);
    pipeline<T>(
        blocks(max(x.rows, 0), T::k), copy, [](int, int) {},
        [&](int, int stage) {
            const E* a = memory + stage * 2 * P::size;
            multiply_exactly<T, P, P>(total, a, i == j ? a : a + P::size);
        });
    total.each_pair([&](int r, int c, float first, float second) {
        r += row;
        c += col;
        if (r >= item.d) return;
        if (item.slices == 1) {
            float* at = item.c + static_cast<int64_t>(r) * item.stride_c + c;
            if (c <= r) store(at, load(at) + items.shared.scale * first);
            if (c + 1 <= r) store(at + 1, load(at + 1) + items.shared.scale * second);
        } else {
            float* at = items.shared.workspace + item.sums + (static_cast<int64_t>(slice) * item.d + r) * item.d + c;
            if (c <= r) store(at, first);
            if (c + 1 <= r) store(at + 1, second);
        }
    });
}

// A tile of C += scale · Σ over the slices.
__global__ void __launch_bounds__(256) add_slices(const __grid_constant__ Items items) {
    int block;
    const Item& item = locate(items, block);
    int i, j;
    triangle(block, i, j);
    const int col = j * kSumTile + static_cast<int>(threadIdx.x) % kSumTile;
    for (int r = static_cast<int>(threadIdx.x) / kSumTile; r < kSumTile; r += 256 / kSumTile) {
        const int row = i * kSumTile + r;
        if (row >= item.d || col > row) continue;
        const float* at = items.shared.workspace + item.sums + static_cast<int64_t>(row) * item.d + col;
        float total = 0.0f;
        for (int slice = 0; slice < item.slices; ++slice) {
            total += load(at + static_cast<int64_t>(slice) * item.d * item.d);
        }
        float* to = item.c + static_cast<int64_t>(row) * item.stride_c + col;
        store(to, load(to) + items.shared.scale * total);
    }
}

struct Mirror {
    float* c;
    int d;
    int64_t stride;
};

// A tile below the diagonal into its place above it; what is read is nowhere written.
__global__ void __launch_bounds__(256) mirror(const __grid_constant__ Mirror p) {
    float* tile = reinterpret_cast<float*>(shared_memory());
    int i, j;
    triangle(static_cast<int>(blockIdx.x), i, j);
    const int c = static_cast<int>(threadIdx.x) % kSumTile;
    for (int r = static_cast<int>(threadIdx.x) / kSumTile; r < kSumTile; r += 256 / kSumTile) {
        const int row = i * kSumTile + r, col = j * kSumTile + c;
        if (row < p.d && col < row) tile[r * (kSumTile + 1) + c] = load(p.c + row * p.stride + col);
    }
    __syncthreads();
    for (int r = static_cast<int>(threadIdx.x) / kSumTile; r < kSumTile; r += 256 / kSumTile) {
        const int row = j * kSumTile + r, col = i * kSumTile + c;
        if (col < p.d && row < col) store(p.c + row * p.stride + col, tile[c * (kSumTile + 1) + r]);
    }
}

int64_t tiles_of(int64_t d, int64_t size) {
    const int64_t high = blocks(d, size);
    return high * (high + 1) / 2;
}

int64_t tile_of(int64_t dtype) {
    return dtype == GUARDSPACE_FLOAT32 ? Layout<float>::Tile::m : Layout<bfloat16>::Tile::m;
}

int check(const guardspace_covariance_update* updates, int64_t count) {
    const char* call = "covariance_update";
    for (int64_t i = 0; i < count; ++i) {
        const auto& u = updates[i];
        int error = check_dtype(call, i, u.dtype);
        if (!error) error = check_matrix(call, i, "x", u.x, u.tokens, u.width, u.stride_x, entry_bytes(u.dtype));
        if (!error) {
            error =
                check_matrix(call, i, "covariance", u.covariance, u.width, u.width, u.stride_covariance, 4, u.width);
        }
        if (error) return error;
    }
    return 0;
}

// The updates that there is something to do for, and how many numbers of workspace they need.
std::vector<Item> planned(const guardspace_covariance_update* updates, int64_t count, int64_t& sums) {
    int64_t tiles = 0;
    for (int64_t i = 0; i < count; ++i) tiles += tiles_of(updates[i].width, tile_of(updates[i].dtype));
    std::vector<Item> plan;
    sums = 0;
    for (int64_t i = 0; i < count; ++i) {
        const auto& u = updates[i];
        const int64_t most = std::min(kBlocks / std::max<int64_t>(tiles, 1), u.tokens / kLeastTokens);
        const int slices = static_cast<int>(std::max<int64_t>(most, 1));
        plan.push_back({u.x, u.covariance, u.mask, sums, static_cast<int>(u.tokens), static_cast<int>(u.width),
                        static_cast<int>(u.stride_x), static_cast<int>(u.stride_covariance), slices, 0});
        if (slices > 1) sums += slices * u.width * u.width;
    }
    return plan;
}

template <class E>
int add(const std::vector<Item>& plan, const guardspace_covariance_update* updates, int64_t dtype, const Shared& shared,
        void* stream) {
    using T = typename Layout<E>::Tile;
    std::vector<Item> items;
    for (size_t i = 0; i < plan.size(); ++i) {
        if (updates[i].dtype == dtype && plan[i].tokens > 0) items.push_back(plan[i]);
    }
    const auto count = [](const Item& item) { return tiles_of(item.d, T::m) * item.slices; };
    return launch_items(add_tiles<E>, items, shared, count, T::threads, shared_bytes<E>(), stream);
}

}  // namespace
}  // namespace guardspace

using namespace guardspace;

int64_t guardspace_cuda_covariance_workspace(const guardspace_covariance_update* updates, int64_t count) {
    if (check(updates, count) != 0) return -1;
    int64_t sums;
    planned(updates, count, sums);
    return 4 * sums;
}

int guardspace_cuda_covariance_update(const guardspace_covariance_update* updates, int64_t count, float scale,
                                      void* workspace, int64_t workspace_bytes, void* stream) {
    int error = check(updates, count);
    if (error) return error;
    int64_t sums;
    std::vector<Item> plan = planned(updates, count, sums);
    if (workspace_bytes < 4 * sums || (sums > 0 && workspace == nullptr)) {
        return wrong("covariance_update: workspace has %lld bytes at %p, %lld were expected",
                     static_cast<long long>(workspace_bytes), workspace, static_cast<long long>(4 * sums));
    }
    const Shared shared{scale, static_cast<float*>(workspace)};
    error = add<float>(plan, updates, GUARDSPACE_FLOAT32, shared, stream);
    if (!error) error = add<float16>(plan, updates, GUARDSPACE_FLOAT16, shared, stream);
    if (!error) error = add<bfloat16>(plan, updates, GUARDSPACE_BFLOAT16, shared, stream);
    if (error) return error;
    const auto count_of_sums = [](const Item& item) { return item.slices > 1 ? tiles_of(item.d, kSumTile) : 0; };
    return launch_items(add_slices, plan, shared, count_of_sums, 256, 0, stream);
}

int guardspace_cuda_symmetrize(float* covariance, int64_t width, int64_t stride, void* stream) {
    const int error = check_matrix("symmetrize", 0, "covariance", covariance, width, width, stride, 4, width);
    if (error || width == 0) return error;
    const Mirror parameters{covariance, static_cast<int>(width), stride};
    return launch(mirror, tiles_of(width, kSumTile), 256, sizeof(float) * kSumTile * (kSumTile + 1), stream,
                  parameters);
}
