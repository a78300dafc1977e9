/* The model's operations in float32 on a CPU.
 *
 * Every row's numbers are computed by the same operations in the same order, whatever else is in the batch, however a
 * prompt is cut into chunks, and on every machine with fused multiply-add: a sum over k runs through k once, from the
 * front; attention takes keys in steps of 16. So a request computes the same bits alone or in a batch, by prefill or
 * by decode. Matrices are packed as linear() wants them; all other arrays are dense and row-major.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

/* Registers decide the tile of a matrix product: ROWS x VECTORS accumulators of LANES floats. */
#if defined(__AVX512F__)
enum { LANES = 16, VECTORS = 3, ROWS = 8, WIDE = 2 };
#elif defined(__AVX2__) && defined(__FMA__)
enum { LANES = 8, VECTORS = 2, ROWS = 6, WIDE = 1 };
#else
enum { LANES = 4, VECTORS = 4, ROWS = 4, WIDE = 1 };
#endif

enum {
    PANEL = LANES * VECTORS, /* columns of a product that are computed together */
    DEPTH = 512,             /* of k at a time, so that DEPTH x PANEL weights stay in the second-level cache */
    STEP = 16,               /* keys that attention takes at a time */
    TILE = 32,               /* rows (tokens x heads) that share one pass over the keys; one token's at least */
    TILE_MAX = 64,           /* so at most this many query heads may share a key head */
    DIM_MAX = 256,
};

#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef float f16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i16 __attribute__((vector_size(64), aligned(4), may_alias));

INLINE f16 load(const float *p) { return *(const f16 *)p; }
INLINE void store(float *p, f16 x) { *(f16 *)p = x; }

INLINE f16 select16(i16 mask, f16 yes, f16 no) { return (f16)(((i16)yes & mask) | ((i16)no & ~mask)); }

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (i16){__VA_ARGS__})
#endif

/* x <- its transpose. Interleaving the halves of the array is a rotation of the index bits (row, lane) by one; four
 * of them swap row and lane. */
INLINE void transpose16(f16 x[16])
{
    for (int round = 0; round < 4; round++) {
        f16 y[16];
        for (int i = 0; i < 8; i++) {
            y[2 * i] = SHUFFLE(x[i], x[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            y[2 * i + 1] = SHUFFLE(x[i], x[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
        memcpy(x, y, sizeof(y));
    }
}

/* Lanes folded onto lanes: halves, quarters, pairs, neighbours. */
#define FOLD16(x, JOIN)                                                                                                \
    x = JOIN(x, SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));                                  \
    x = JOIN(x, SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));                                  \
    x = JOIN(x, SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));                                  \
    x = JOIN(x, SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14))

INLINE f16 plus(f16 a, f16 b) { return a + b; }
INLINE f16 larger(f16 a, f16 b) { return select16(a > b, a, b); }

INLINE float sum16(f16 x)
{
    FOLD16(x, plus);
    return x[0];
}

INLINE float max16(f16 x)
{
    FOLD16(x, larger);
    return x[0];
}

/* e to the power of x, relative error about 1e-7; below -87 it stays at e^-87. x = n ln 2 + r, and a Taylor series
 * in r, |r| <= ln 2 / 2. Adding and taking away 1.5 * 2^23 rounds to a whole number. */
INLINE f16 exp16(f16 x)
{
    const f16 low = (f16){0} - 87.0f, high = (f16){0} + 88.0f, whole = (f16){0} + 12582912.0f;
    x = select16(x < low, low, x);
    x = select16(x > high, high, x);
    f16 n = (x * 1.44269504f + whole) - whole;
    f16 r = x - n * 0.693359375f; /* ln 2 in two parts: n times the first is exact */
    r = r + n * 2.12194440e-4f;
    f16 p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    i16 power = (__builtin_convertvector(n, i16) + 127) << 23;
    return p * (f16)power;
}

/* ---- y = x W^T (+ bias) -----------------------------------------------------------------------------------------
 *
 * W is packed in panels [n / PANEL][k][PANEL], so it streams through memory once, in order, and the lanes of a vector
 * are columns of y: no sum across lanes. The last panel is filled up with zeros.
 */

int panel_width(void) { return PANEL; }

/* rows x PANEL of y, over `depth` of k; goes on from y's values unless it is the first part of k. */
INLINE void product(int rows, const float *x, long stride, const float *w, long depth, float *y, long width, int first)
{
    vec sum[ROWS][VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECTORS; v++) sum[r][v] = first ? (vec){0} : *(vec *)(y + r * width + v * LANES);
    for (long k = 0; k < depth; k++) {
        vec column[VECTORS];
        for (int v = 0; v < VECTORS; v++) column[v] = *(const vec *)(w + k * PANEL + v * LANES);
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < VECTORS; v++) sum[r][v] += x[r * stride + k] * column[v];
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECTORS; v++) *(vec *)(y + r * width + v * LANES) = sum[r][v];
}

/* The same for any number of rows up to ROWS; the compiler needs to know the number to keep sums in registers. */
static void products(int rows, const float *x, long stride, const float *w, long depth, float *y, long width, int first)
{
    switch (rows) {
    case 1: product(1, x, stride, w, depth, y, width, first); break;
    case 2: product(2, x, stride, w, depth, y, width, first); break;
    case 3: product(3, x, stride, w, depth, y, width, first); break;
    case 4: product(4, x, stride, w, depth, y, width, first); break;
#if defined(__AVX2__)
    case 5: product(5, x, stride, w, depth, y, width, first); break;
    case 6: product(6, x, stride, w, depth, y, width, first); break;
#endif
#if defined(__AVX512F__)
    case 7: product(7, x, stride, w, depth, y, width, first); break;
    case 8: product(8, x, stride, w, depth, y, width, first); break;
#endif
    }
}

/* x [rows, k], w packed [n, k], bias [n] or null, y [rows, n]. */
void linear(const float *x, long rows, long k, const float *w, long n, const float *bias, float *y, int threads)
{
    long panels = (n + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long p = 0; p < panels; p++) {
        long width = n - p * PANEL < PANEL ? n - p * PANEL : PANEL;
        float edge[ROWS * PANEL]; /* stands in for y where the last panel is not full */
        for (long begin = 0; begin < k; begin += DEPTH) {
            long depth = k - begin < DEPTH ? k - begin : DEPTH;
            const float *part = w + (p * k + begin) * PANEL;
            for (long row = 0; row < rows; row += ROWS) {
                int count = rows - row < ROWS ? (int)(rows - row) : ROWS;
                float *out = y + row * n + p * PANEL;
                const float *in = x + row * k + begin;
                if (width == PANEL) {
                    products(count, in, k, part, depth, out, n, begin == 0);
                } else {
                    for (int r = 0; r < count; r++) memcpy(edge + r * PANEL, out + r * n, width * sizeof(float));
                    products(count, in, k, part, depth, edge, PANEL, begin == 0);
                    for (int r = 0; r < count; r++) memcpy(out + r * n, edge + r * PANEL, width * sizeof(float));
                }
                if (bias && begin + depth == k)
                    for (int r = 0; r < count; r++)
                        for (long c = 0; c < width; c++) out[r * n + c] += bias[p * PANEL + c];
            }
        }
    }
}

/* ---- row by row --------------------------------------------------------------------------------------------------*/

INLINE void normalise(const float *x, const float *gain, float eps, long k, float *y)
{
    f16 squares = {0};
    float rest = 0;
    long whole = k / 16 * 16;
    for (long i = 0; i < whole; i += 16) squares += load(x + i) * load(x + i);
    for (long i = whole; i < k; i++) rest += x[i] * x[i];
    float scale = 1.0f / sqrtf((sum16(squares) + rest) / k + eps);
    for (long i = 0; i < whole; i += 16) store(y + i, load(gain + i) * (load(x + i) * scale));
    for (long i = whole; i < k; i++) y[i] = gain[i] * (x[i] * scale);
}

/* x [rows, k] += residual [rows, k]; y [rows, k] <- each row of x over its root mean square. */
void add_norm(float *x, const float *residual, const float *gain, float eps, long rows, long k, float *y, int threads)
{
#pragma omp parallel for num_threads(threads) if (rows > 16)
    for (long row = 0; row < rows; row++) {
        float *sum = x + row * k;
        for (long i = 0; i < k; i++) sum[i] += residual[row * k + i];
        normalise(sum, gain, eps, k, y + row * k);
    }
}

INLINE f16 silu(f16 x) { return x / (1.0f + exp16(-x)); }

/* gate_up [rows, 2 n] -> y [rows, n]: silu(gate) * up */
void silu_mul(const float *gate_up, long rows, long n, float *y, int threads)
{
    long whole = n / 16 * 16;
#pragma omp parallel for num_threads(threads) if (rows > 4)
    for (long row = 0; row < rows; row++) {
        const float *gate = gate_up + row * 2 * n, *up = gate + n;
        float *to = y + row * n;
        for (long i = 0; i < whole; i += 16) store(to + i, silu(load(gate + i)) * load(up + i));
        for (long i = whole; i < n; i++) to[i] = silu((f16){0} + gate[i])[0] * up[i];
    }
}

/* qkv [rows, (queries + 2 keys) dim]: normalise queries and keys where gains are given, rotate them in place by
 * table [positions, 2 (cos, sin), dim / 2], and store keys and values in kv [blocks, 2, keys, block, dim]. */
void rotate_and_store(float *qkv, long rows, long queries, long keys, long dim, const float *query_gain,
                      const float *key_gain, float eps, const float *table, const int64_t *positions,
                      const int64_t *slots, float *kv, long block, int threads)
{
    long half = dim / 2, run = block * dim;
#pragma omp parallel for num_threads(threads) if (rows > 4)
    for (long row = 0; row < rows; row++) {
        float *heads = qkv + row * (queries + 2 * keys) * dim;
        const float *cosine = table + positions[row] * dim, *sine = cosine + half;
        for (long h = 0; h < queries + keys; h++) {
            float *low = heads + h * dim, *high = low + half;
            const float *gain = h < queries ? query_gain : key_gain;
            if (gain) normalise(low, gain, eps, dim, low);
            for (long i = 0; i < half; i++) {
                float a = low[i], b = high[i];
                low[i] = a * cosine[i] - b * sine[i];
                high[i] = b * cosine[i] + a * sine[i];
            }
        }
        if (slots[row] < 0) continue; /* a row that fills the batch up */
        float *place = kv + slots[row] / block * 2 * keys * run + slots[row] % block * dim;
        for (long g = 0; g < 2 * keys; g++)
            memcpy(place + g * run, heads + (queries + g) * dim, dim * sizeof(float));
    }
}

/* ---- attention ---------------------------------------------------------------------------------------------------
 *
 * One task is a tile of rows, consecutive tokens of one sequence times the query heads that share a key head. It
 * passes once over the keys that its rows see, 16 at a time, with the online softmax of FlashAttention (arXiv
 * 2205.14135), and reads K and V where they lie, through the block table (PagedAttention, SOSP 2023).
 */

typedef struct {
    float query[TILE_MAX * DIM_MAX], sum[TILE_MAX * DIM_MAX]; /* [rows][dim] */
    float weight[TILE_MAX][STEP], total[TILE_MAX][STEP], best[TILE_MAX];
    float turned[DIM_MAX][STEP]; /* 16 keys, transposed */
} tile;

/* Scores of `rows` rows with 16 keys: lanes are keys. Two sums, over even and odd dimensions, hide latency. */
INLINE void scores(int rows, tile *t, int row, long dim)
{
    f16 even[4] = {0}, odd[4] = {0};
    for (long d = 0; d < dim; d += 2)
        for (int r = 0; r < rows; r++) {
            even[r] += t->query[(row + r) * dim + d] * load(t->turned[d]);
            odd[r] += t->query[(row + r) * dim + d + 1] * load(t->turned[d + 1]);
        }
    for (int r = 0; r < rows; r++) store(t->weight[row + r], even[r] + odd[r]);
}

/* sum += weight x V for `rows` rows and `count` keys. */
INLINE void values(int rows, tile *t, int row, const float *value, int count, long dim)
{
    for (long d = 0; d < dim; d += 16 * WIDE) {
        f16 sum[4][WIDE];
        int wide = dim - d < 16 * WIDE ? 1 : WIDE;
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < WIDE; v++) sum[r][v] = v < wide ? load(t->sum + (row + r) * dim + d + 16 * v) : (f16){0};
        for (int key = 0; key < count; key++)
            for (int v = 0; v < WIDE; v++) {
                f16 x = v < wide ? load(value + key * dim + d + 16 * v) : (f16){0};
                for (int r = 0; r < rows; r++) sum[r][v] += t->weight[row + r][key] * x;
            }
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < wide; v++) store(t->sum + (row + r) * dim + d + 16 * v, sum[r][v]);
    }
}

/* Turn a row's scores of the keys first .. first + 15 into weights; rescale what it has summed so far. */
INLINE void soften(tile *t, int row, long first, long position, long window, long dim)
{
    const i16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    int last = (int)(position - first); /* key of the row's own token, relative to the step */
    int begin = window ? last - (int)window + 1 : -1;
    if (last < 0 || begin >= STEP) {
        store(t->weight[row], (f16){0});
        return;
    }
    const f16 nothing = (f16){0} - INFINITY;
    i16 seen = (lane <= last) & (lane >= begin);
    f16 score = select16(seen, load(t->weight[row]), nothing);
    float best = max16(score);
    if (best > t->best[row]) {
        float keep = exp16((f16){0} + (t->best[row] - best))[0];
        float *sum = t->sum + row * dim;
        for (long d = 0; d < dim; d += 16) store(sum + d, load(sum + d) * keep);
        store(t->total[row], load(t->total[row]) * keep);
        t->best[row] = best;
    }
    f16 weight = select16(seen, exp16(score - t->best[row]), (f16){0});
    store(t->total[row], load(t->total[row]) + weight);
    store(t->weight[row], weight);
}

INLINE void turn(tile *t, const float *key, long dim)
{
    for (long d = 0; d < dim; d += 16) {
        f16 x[16];
        for (int k = 0; k < STEP; k++) x[k] = load(key + k * dim + d);
        transpose16(x);
        for (int i = 0; i < 16; i++) store(t->turned[d + i], x[i]);
    }
}

/* Index of the key at `position` among the vectors of the pool. */
INLINE long place(const int32_t *table, long position, long keys, long head, long block)
{
    return (table[position / block] * 2L * keys + head) * block + position % block;
}

INLINE void prefetch(const float *p, long count)
{
    for (long i = 0; i < count; i += 16) __builtin_prefetch(p + i, 0, 2);
}

static void attend(tile *t, int rows, long group, long dim, long position, long window, const int32_t *table,
                   const float *kv, long keys, long head, long block)
{
    long end = position + rows / group; /* keys that the last row sees end here */
    long begin = window && position >= window ? (position - window + 1) / STEP * STEP : 0;
    for (int r = 0; r < rows; r++) {
        t->best[r] = -INFINITY;
        store(t->total[r], (f16){0});
    }
    memset(t->sum, 0, rows * dim * sizeof(float));
    for (long first = begin; first < end; first += STEP) {
        const float *key = kv + place(table, first, keys, head, block) * dim;
        const float *value = key + keys * block * dim;
        /* The next keys lie elsewhere, where the hardware does not look ahead. */
        const float *next = first + STEP < end ? kv + place(table, first + STEP, keys, head, block) * dim : key;
        int count = end - first < STEP ? (int)(end - first) : STEP;
        prefetch(next, STEP * dim);
        turn(t, key, dim);
        for (int r = 0; r < rows; r += 4)
            switch (rows - r) {
            case 1: scores(1, t, r, dim); break;
            case 2: scores(2, t, r, dim); break;
            case 3: scores(3, t, r, dim); break;
            default: scores(4, t, r, dim);
            }
        prefetch(next + keys * block * dim, STEP * dim);
        for (int r = 0; r < rows; r++) soften(t, r, first, position + r / group, window, dim);
        for (int r = 0; r < rows; r += 4)
            switch (rows - r) {
            case 1: values(1, t, r, value, count, dim); break;
            case 2: values(2, t, r, value, count, dim); break;
            case 3: values(3, t, r, value, count, dim); break;
            default: values(4, t, r, value, count, dim);
            }
    }
}

/* out [rows, queries dim] from qkv [rows, (queries + 2 keys) dim], rotated and stored. Sequence s has the rows
 * starts[s] .. starts[s + 1], which are its last tokens of lengths[s], and the blocks from tables[table_starts[s]] on. */
void attention(const float *qkv, const float *kv, float *out, long sequences, const int32_t *starts,
               const int32_t *lengths, const int32_t *table_starts, const int32_t *tables, long queries, long keys,
               long dim, long block, long window, int threads)
{
    long group = queries / keys, tokens = group < TILE ? TILE / group : 1, stride = (queries + 2 * keys) * dim;
    long first[sequences + 1]; /* tiles before each sequence */
    first[0] = 0;
    for (long s = 0; s < sequences; s++) first[s + 1] = first[s] + (starts[s + 1] - starts[s] + tokens - 1) / tokens;
    float scale = 1.0f / sqrtf(dim);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long task = 0; task < first[sequences] * keys; task++) {
        static _Thread_local tile t;
        long number = task / keys, head = task % keys, s = 0;
        while (first[s + 1] <= number) s++;
        long row = starts[s] + (number - first[s]) * tokens;
        long count = starts[s + 1] - row < tokens ? starts[s + 1] - row : tokens;
        int rows = (int)(count * group);
        for (int r = 0; r < rows; r++) {
            const float *query = qkv + (row + r / group) * stride + (head * group + r % group) * dim;
            for (long d = 0; d < dim; d++) t.query[r * dim + d] = query[d] * scale;
        }
        long position = lengths[s] - (starts[s + 1] - row);
        attend(&t, rows, group, dim, position, window, tables + table_starts[s], kv, keys, head, block);
        for (int r = 0; r < rows; r++) {
            float *to = out + ((row + r / group) * queries + head * group + r % group) * dim;
            float share = 1.0f / sum16(load(t.total[r]));
            for (long d = 0; d < dim; d++) to[d] = t.sum[r * dim + d] * share;
        }
    }
}
