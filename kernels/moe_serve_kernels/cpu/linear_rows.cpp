// out = x @ weight^T for a few tokens, float32 activations on bf16 weights as checkpoints store them.
//
//   for each row n of weight:              (split over threads)
//     for each token t: out[t][n] = sum_k x[t][k] * float(weight[n][k])
//
// With few tokens the time is the time to read the weights, so reading two bytes per weight and
// widening them in registers beats any copy of the weights in float32. Products and sums are float32,
// as they would be on widened weights. Plain C ABI, no libtorch: fits any torch version.

#include <cstddef>
#include <vector>

#include "vectors.h"

// Tokens with the elements of each row dealt out as linear_rows.inc reads them:
// [x0 x2 x4 ...] (half of them), [x1 x3 x5 ...] (half), then the tail that fills no whole vector.
struct SplitTokens {
    const float* split;
    int64_t stride;  // elements of one token
    int64_t half;    // multiple of 16
    int64_t tail;    // stride - 2 * half
};

#define ARITHMETIC "linear_rows.inc"
#include "per_isa.inc"

namespace {

void split_token(const float* x, float* split, int64_t half, int64_t columns) {
    for (int64_t j = 0; j < half; ++j) {
        split[j] = x[2 * j];
        split[half + j] = x[2 * j + 1];
    }
    for (int64_t k = 2 * half; k < columns; ++k) split[k] = x[k];
}

constexpr int64_t ROWS_PER_TASK = 64;

}  // namespace

// x [tokens, columns]; weight [num_rows, columns] with rows `row_stride` elements apart;
// out [tokens, num_rows] with rows `out_stride` elements apart.
extern "C" void moe_serve_linear_rows_bf16(const float* x, const uint16_t* weight, float* out, int64_t tokens,
                                           int64_t num_rows, int64_t columns, int64_t row_stride, int64_t out_stride,
                                           int32_t num_threads) {
    const auto rows = FOR_THIS_CPU(rows);
    const int64_t half = columns / 32 * 16;
    std::vector<float> buffer(static_cast<std::size_t>(tokens * columns));
    for (int64_t t = 0; t < tokens; ++t) split_token(x + t * columns, buffer.data() + t * columns, half, columns);
    const SplitTokens split{buffer.data(), columns, half, columns - 2 * half};
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t begin = 0; begin < num_rows; begin += ROWS_PER_TASK) {
        const int64_t end = begin + ROWS_PER_TASK < num_rows ? begin + ROWS_PER_TASK : num_rows;
        rows(split, weight, out, tokens, begin, end, row_stride, out_stride);
    }
}
