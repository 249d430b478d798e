// C += scale · Xᵀ diag(mask) X, lower triangle; its mirror; and the quadratic form of the certificate.
#include "cpu/panels.h"

namespace guardspace {
namespace GUARDSPACE_ISA {
namespace {

// Packed rows of X at a time: bounds the scratch memory; each chunk reads and writes C once.
constexpr int64_t kChunkBytes = 16 << 20, kMinChunk = 256;
constexpr int64_t kPackRows = 32;  // rows of a packing task

// Some rows of one item's X, packed and then multiplied by themselves.
struct Chunk {
    const CovarianceUpdate* item;
    const int64_t* index;  // the rows that count, or null for all
    int64_t first, rows, panels;
    int64_t block;  // panels of a block of tiles, whose operands the L2 cache holds
    int64_t pack_tasks, tile_tasks;
    int64_t offset;  // of its panels in the scratch memory, in elements
};

template <class Kind>
void pack(const Chunk& chunk, int64_t task, typename Kind::Element* panels) {
    constexpr int W = kWidth<Kind>;
    int64_t first = task * kPackRows, rows = min(kPackRows, chunk.rows - first), d = chunk.item->x.cols;
    int64_t size = steps<Kind>(chunk.rows) * W;
    const int64_t* index = chunk.index ? chunk.index + chunk.first + first : nullptr;
    int64_t row = index ? 0 : chunk.first + first;
    for (int64_t p = 0; p < chunk.panels; p++) {
        pack_rows<Kind>(panels + chunk.offset + p * size + first / Kind::kPack * W, window(chunk.item->x, row, p * W),
                        rows, min<int64_t>(W, d - p * W), index);
    }
}

template <class T, class Sum>
void add_tile(const Matrix& C, Sum scale, int64_t row0, int64_t col0, int64_t rows, int64_t cols, const Sum* tile,
              int64_t width) {
    constexpr int L = kLanes<Sum>;
    for (int64_t i = 0; i < rows; i++) {
        int64_t end = min(cols, row0 + i - col0 + 1), j = 0;
        T* c = at<T>(C, row0 + i, col0);
        const Sum* row = tile + i * width;
        if constexpr (std::is_same_v<T, Sum>) {
            if (C.col_stride == 1) {
                for (; j + L <= end; j += L) store(c + j, load(c + j) + scale * load(row + j));
            }
        }
        for (; j < end; j++) c[j * C.col_stride] += static_cast<T>(scale * row[j]);
    }
}

template <class Kind>
void multiply(const Chunk& chunk, int64_t task, const typename Kind::Element* panels) {
    using Sum = typename Kind::Sum;
    constexpr int W = kWidth<Kind>;
    alignas(64) Sum tile[W * W];
    int64_t block_row = 0;
    while (task > block_row) task -= ++block_row;
    int64_t block_col = task, d = chunk.item->x.cols, k = steps<Kind>(chunk.rows);
    panels += chunk.offset;
    for (int64_t p = block_col * chunk.block; p < min((block_col + 1) * chunk.block, chunk.panels); p++) {
        for (int64_t q = max(p, block_row * chunk.block); q < min((block_row + 1) * chunk.block, chunk.panels); q++) {
            int64_t rows = min<int64_t>(W, d - q * W), cols = min<int64_t>(W, d - p * W);
            const Matrix& C = chunk.item->covariance;
            panel_product<Kind>(k, panels + q * k * W, panels + p * k * W, rows, cols, p == q, false, tile);
            Sum scale = static_cast<Sum>(chunk.item->scale);
            if (C.dtype == kFloat64) {
                add_tile<double>(C, scale, q * W, p * W, rows, cols, tile, W);
            } else {
                add_tile<float>(C, scale, q * W, p * W, rows, cols, tile, W);
            }
        }
    }
}

template <class Kind>
void run(const Chunk* chunks, int64_t count, typename Kind::Element* panels, int threads) {
    int64_t pack_tasks = 0, tile_tasks = 0;
    for (int64_t i = 0; i < count; i++) {
        pack_tasks += chunks[i].pack_tasks;
        tile_tasks += chunks[i].tile_tasks;
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < pack_tasks; task++) {
            const Chunk* chunk = chunks;
            int64_t rest = task;
            for (; rest >= chunk->pack_tasks; chunk++) rest -= chunk->pack_tasks;
            pack<Kind>(*chunk, rest, panels);
        }
        // A tile has one owner and one order of summation, so the result does not depend on who gets it.
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tile_tasks; task++) {
            const Chunk* chunk = chunks;
            int64_t rest = task;
            for (; rest >= chunk->tile_tasks; chunk++) rest -= chunk->tile_tasks;
            multiply<Kind>(*chunk, rest, panels);
        }
    }
}

template <class Kind>
bool has_kind(const CovarianceUpdate& item) {
    bool wide = item.covariance.dtype == kFloat64 || item.x.dtype == kFloat64;
    bool pairs = !wide && item.x.dtype == kBFloat16 && Bf16Compute::kPack == 2;
    return wide ? std::is_same_v<Kind, Real<double>> : pairs ? Kind::kPack == 2 : std::is_same_v<Kind, Real<float>>;
}

template <class Kind>
int64_t chunk_rows(int64_t panels) {
    int64_t row = panels * kWidth<Kind> * static_cast<int64_t>(sizeof(typename Kind::Element)) / Kind::kPack;
    return max(kMinChunk, kChunkBytes / max<int64_t>(row, 1) / kPackRows * kPackRows);
}

template <class Kind>
void update_kind(const CovarianceUpdate* items, int64_t count, int threads) {
    using Element = typename Kind::Element;
    constexpr int W = kWidth<Kind>;
    int64_t masked = 0, largest = 0;
    for (int64_t i = 0; i < count; i++) {
        if (!has_kind<Kind>(items[i])) continue;
        if (items[i].mask) masked += items[i].x.rows;
        int64_t panels = ceil_div(items[i].x.cols, W), rows = min(items[i].x.rows, chunk_rows<Kind>(panels));
        largest = max(largest, steps<Kind>(rows) * W * panels);
    }
    if (largest == 0) return;
    int64_t capacity = max(largest, kChunkBytes / static_cast<int64_t>(sizeof(Element)));
    capacity = min(capacity, largest * count);
    size_t panel_bytes = static_cast<size_t>(ceil_div(capacity * static_cast<int64_t>(sizeof(Element)), 64)) * 64;
    char* scratch = static_cast<char*>(
        workspace(panel_bytes + sizeof(int64_t) * masked + (sizeof(Chunk) + 2 * sizeof(int64_t)) * count));
    Element* panels = reinterpret_cast<Element*>(scratch);
    Chunk* chunks = reinterpret_cast<Chunk*>(scratch + panel_bytes);
    int64_t* index = reinterpret_cast<int64_t*>(chunks + count);  // rows that count, item after item
    int64_t* kept = index + masked;                               // how many, by item
    int64_t* start = kept + count;

    int64_t next = 0;
    for (int64_t i = 0; i < count; i++) {
        start[i] = next;
        kept[i] = has_kind<Kind>(items[i]) ? items[i].x.rows : 0;
        if (!items[i].mask || kept[i] == 0) continue;
        for (int64_t row = 0; row < items[i].x.rows; row++) {
            if (items[i].mask[row]) index[next++] = row;
        }
        kept[i] = next - start[i];
    }
    // Round after round one chunk of every item, as many at once as fit.
    bool more = true;
    for (int64_t round = 0; more; round++) {
        int64_t waiting = 0, used = 0;
        more = false;
        for (int64_t i = 0; i < count; i++) {
            const CovarianceUpdate& item = items[i];
            Chunk chunk{&item, item.mask ? index + start[i] : nullptr, 0, 0, ceil_div(item.x.cols, W), 0, 0, 0, 0};
            int64_t most = chunk_rows<Kind>(chunk.panels);
            chunk.first = round * most;
            chunk.rows = min(most, kept[i] - chunk.first);
            if (chunk.rows <= 0 || chunk.panels == 0) continue;
            more = more || chunk.first + chunk.rows < kept[i];
            int64_t size = steps<Kind>(chunk.rows) * W * chunk.panels;
            if (used + size > capacity) {
                run<Kind>(chunks, waiting, panels, threads);
                waiting = used = 0;
            }
            chunk.offset = used;
            used += size;
            chunk.block = panels_per_task(chunk.panels, 4, 4 * threads);
            int64_t blocks = ceil_div(chunk.panels, chunk.block);
            chunk.pack_tasks = ceil_div(chunk.rows, kPackRows);
            chunk.tile_tasks = blocks * (blocks + 1) / 2;
            chunks[waiting++] = chunk;
        }
        run<Kind>(chunks, waiting, panels, threads);
    }
}

template <class T>
void mirror(const Matrix& C, int threads) {
    constexpr int64_t kTile = 32;
    int64_t d = C.rows;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < d; row += kTile) {
        for (int64_t col = 0; col <= row; col += kTile) {
            for (int64_t i = row; i < min(row + kTile, d); i++) {
                for (int64_t j = col; j < min(col + kTile, i); j++) *at<T>(C, j, i) = *at<T>(C, i, j);
            }
        }
    }
}

template <class T>
double lower_dot(const Matrix& C, int64_t row0, int64_t col0, int64_t rows, int64_t cols, const double* tile,
                 int64_t width) {
    double sum = 0;
    for (int64_t i = 0; i < rows; i++) {
        int64_t end = min(cols, row0 + i - col0 + 1);
        const T* c = at<T>(C, row0 + i, col0);
        double row_sum = 0;
        for (int64_t j = 0; j < end; j++) row_sum += static_cast<double>(c[j * C.col_stride]) * tile[i * width + j];
        bool diagonal = col0 + end == row0 + i + 1;
        double last = diagonal ? static_cast<double>(c[(end - 1) * C.col_stride]) * tile[i * width + end - 1] : 0;
        sum += 2 * row_sum - last;
    }
    return sum;
}

}  // namespace

void covariance_update(const CovarianceUpdate* items, int64_t count, int threads) {
    update_kind<Real<float>>(items, count, threads);
    update_kind<Real<double>>(items, count, threads);
    if constexpr (Bf16Compute::kPack == 2) update_kind<Bf16Compute>(items, count, threads);
}

void symmetrize(const Matrix& C, int threads) {
    C.dtype == kFloat64 ? mirror<double>(C, threads) : mirror<float>(C, threads);
}

double quadratic_form(const Matrix& C, const Matrix& u, const Matrix& v, int threads) {
    using Kind = Real<double>;
    constexpr int W = kWidth<Kind>;
    int64_t d = C.rows, r = u.rows, panels = ceil_div(d, W), size = r * W;
    double* scratch = static_cast<double*>(workspace(sizeof(double) * (2 * panels * size + panels)));
    double *panels_u = scratch, *panels_v = scratch + panels * size, *sums = scratch + 2 * panels * size;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(dynamic)
        for (int64_t p = 0; p < panels; p++) {
            int64_t cols = min<int64_t>(W, d - p * W);
            pack_rows<Kind>(panels_u + p * size, window(u, 0, p * W), r, cols);
            pack_rows<Kind>(panels_v + p * size, window(v, 0, p * W), r, cols);
        }
#pragma omp for schedule(dynamic)
        for (int64_t step = 0; step < panels; step++) {
            int64_t p = panels - 1 - step;  // the longest rows first
            alignas(64) double tile[W * W];
            sums[p] = 0;
            for (int64_t q = 0; q <= p; q++) {
                int64_t rows = min<int64_t>(W, d - p * W), cols = min<int64_t>(W, d - q * W);
                panel_product<Kind>(r, panels_u + p * size, panels_v + q * size, rows, cols, p == q, false, tile);
                sums[p] += C.dtype == kFloat64 ? lower_dot<double>(C, p * W, q * W, rows, cols, tile, W)
                                               : lower_dot<float>(C, p * W, q * W, rows, cols, tile, W);
            }
        }
    }
    double sum = 0;
    for (int64_t p = 0; p < panels; p++) sum += sums[p];
    return sum;
}

}  // namespace GUARDSPACE_ISA
}  // namespace guardspace
