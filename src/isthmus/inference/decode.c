/* The two blocks of a decoder's layer for one more token of each sequence: norm, products, positions, attention over
 * what was seen, MLP. One call a block: with a few hundred kilobytes of weights a block, a dozen small operators would
 * take longer than reading them.
 *
 * Weights are rows (out, in): FP32, bf16, or int8 with an FP32 scale for each row. Activations and sums are FP32.
 * Structures and their order are those of kernels.py. Shapes: B batch, H hidden size, A query heads, K key/value
 * heads, G heads in the cache, C slots, D head size, I columns.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { FP32, BF16, INT8 };
enum { RMS_NORM, LAYER_NORM };
enum { SILU, GELU, GELU_TANH, RELU };

typedef struct {
    const void *weight;
    const float *scale, *bias; /* by row; bias may be NULL */
    int64_t dtype, rows, columns;
} Linear;

typedef struct {
    const float *weight, *bias;
} Norm;

typedef struct {
    Linear qkv, o, up, down; /* up: the gate's rows first, if there is one */
    Norm norm1, norm2;
    const float *q_norm, *k_norm;     /* (D), or NULL */
    const float *o_bias, *down_bias;  /* (H), or NULL */
} Layer;

typedef struct {
    int64_t hidden, heads, kv_heads, cached_heads, head_size, columns;
    int64_t norm, activation, has_gate;
    const int64_t *kv_of_cached; /* (G): which of the K heads it keeps */
    float epsilon;
} Shape;

typedef struct {
    int64_t batch, capacity, slot, used;  /* the new token's slot; slots in use, its own among them */
    const int64_t *positions;             /* (B) */
    const float *cos, *sin;               /* (position, D), the first half of sin negative; NULL: no rotary positions */
    const float *mask;                    /* (B, C): 0, or -inf for padding; NULL: nothing is padded */
    float *scratch;                       /* B * (H + (2A + 2K) * D + 3 * I) + C */
    int16_t *narrowed;                    /* B * max(H, A * D, I) */
} Token;

/* --- products ----------------------------------------------------------------------------------------------------- */

static inline float from_bf16(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

/* One row after the other, which is how memory is read fastest; many sums side by side, as one would wait for itself. */
#define LANES 64
#define DEFINE_ROW(NAME, TYPE, VALUE)                                                                                  \
    static float NAME(const TYPE *w, const float *x, int64_t n) {                                                      \
        const int64_t whole = n / LANES * LANES;                                                                       \
        float lanes[LANES] = {0}, sum = 0;                                                                             \
        for (int64_t i = 0; i < whole; i += LANES)                                                                     \
            for (int64_t j = 0; j < LANES; j++) lanes[j] += VALUE(w[i + j]) * x[i + j];                                \
        for (int64_t i = whole; i < n; i++) sum += VALUE(w[i]) * x[i];                                                 \
        for (int64_t j = 0; j < LANES; j++) sum += lanes[j];                                                           \
        return sum;                                                                                                    \
    }

DEFINE_ROW(row_fp32, float, )
DEFINE_ROW(row_bf16, uint16_t, from_bf16)

/* 13 bits and a sign, so that 32-bit sums hold any 2048 products, and vector units add to 16 sums and more at once. */
#define MOST 8191

static float narrow(const float *x, int64_t n, int16_t *narrowed) {
    float most = 0;
    for (int64_t i = 0; i < n; i++) most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
    if (most == 0) most = 1;
    for (int64_t i = 0; i < n; i++) narrowed[i] = (int16_t)lrintf(x[i] * (MOST / most));
    return most / MOST;
}

static int32_t row_int8(const int8_t *w, const int16_t *x, int64_t n) {
    int32_t sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (int32_t)w[i] * (int32_t)x[i];
    return sum;
}

/* y (B, rows) = x (B, columns) times the matrix, plus the bias. ``narrowed``: room for B * columns. */
void product(const Linear *linear, const float *x, int64_t batch, float *y, int16_t *narrowed) {
    const int64_t rows = linear->rows, n = linear->columns;
    float scale[batch];
    for (int64_t b = 0; b < batch; b++) scale[b] = linear->dtype == INT8 ? narrow(x + b * n, n, narrowed + b * n) : 1;
    for (int64_t row = 0; row < rows; row++)
        for (int64_t b = 0; b < batch; b++) {
            float sum;
            if (linear->dtype == INT8)
                sum = row_int8((const int8_t *)linear->weight + row * n, narrowed + b * n, n) * scale[b] * linear->scale[row];
            else if (linear->dtype == BF16)
                sum = row_bf16((const uint16_t *)linear->weight + row * n, x + b * n, n);
            else
                sum = row_fp32((const float *)linear->weight + row * n, x + b * n, n);
            y[b * rows + row] = linear->bias ? sum + linear->bias[row] : sum;
        }
}

static float dot(const float *a, const float *b, int64_t n) {
    float sum = 0;
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* --- elementwise -------------------------------------------------------------------------------------------------- */

static void rms_norm(const float *x, const float *weight, float epsilon, int64_t n, float *y) {
    const float factor = 1.0f / sqrtf(dot(x, x, n) / n + epsilon);
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * factor * weight[i];
}

static void layer_norm(const float *x, const Norm *norm, float epsilon, int64_t n, float *y) {
    float mean = 0, variance = 0;
    for (int64_t i = 0; i < n; i++) mean += x[i];
    mean /= n;
    for (int64_t i = 0; i < n; i++) variance += (x[i] - mean) * (x[i] - mean);
    const float factor = 1.0f / sqrtf(variance / n + epsilon);
    for (int64_t i = 0; i < n; i++) y[i] = (x[i] - mean) * factor * norm->weight[i] + norm->bias[i];
}

static void normalise(const Shape *shape, const Norm *norm, const float *x, int64_t batch, float *y) {
    for (int64_t b = 0; b < batch; b++, x += shape->hidden, y += shape->hidden) {
        if (shape->norm == RMS_NORM) rms_norm(x, norm->weight, shape->epsilon, shape->hidden, y);
        else layer_norm(x, norm, shape->epsilon, shape->hidden, y);
    }
}

static float activate(int64_t activation, float x) {
    switch (activation) {
    case SILU: return x / (1.0f + expf(-x));
    case GELU: return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    case GELU_TANH: return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    default: return x > 0 ? x : 0;
    }
}

static void rotate(float *x, const float *cos, const float *sin, int64_t size) {
    const int64_t half = size / 2;
    for (int64_t i = 0; i < half; i++) {
        const float first = x[i], second = x[i + half];
        x[i] = first * cos[i] + second * sin[i];
        x[i + half] = second * cos[i + half] + first * sin[i + half];
    }
}

/* ``out`` (B, H): the block's part, and if it brings them the residual (what is there already) and the bias. */
static void finish(const Linear *linear, const float *x, const float *bias, int64_t batch, int brings, int16_t *narrowed,
                   float *scratch, float *out) {
    product(linear, x, batch, brings ? scratch : out, narrowed);
    if (!brings) return;
    for (int64_t b = 0; b < batch; b++, out += linear->rows, scratch += linear->rows)
        for (int64_t i = 0; i < linear->rows; i++) out[i] += scratch[i] + (bias ? bias[i] : 0);
}

/* --- blocks ------------------------------------------------------------------------------------------------------- */

/* One head's mix of the values that it sees. */
static void attend_head(const float *query, const float *keys, const float *values, const float *mask, int64_t used,
                        int64_t size, float *scores, float *mixed) {
    const float scale = 1.0f / sqrtf((float)size);
    float most = -INFINITY, total = 0;
    for (int64_t k = 0; k < used; k++) {
        scores[k] = dot(query, keys + k * size, size) * scale;
        if (mask) scores[k] += mask[k];
        if (scores[k] > most) most = scores[k];
    }
    memset(mixed, 0, size * sizeof *mixed);
    for (int64_t k = 0; k < used; k++) {
        const float weight = expf(scores[k] - most);
        total += weight;
        for (int64_t i = 0; i < size; i++) mixed[i] += weight * values[k * size + i];
    }
    for (int64_t i = 0; i < size; i++) mixed[i] /= total;
}

/* Attention of ``hidden`` (B, H); the new keys and values go into ``cache`` (B, 2, G, C, D). */
void attention(const Shape *shape, const Layer *layer, const Token *token, float *cache, const float *hidden, float *out,
               int brings) {
    const int64_t batch = token->batch, size = shape->head_size, heads = shape->heads, kv_heads = shape->kv_heads;
    const int64_t cached = shape->cached_heads, head_slots = token->capacity * size;
    float *x = token->scratch, *qkv = x + batch * shape->hidden, *mixed = qkv + batch * layer->qkv.rows;
    float *scores = mixed + batch * heads * size;
    normalise(shape, &layer->norm1, hidden, batch, x);
    product(&layer->qkv, x, batch, qkv, token->narrowed);
    for (int64_t b = 0; b < batch; b++) {
        float *query = qkv + b * layer->qkv.rows, *key = query + heads * size, *value = key + kv_heads * size;
        float *keys = cache + b * 2 * cached * head_slots, *values = keys + cached * head_slots;
        for (int64_t head = 0; head < heads + kv_heads; head++) {
            float *turned = query + head * size;
            const float *weight = head < heads ? layer->q_norm : layer->k_norm;
            if (weight) rms_norm(turned, weight, shape->epsilon, size, turned);
            if (token->cos)
                rotate(turned, token->cos + token->positions[b] * size, token->sin + token->positions[b] * size, size);
        }
        for (int64_t head = 0; head < cached; head++) {
            const int64_t to = head * head_slots + token->slot * size, from = shape->kv_of_cached[head] * size;
            memcpy(keys + to, key + from, size * sizeof *keys);
            memcpy(values + to, value + from, size * sizeof *values);
        }
        for (int64_t head = 0; head < heads; head++) {
            const int64_t from = head / (heads / cached) * head_slots;
            attend_head(query + head * size, keys + from, values + from, token->mask ? token->mask + b * token->capacity : 0,
                        token->used, size, scores, mixed + (b * heads + head) * size);
        }
    }
    finish(&layer->o, mixed, layer->o_bias, batch, brings, token->narrowed, x, out);
}

void mlp(const Shape *shape, const Layer *layer, const Token *token, const float *hidden, float *out, int brings) {
    const int64_t batch = token->batch, columns = shape->columns, rows = layer->up.rows;
    float *x = token->scratch, *up = x + batch * shape->hidden, *inner = up + batch * rows;
    normalise(shape, &layer->norm2, hidden, batch, x);
    product(&layer->up, x, batch, up, token->narrowed);
    for (int64_t b = 0; b < batch; b++)
        for (int64_t i = 0; i < columns; i++) {
            const float *row = up + b * rows;
            inner[b * columns + i] = activate(shape->activation, row[i]) * (shape->has_gate ? row[columns + i] : 1.0f);
        }
    finish(&layer->down, inner, layer->down_bias, batch, brings, token->narrowed, x, out);
}
