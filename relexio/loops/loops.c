/* The loops over the moves of a block. moves.py says what moves are; plain.py has the same loops in NumPy.
 *
 * Arrays in, arrays out: nothing is allocated, and nothing of Python is used. ctypes calls them without Python's lock.
 * compiled.py makes every array as large as its loop needs. Contraction must be off (-ffp-contract=off): a product is
 * rounded before it is added, so that all machines give the same bits.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__ || !defined(__SIZEOF_INT128__)
#error "not for this machine: the loops in NumPy are used" /* the extension is optional */
#endif

/* Compiled for processors with AVX2 and for others; one of both is chosen when the library is loaded. */
#if defined(__x86_64__) && defined(__GLIBC__)
#define WIDE __attribute__((target_clones("avx2", "default")))
#else
#define WIDE
#endif
#define INLINE static inline __attribute__((always_inline))

/* A loop is written once and inlined for each kind, which is then a constant. */
enum { BF16, F16, F32, RAW };
#define FLOATS(loop, ...) \
    (kind == F32 ? loop(__VA_ARGS__, F32) : kind == F16 ? loop(__VA_ARGS__, F16) : loop(__VA_ARGS__, BF16))
/* Where only the order of bits matters, f16 is as bf16. */
#define KINDS(loop, ...) \
    (kind == F32 ? loop(__VA_ARGS__, F32) : kind == RAW ? loop(__VA_ARGS__, RAW) : loop(__VA_ARGS__, BF16))

/* ---- elements ---- */

INLINE uint32_t at(const void *array, int64_t i, int kind) {
    if (kind == F32) return ((const uint32_t *)array)[i];
    return kind == RAW ? ((const uint8_t *)array)[i] : ((const uint16_t *)array)[i];
}

INLINE void put(void *array, int64_t i, uint32_t bits, int kind) {
    if (kind == F32) ((uint32_t *)array)[i] = bits;
    else if (kind == RAW) ((uint8_t *)array)[i] = (uint8_t)bits;
    else ((uint16_t *)array)[i] = (uint16_t)bits;
}

/* The highest bit, and all bits. */
INLINE uint32_t top(int kind) { return kind == F32 ? 0x80000000u : kind == RAW ? 0x80u : 0x8000u; }
INLINE uint32_t all(int kind) { return kind == F32 ? 0xFFFFFFFFu : kind == RAW ? 0xFFu : 0xFFFFu; }

/* Bits as integers in the order of the numbers, and back; raw bytes as they are. */
INLINE uint32_t order(uint32_t bits, int kind) {
    if (kind == RAW) return bits;
    return bits & top(kind) ? ~bits & all(kind) : bits | top(kind);
}

INLINE uint32_t unorder(uint32_t place, int kind) {
    if (kind == RAW) return place;
    return place & top(kind) ? place ^ top(kind) : ~place & all(kind);
}

/* Differences modulo 2^w: 0, -1, 1, -2 become 0, 1, 2, 3. */
INLINE uint32_t zigzag(uint32_t change, int kind) {
    return ((change << 1) ^ (change & top(kind) ? all(kind) : 0)) & all(kind);
}

INLINE uint32_t unzigzag(uint32_t by) { return (by >> 1) ^ (0u - (by & 1)); }

INLINE uint32_t moved_by(uint32_t place, uint32_t by, int kind) { return (place + unzigzag(by)) & all(kind); }

/* ---- numbers ---- */

INLINE float f32_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE double f64_of(uint64_t bits) {
    double x;
    memcpy(&x, &bits, 8);
    return x;
}

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

INLINE double value(uint32_t bits, int kind) {
    if (kind == F32) return f32_of(bits);
    if (kind == BF16) return f32_of(bits << 16);
    uint64_t sign = (uint64_t)(bits & 0x8000) << 48, rest = (uint64_t)(bits & 0x7FFF) << 42;
    if (rest >= (uint64_t)0x7C00 << 42) return f64_of(sign | 0x7FF0000000000000u | rest); /* infinity, NaN */
    return f64_of(sign | rest) * 0x1p1008; /* exact for subnormal numbers too */
}

INLINE int is_finite(uint32_t bits, int kind) {
    uint32_t exponent = kind == F32 ? 0x7F800000u : kind == BF16 ? 0x7F80u : 0x7C00u;
    return (bits & exponent) != exponent;
}

/* To nearest, ties to even, once: by way of a float32 rounded to odd (Boldo and Melquiond 2005), as dtypes.py does.
 * Every NaN becomes the same one: which of two NaNs a sum keeps differs between processors. */
INLINE uint32_t rounded(double x, int kind) {
    if (x != x) return kind == F32 ? 0x7FC00000u : kind == BF16 ? 0x7FC0u : 0x7E00u;
    float single = (float)x;
    double back = single;
    uint32_t bits = bits_of(single);
    if (kind == F32) return bits;
    if (back != x) bits = (bits - (fabs(back) > fabs(x))) | 1;
    if (kind == BF16) return (bits + (bits >> 16 & 1) + 0x7FFF) >> 16;
    uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7FFFFFFF;
    if (rest >= 0x47800000) return sign | 0x7C00;                                         /* from 65,536 on */
    if (rest < 0x38800000) return sign | (bits_of(f32_of(rest) + 0.5f) - bits_of(0.5f)); /* in units of 2^-24 */
    return sign | (rest - 0x38000000 + 0xFFF + (rest >> 13 & 1)) >> 13;
}

/* ---- finding moves ---- */

/* Which of 64 elements differ: bit j is for element j. The first loop is vector code, the second packs bytes. */
INLINE uint64_t differing(const void *before, const void *after, int64_t i, int kind) {
    uint8_t differs[64];
    uint64_t found = 0, eight;
    for (int j = 0; j < 64; j++) differs[j] = at(before, i + j, kind) != at(after, i + j, kind);
    for (int j = 0; j < 8; j++) {
        memcpy(&eight, differs + 8 * j, 8);
        found |= (eight * 0x0102040810204080u >> 56) << 8 * j;
    }
    return found;
}

INLINE uint64_t differing_some(const void *before, const void *after, int64_t i, int64_t n, int kind) {
    uint64_t found = 0;
    for (int64_t j = 0; j < n; j++) found |= (uint64_t)(at(before, i + j, kind) != at(after, i + j, kind)) << j;
    return found;
}

/* Words of mask that 64 elements have: one a column, zero up to a multiple of 64, so that they can be transposed. */
INLINE int64_t words_of(int64_t columns) { return columns == 1 ? 1 : (columns + 63) / 64 * 64; }

/* The mask, and how many elements move at each column. One state after the other: that is the order of memory. */
INLINE void compare_kind(const char *rows, int64_t stride, int64_t columns, int64_t n, uint64_t *mask, int64_t *moved,
                         int kind) {
    int64_t words = words_of(columns);
    for (int64_t k = 0; k < words; k++) {
        const char *before = rows + k * stride, *after = before + stride;
        uint64_t *word = mask + k;
        if (k >= columns) {
            for (int64_t i = 0; i < n; i += 64, word += words) *word = 0;
            continue;
        }
        int64_t count = 0, i = 0;
        for (; i + 64 <= n; i += 64, word += words) {
            *word = differing(before, after, i, kind);
            count += __builtin_popcountll(*word);
        }
        if (i < n) {
            *word = differing_some(before, after, i, n - i, kind);
            count += __builtin_popcountll(*word);
        }
        moved[k] = count;
    }
}

#define COMPARE(name, kind) \
    WIDE void name(const char *rows, int64_t stride, int64_t columns, int64_t n, uint64_t *mask, int64_t *moved) { \
        compare_kind(rows, stride, columns, n, mask, moved, kind); \
    }
COMPARE(compare16, BF16)
COMPARE(compare32, F32)
COMPARE(compare8, RAW)

void compare(const char *rows, int64_t stride, int64_t columns, int64_t n, uint64_t *mask, int64_t *moved,
             int64_t kind) {
    (kind == F32 ? compare32 : kind == RAW ? compare8 : compare16)(rows, stride, columns, n, mask, moved);
}

/* Bit j of word i to bit i of word j (Hacker's Delight 7-3), for words that are zero from `rows` on. */
INLINE void swap(uint64_t *word, int distance, uint64_t low, int rows) {
    for (int k = 0; k < rows; k += 2 * distance)
        for (int i = k; i < k + distance; i++) {
            uint64_t differ = (word[i] >> distance ^ word[i + distance]) & low;
            word[i + distance] ^= differ;
            word[i] ^= differ << distance;
        }
}

INLINE void transpose(uint64_t *word, int64_t rows) {
    int some = rows <= 8 ? 8 : 64;
    swap(word, 1, 0x5555555555555555u, some);
    swap(word, 2, 0x3333333333333333u, some);
    swap(word, 4, 0x0F0F0F0F0F0F0F0Fu, some);
    if (rows <= 8) { /* now eight squares of 8 x 8 beside each other: place them below each other */
        for (int square = 7; square >= 0; square--)
            for (int i = 0; i < 8; i++) {
                uint64_t byte = word[i] >> 8 * square & 0xFF;
                word[8 * square + i] = byte;
            }
        return;
    }
    swap(word, 8, 0x00FF00FF00FF00FFu, 64);
    swap(word, 16, 0x0000FFFF0000FFFFu, 64);
    swap(word, 32, 0x00000000FFFFFFFFu, 64);
}

/* Moves written as bytes: the last cell, and how many bytes and moves there are. Beside that, at each column, how many
 * more elements come to differ from `base` than return to it; and moves from or to bits that have all of `exponent`. */
typedef struct {
    uint8_t *when;
    void *by;
    const void *base;
    int64_t *changed, bytes, moves, last, lost;
    uint32_t exponent;
} Written;

INLINE void write_gap(Written *to, int64_t cell) {
    int64_t gap = cell - to->last - 1;
    to->last = cell;
    for (; gap >= 255; gap -= 255) to->when[to->bytes++] = 255;
    to->when[to->bytes++] = (uint8_t)gap;
}

INLINE void write_move(Written *to, int64_t cell, int64_t k, int64_t e, uint32_t before, uint32_t after, int kind) {
    uint32_t base = at(to->base, e, kind), exponent = to->exponent;
    write_gap(to, cell);
    put(to->by, to->moves++, zigzag(order(after, kind) - order(before, kind), kind), kind);
    to->changed[k] += (after != base) - (before != base);
    to->lost += ((before & exponent) == exponent) | ((after & exponent) == exponent);
}

/* Elements that move at most columns: every cell is looked at. `cell` is the first of e. */
INLINE void write_full(Written *to, const char *rows, int64_t stride, int64_t columns, int64_t e, int64_t end,
                       int64_t cell, int kind) {
    for (; e < end; e++) {
        const char *row = rows;
        uint32_t before = at(row, e, kind);
        for (int64_t k = 0; k < columns; k++, cell++) {
            row += stride;
            uint32_t after = at(row, e, kind);
            if (after != before) write_move(to, cell, k, e, before, after, kind);
            before = after;
        }
    }
}

/* 64 elements from e on, of which those in `moving` move. Their mask is transposed: an element has a bit a column. */
INLINE void write_few(Written *to, const char *rows, int64_t stride, int64_t columns, int64_t e, int64_t cell,
                      uint64_t *mask, uint64_t moving, int kind) {
    for (int64_t w = 0; w < columns; w += 64) transpose(mask + w, columns - w);
    for (; moving; moving &= moving - 1) {
        int64_t j = __builtin_ctzll(moving);
        for (int64_t w = 0; w < columns; w += 64)
            for (uint64_t left = mask[w + j]; left; left &= left - 1) {
                int64_t k = w + __builtin_ctzll(left);
                const char *row = rows + k * stride;
                write_move(to, cell + j * columns + k, k, e + j, at(row, e + j, kind), at(row + stride, e + j, kind), kind);
            }
    }
}

/* The moves that mask has, element by element; mask is used up. changed: zero before. sizes: bytes of when, the last cell,
 * and moves that are lost. */
INLINE void emit_kind(const char *rows, int64_t stride, int64_t columns, int64_t n, int64_t first, const void *base,
                      uint32_t exponent, uint64_t *mask, uint8_t *when, void *by, int64_t *changed, int64_t *sizes,
                      int kind) {
    Written to = {when, by, base, changed, 0, 0, sizes[1], 0, exponent};
    for (int64_t e = 0; e < n; e += 64, mask += words_of(columns)) {
        int64_t cell = (first + e) * columns, count = 0;
        uint64_t moving = 0;
        for (int64_t k = 0; k < columns; k++) {
            moving |= mask[k];
            count += __builtin_popcountll(mask[k]);
        }
        if (2 * count > 64 * columns)
            write_full(&to, rows, stride, columns, e, n - e < 64 ? n : e + 64, cell, kind);
        else if (columns > 1 && moving)
            write_few(&to, rows, stride, columns, e, cell, mask, moving, kind);
        else
            for (; moving; moving &= moving - 1) {
                int64_t j = __builtin_ctzll(moving);
                write_move(&to, cell + j, 0, e + j, at(rows, e + j, kind), at(rows + stride, e + j, kind), kind);
            }
    }
    sizes[0] = to.bytes;
    sizes[1] = to.last;
    sizes[2] = to.lost;
}

#define EMIT(name, kind) \
    WIDE void name(const char *rows, int64_t stride, int64_t columns, int64_t n, int64_t first, const void *base, \
                   uint32_t exponent, uint64_t *mask, uint8_t *when, void *by, int64_t *changed, int64_t *sizes) { \
        emit_kind(rows, stride, columns, n, first, base, exponent, mask, when, by, changed, sizes, kind); \
    }
EMIT(emit16, BF16)
EMIT(emit32, F32)
EMIT(emit8, RAW)

void emit(const char *rows, int64_t stride, int64_t columns, int64_t n, int64_t first, const void *base,
          int64_t exponent, uint64_t *mask, uint8_t *when, void *by, int64_t *changed, int64_t *sizes, int64_t kind) {
    (kind == F32 ? emit32 : kind == RAW ? emit8 : emit16)(rows, stride, columns, n, first, base, (uint32_t)exponent, mask,
                                                          when, by, changed, sizes);
}

/* A table as bytes. sizes: bytes, last cell. Returns -1 where rows do not ascend or are no columns. */
int64_t pack(const int64_t *start, const uint16_t *row, int64_t n, int64_t columns, int64_t first, uint8_t *when,
             int64_t *sizes) {
    Written to = {when, 0, 0, 0, 0, 0, sizes[1], 0, 0};
    for (int64_t e = 0; e < n; e++)
        for (int64_t i = start[e]; i < start[e + 1]; i++) {
            int64_t cell = (first + e) * columns + row[i];
            if (row[i] >= columns || cell <= to.last) return -1;
            write_gap(&to, cell);
        }
    sizes[0] = to.bytes;
    sizes[1] = to.last;
    return 0;
}

/* ---- reading tables ---- */

/* What is at hand of a segment: where its bytes and changes are, and how many. `row`: the chain's row of its column 0.
 * `next`: the cell that the next gap, as far as it was read, leads to, counted from the tile's first; `open`: a part of
 * it was read. `marked`: moves in this tile, zero before. The others are for `look`; `inverse` is 2^64 / columns, rounded up. */
typedef struct { int64_t when, when_left, by, by_left, columns, row, next, open, marked, ahead, at, ended; uint64_t inverse; } Source;

/* Sets bits in mask [n, words]: bit r of an element's is for a move at row r. Each byte is read once, and nothing is
 * sorted. A product finds a cell's element: 2^64 / columns, rounded up, is exact for cells * columns < 2^64. */
INLINE int mark_one(Source *source, int64_t n, int64_t words, uint64_t *mask, int single) {
    const uint8_t *byte = (const uint8_t *)(intptr_t)source->when, *end = byte + source->when_left;
    uint64_t columns = source->columns, cells = n * columns, row = source->row, inverse = UINT64_MAX / columns + 1;
    uint64_t cell = source->next;
    int64_t marked = 0;
    int reached = 0;
    for (; byte < end; byte++) {
        uint64_t to = cell + *byte;
        if (*byte == 255) {
            cell = to;
            continue;
        }
        if (to >= cells) {
            reached = 1;
            break;
        }
        uint64_t e = single ? to : (uint64_t)((unsigned __int128)to * inverse >> 64);
        uint64_t r = to - e * columns + row;
        mask[e * words + (r >> 6)] |= (uint64_t)1 << (r & 63);
        marked++;
        cell = to + 1;
    }
    if (source->when_left > end - byte) source->open = byte[-1] == 255;
    source->when = (intptr_t)byte;
    source->when_left = end - byte;
    source->next = cell;
    source->marked += marked;
    return reached;
}

/* Marks the moves of n elements, in the sources from `from` on. Returns the first that ran out of bytes, or `count`. */
int64_t mark(Source *sources, int64_t count, int64_t from, int64_t n, int64_t words, uint64_t *mask) {
    for (int64_t j = from; j < count; j++) {
        Source *source = sources + j;
        int reached = source->columns == 1 ? mark_one(source, n, words, mask, 1) : mark_one(source, n, words, mask, 0);
        if (!reached) return j;
    }
    return count;
}

/* The table of what is marked; `of` [R] says which source has a row. Each must have as many of `by` as it has marked.
 * Most words of mask may be zero, which cannot be foretold: those that are not are listed first, without a branch. */
INLINE void collect_kind(Source *sources, const uint16_t *of, int64_t n, int64_t words, const uint64_t *mask,
                         int64_t *start, uint16_t *row, void *by, int kind) {
    enum { SOME = 256 };
    int64_t found = 0, ahead = 0, size = kind == F32 ? 4 : kind == RAW ? 1 : 2;
    uint16_t listed[SOME], first[SOME], w = 0;
    for (int64_t e = 0, i = 0; e < n; e++) {
        start[e] = ahead;
        ahead += __builtin_popcountll(mask[i++]);
        for (int64_t more = 1; more < words; more++) ahead += __builtin_popcountll(mask[i++]);
    }
    start[n] = ahead;
    for (int64_t end = n * words; end > 0; mask += SOME, end -= SOME) {
        int64_t some = end < SOME ? end : SOME, count = 0;
        for (int64_t i = 0; i < some; i++) {
            listed[count] = (uint16_t)i;
            first[count] = 64 * w;
            count += mask[i] != 0;
            w = w + 1 == words ? 0 : w + 1;
        }
        for (int64_t j = 0; j < count; j++)
            for (uint64_t left = mask[listed[j]]; left; left &= left - 1) {
                int64_t r = first[j] + __builtin_ctzll(left);
                Source *source = sources + of[r];
                row[found] = (uint16_t)r;
                put(by, found++, at((const void *)(intptr_t)source->by, 0, kind), kind);
                source->by += size;
            }
    }
}

#define COLLECT(name, kind) \
    WIDE void name(Source *sources, const uint16_t *of, int64_t n, int64_t words, const uint64_t *mask, \
                   int64_t *start, uint16_t *row, void *by) { \
        collect_kind(sources, of, n, words, mask, start, row, by, kind); \
    }
COLLECT(collect16, BF16)
COLLECT(collect32, F32)
COLLECT(collect8, RAW)

void collect(Source *sources, int64_t count, const uint16_t *of, int64_t n, int64_t words, const uint64_t *mask,
             int64_t *start, uint16_t *row, void *by, int64_t kind) {
    (kind == F32 ? collect32 : kind == RAW ? collect8 : collect16)(sources, of, n, words, mask, start, row, by);
    for (int64_t j = 0; j < count; j++) {
        Source *source = sources + j;
        source->by_left -= source->marked;
        source->next -= n * source->columns;
    }
}

/* ---- tables to tables and states ---- */

/* Rows renamed; -1: the move goes away. Moves of an element that come to the same row are added up, and go away if that
 * is nothing. Returns how many are left. */
INLINE int64_t fold_kind(const int64_t *start, const uint16_t *row, const void *by, int64_t n, const int32_t *renamed,
                         int64_t *new_start, uint16_t *new_row, void *new_by, int kind) {
    int64_t left = 0;
    for (int64_t e = 0; e < n; e++) {
        new_start[e] = left;
        for (int64_t i = start[e]; i < start[e + 1]; i++) {
            int32_t r = renamed[row[i]];
            uint32_t b = at(by, i, kind);
            if (r < 0) continue;
            if (left > new_start[e] && new_row[left - 1] == r) {
                left--;
                b = zigzag((unzigzag(at(new_by, left, kind)) + unzigzag(b)) & all(kind), kind);
                if (!b) continue;
            }
            new_row[left] = (uint16_t)r;
            put(new_by, left++, b, kind);
        }
    }
    new_start[n] = left;
    return left;
}

int64_t fold(const int64_t *start, const uint16_t *row, const void *by, int64_t n, const int32_t *renamed,
             int64_t *new_start, uint16_t *new_row, void *new_by, int64_t kind) {
    return KINDS(fold_kind, start, row, by, n, renamed, new_start, new_row, new_by);
}

/* bits [size], in place, after a segment's moves at columns before `until`, as far as both its streams are at hand. 0: it needs
 * more bytes; 1: more changes; -1: the moves go beyond the block. */
INLINE int64_t advance_kind(Source *source, int64_t until, int64_t size, void *bits, int kind) {
    const uint8_t *byte = (const uint8_t *)(intptr_t)source->when, *end = byte + source->when_left;
    const void *by = (const void *)(intptr_t)source->by;
    uint64_t columns = source->columns, cells = size * columns, inverse = UINT64_MAX / columns + 1, cell = source->next;
    int64_t taken = 0, state = 0;
    for (; byte < end; byte++) {
        uint64_t to = cell + *byte;
        if (*byte == 255) {
            cell = to;
            source->open = 1;
            continue;
        }
        if (to >= cells || taken == source->by_left) {
            state = to >= cells ? -1 : 1;
            break;
        }
        uint64_t e = columns == 1 ? to : (uint64_t)((unsigned __int128)to * inverse >> 64);
        if ((int64_t)(to - e * columns) < until)
            put(bits, e, unorder(moved_by(order(at(bits, e, kind), kind), at(by, taken, kind), kind), kind), kind);
        taken++;
        cell = to + 1;
        source->open = 0;
    }
    source->when = (intptr_t)byte;
    source->when_left = end - byte;
    source->by += taken * (kind == F32 ? 4 : kind == RAW ? 1 : 2);
    source->by_left -= taken;
    source->next = cell;
    return state;
}

int64_t advance(Source *source, int64_t until, int64_t size, void *bits, int64_t kind) {
    return KINDS(advance_kind, source, until, size, bits);
}

/* ---- arithmetic ---- */

/* The value after each move less the value before it. */
INLINE void increments_kind(const int64_t *start, const void *by, const void *bits, int64_t n, double *out, int kind) {
    for (int64_t e = 0; e < n; e++) {
        if (start[e] == start[e + 1]) continue;
        uint32_t place = order(at(bits, e, kind), kind);
        double before = value(at(bits, e, kind), kind);
        for (int64_t i = start[e]; i < start[e + 1]; i++) {
            place = moved_by(place, at(by, i, kind), kind);
            double after = value(unorder(place, kind), kind);
            out[i] = after - before;
            before = after;
        }
    }
}

void increments(const int64_t *start, const void *by, const void *bits, int64_t n, double *out, int64_t kind) {
    FLOATS(increments_kind, start, by, bits, n, out);
}

/* F: out [n, rows], zero before. */
void dense(const int64_t *start, const uint16_t *row, const double *values, int64_t n, int64_t rows, double *out) {
    for (int64_t e = 0; e < n; e++)
        for (int64_t i = start[e]; i < start[e + 1]; i++) out[e * rows + row[i]] = values[i];
}

/* ---- moves element by element, as bytes give them ---- */

/* The next move of a source: its element is `at`, its cell `ahead`; -1 in `ahead` where it is not known yet. 1: that needs more
 * bytes. `ended`: there are none. */
INLINE int look(Source *source) {
    while (source->ahead < 0) {
        if (!source->when_left) return !source->ended;
        uint8_t byte = *(const uint8_t *)(intptr_t)source->when;
        source->when++;
        source->when_left--;
        source->open = byte == 255;
        if (byte == 255) {
            source->next += 255;
            continue;
        }
        source->ahead = source->next + byte;
        source->next = source->ahead + 1;
        source->at = source->columns == 1 ? source->ahead
                                          : (int64_t)((unsigned __int128)(uint64_t)source->ahead * source->inverse >> 64);
    }
    return 0;
}

/* An element whose moves are gathered, -1 for none; from which source on; how many, and the value after them. */
typedef struct { int64_t element, source, count, place; double before; } Gathered;

enum { GATHERED = -1, NO_MORE = -2 };

/* The moves of the next element before `last`, in the order of rows, those at the first `rows` of them: what each adds to it, in
 * added, and where, in at_row. Otherwise 2 j, or 2 j + 1, if source j needs more bytes, or changes: call it again with them. */
INLINE int64_t gather(Source *sources, int64_t count, int64_t last, int64_t rows, const void *bits, Gathered *to,
                      double *restrict added, uint16_t *restrict at_row, int kind) {
    if (to->element < 0) {
        int64_t next = last;
        for (int64_t j = 0; j < count; j++) {
            if (look(sources + j)) return 2 * j;
            if (sources[j].ahead >= 0 && sources[j].at < next) next = sources[j].at;
        }
        if (next == last) return NO_MORE;
        *to = (Gathered){next, 0, 0, order(at(bits, next, kind), kind), value(at(bits, next, kind), kind)};
    }
    for (; to->source < count; to->source++) {
        Source *source = sources + to->source;
        for (;;) {
            if (look(source)) return 2 * to->source;
            if (source->ahead < 0 || source->at != to->element) break;
            if (!source->by_left) return 2 * to->source + 1;
            int64_t row = source->row + source->ahead - source->at * source->columns;
            uint32_t by = at((const void *)(intptr_t)source->by, 0, kind);
            source->by += kind == F32 ? 4 : 2;
            source->by_left--;
            source->ahead = -1;
            if (row >= rows || !by) continue; /* no move is by nothing, but in a store that is damaged */
            to->place = moved_by((uint32_t)to->place, by, kind);
            double after = value(unorder((uint32_t)to->place, kind), kind);
            added[to->count] = after - to->before;
            at_row[to->count++] = (uint16_t)row;
            to->before = after;
        }
    }
    return GATHERED;
}

/* Adds F^T F to total [rows, rows], which is symmetric. Every pair of moves of an element, once: the lower half, mirrored at
 * the end. Moves at rows one after the other, without a gap, are vector code. */
INLINE int64_t gram_kind(Source *sources, int64_t sources_count, int64_t last, int64_t rows, const void *bits, Gathered *to,
                         double *restrict added, uint16_t *restrict at_row, double *restrict total, int kind) {
    int64_t state;
    while ((state = gather(sources, sources_count, last, rows, bits, to, added, at_row, kind)) == GATHERED) {
        int64_t count = to->count;
        int full = count >= 8 && at_row[count - 1] - at_row[0] == count - 1;
        to->element = -1;
        for (int64_t j = 0; j < count; j++) {
            double *restrict line = total + at_row[j] * rows, factor = added[j];
            if (full) {
                line += at_row[0];
                for (int64_t i = 0; i <= j; i++) line[i] += added[i] * factor;
            } else {
                for (int64_t i = 0; i <= j; i++) line[at_row[i]] += added[i] * factor;
            }
        }
    }
    for (int64_t i = 0; state == NO_MORE && i < rows; i++)
        for (int64_t j = 0; j < i; j++) total[j * rows + i] = total[i * rows + j];
    return state;
}

#define GRAM(name, kind) \
    WIDE int64_t name(Source *sources, int64_t count, int64_t last, int64_t rows, const void *bits, Gathered *to, \
                      double *added, uint16_t *at_row, double *total) { \
        return gram_kind(sources, count, last, rows, bits, to, added, at_row, total, kind); \
    }
GRAM(gram_bf16, BF16)
GRAM(gram_f16, F16)
GRAM(gram_f32, F32)

int64_t gram(Source *sources, int64_t count, int64_t last, int64_t rows, const void *bits, Gathered *to, double *added,
             uint16_t *at_row, double *total, int64_t kind) {
    return (kind == F32 ? gram_f32 : kind == F16 ? gram_f16 : gram_bf16)(sources, count, last, rows, bits, to, added, at_row, total);
}

/* base + F w for weights [rows, targets], rounded, in place of the base's bits in out [targets, size]; elements without moves keep
 * theirs. lost: how many are not finite where the base is. */
INLINE int64_t predict_kind(Source *sources, int64_t count, int64_t last, int64_t rows, const void *bits, Gathered *to,
                            double *restrict added, uint16_t *restrict at_row, const double *restrict weights, int64_t targets,
                            int64_t size, void *out, int64_t *lost, int kind) {
    int64_t state;
    while ((state = gather(sources, count, last, rows, bits, to, added, at_row, kind)) == GATHERED) {
        int64_t e = to->element, moves = to->count;
        uint32_t before = at(bits, e, kind);
        to->element = -1;
        for (int64_t t = 0; moves && t < targets; t++) {
            double sum = 0;
            for (int64_t i = 0; i < moves; i++) sum += added[i] * weights[at_row[i] * targets + t];
            uint32_t result = rounded(value(before, kind) + sum, kind);
            *lost += is_finite(before, kind) & !is_finite(result, kind);
            put(out, t * size + e, result, kind);
        }
    }
    return state;
}

WIDE int64_t predict(Source *sources, int64_t count, int64_t last, int64_t rows, const void *bits, Gathered *to, double *added,
                     uint16_t *at_row, const double *weights, int64_t targets, int64_t size, void *out, int64_t *lost,
                     int64_t kind) {
    return FLOATS(predict_kind, sources, count, last, rows, bits, to, added, at_row, weights, targets, size, out, lost);
}

/* ---- adapters ---- */

/* Factors [rank, n] and [rank, m] of float32 values: their product, out [n, m], zero before. Terms are added in the order
 * of ranks, and each sum is rounded to float32: as by fused multiply-add, since a term is exact. Some columns at a time of
 * all rows, so that they stay in the cache. */
WIDE void product(const double *rows, const double *columns, int64_t rank, int64_t n, int64_t m, float *restrict out) {
    for (int64_t first = 0; first < m; first += 256) {
        int64_t some = m - first < 256 ? m - first : 256;
        for (int64_t i = 0; i < n; i++) {
            float *sum = out + i * m + first;
            for (int64_t k = 0; k < rank; k++) {
                const double *column = columns + k * m + first;
                double row = rows[k * n + i];
                for (int64_t j = 0; j < some; j++) sum[j] = (float)(row * column[j] + sum[j]);
            }
        }
    }
}

/* setuptools builds modules of Python; this one is only ever loaded by ctypes. */
extern void *PyExc_ImportError;
void PyErr_SetString(void *type, const char *message);
void *PyInit__loops(void) {
    PyErr_SetString(PyExc_ImportError, "relexio.loops._loops is loaded by ctypes: import relexio.loops");
    return 0;
}
