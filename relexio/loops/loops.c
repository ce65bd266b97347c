/* The loops over the moves of a block. moves.py says what moves are; plain.py has the same loops in NumPy.
 *
 * Arrays in, arrays out: nothing is allocated, and nothing of Python is used. ctypes calls them without Python's lock.
 * compiled.py makes every array as large as its loop needs. Contraction must be off (-ffp-contract=off): a product is
 * rounded before it is added, so that all machines give the same bits.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

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

/* The highest bit, and all bits; and all of them, or none, as the highest is. Signs follow no rule: no branch depends on one. */
INLINE uint32_t top(int kind) { return kind == F32 ? 0x80000000u : kind == RAW ? 0x80u : 0x8000u; }
INLINE uint32_t all(int kind) { return kind == F32 ? 0xFFFFFFFFu : kind == RAW ? 0xFFu : 0xFFFFu; }
INLINE uint32_t spread(uint32_t bits, int kind) { return (0 - (bits >> (kind == F32 ? 31 : kind == RAW ? 7 : 15))) & all(kind); }

/* Bits as integers in the order of the numbers, and back; raw bytes as they are. */
INLINE uint32_t order(uint32_t bits, int kind) { return kind == RAW ? bits : bits ^ (spread(bits, kind) | top(kind)); }

INLINE uint32_t unorder(uint32_t place, int kind) {
    return kind == RAW ? place : place ^ (spread(~place & all(kind), kind) | top(kind));
}

/* Differences modulo 2^w: 0, -1, 1, -2 become 0, 1, 2, 3. */
INLINE uint32_t zigzag(uint32_t change, int kind) {
    change &= all(kind);
    return (change << 1 & all(kind)) ^ spread(change, kind);
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

/* Which of 64 elements differ: bit j is for element j. */
#ifdef __SSE2__
#define SAME(size, j) _mm_cmpeq_epi##size(_mm_loadu_si128(one + (j)), _mm_loadu_si128(other + (j)))
INLINE uint64_t differing(const void *before, const void *after, int64_t i, int kind) {
    int64_t first = i * (kind == F32 ? 4 : kind == RAW ? 1 : 2);
    const __m128i *one = (const __m128i *)((const char *)before + first);
    const __m128i *other = (const __m128i *)((const char *)after + first);
    uint64_t found = 0;
    for (int j = 0; j < 4; j++) { /* a byte for each of sixteen elements, then a bit */
        __m128i same = kind == RAW   ? SAME(8, j)
                       : kind == F32 ? _mm_packs_epi16(_mm_packs_epi32(SAME(32, 4 * j), SAME(32, 4 * j + 1)),
                                                       _mm_packs_epi32(SAME(32, 4 * j + 2), SAME(32, 4 * j + 3)))
                                     : _mm_packs_epi16(SAME(16, 2 * j), SAME(16, 2 * j + 1));
        found |= (uint64_t)(_mm_movemask_epi8(same) ^ 0xFFFF) << 16 * j;
    }
    return found;
}
#else /* the first loop is vector code, the second packs bytes */
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
#endif

INLINE uint64_t differing_some(const void *before, const void *after, int64_t i, int64_t n, int kind) {
    uint64_t found = 0;
    for (int64_t j = 0; j < n; j++) found |= (uint64_t)(at(before, i + j, kind) != at(after, i + j, kind)) << j;
    return found;
}

/* Words of mask that 64 elements have: one a column, zero up to a multiple of 64, so that they can be transposed. */
INLINE int64_t words_of(int64_t columns) { return columns == 1 ? 1 : (columns + 63) / 64 * 64; }

/* States [columns + 1] of a block's elements from `first` on. */
typedef struct { const char *rows; int64_t stride, columns, first; } States;

/* The mask of elements from e to end. One state after the other: that is the order of memory. */
INLINE void compare(States of, int64_t e, int64_t end, uint64_t *mask, int kind) {
    int64_t words = words_of(of.columns);
    memset(mask, 0, (end - e + 63) / 64 * words * sizeof *mask);
    for (int64_t k = 0; k < of.columns; k++) {
        const char *before = of.rows + k * of.stride, *after = before + of.stride;
        uint64_t *word = mask + k;
        int64_t i = e;
        for (; i + 64 <= end; i += 64, word += words) *word = differing(before, after, i, kind);
        if (i < end) *word = differing_some(before, after, i, end - i, kind);
    }
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

/* Eight bytes behind what is written may be overwritten. */
INLINE void write_gap(Written *to, int64_t cell) {
    uint64_t gap = cell - to->last - 1, full = gap / 255;
    to->last = cell;
    memset(to->when + to->bytes, 255, 8);
    if (full > 8) memset(to->when + to->bytes + 8, 255, full - 8);
    to->bytes += full;
    to->when[to->bytes++] = (uint8_t)(gap - 255 * full);
}

INLINE void write_move(Written *to, int64_t cell, int64_t k, int64_t e, uint32_t before, uint32_t after, int near, int kind) {
    uint32_t base = at(to->base, e, kind), exponent = to->exponent;
    if (near && cell - to->last <= 255) {
        to->when[to->bytes++] = (uint8_t)(cell - to->last - 1);
        to->last = cell;
    } else {
        write_gap(to, cell);
    }
    put(to->by, to->moves++, zigzag(order(after, kind) - order(before, kind), kind), kind);
    to->changed[k] += (after != base) - (before != base);
    to->lost += ((before & exponent) == exponent) | ((after & exponent) == exponent);
}

INLINE void write_cell(Written *to, States of, int64_t k, int64_t e, int near, int kind) {
    const char *row = of.rows + k * of.stride;
    uint32_t before = at(row, e, kind), after = at(row + of.stride, e, kind);
    write_move(to, (of.first + e) * of.columns + k, k, e, before, after, near, kind);
}

/* Elements of which many move at most columns: every cell is looked at. */
INLINE void write_full(Written *to, States of, int64_t e, int64_t end, int kind) {
    int64_t cell = (of.first + e) * of.columns;
    for (; e < end; e++) {
        const char *row = of.rows;
        uint32_t before = at(row, e, kind);
        for (int64_t k = 0; k < of.columns; k++, cell++) {
            row += of.stride;
            uint32_t after = at(row, e, kind);
            if (after != before) write_move(to, cell, k, e, before, after, 1, kind);
            before = after;
        }
    }
}

/* Moves whose places are known, to be written: elements from `e` on, and columns. What is done for each is the same: where
 * the next one is, which no processor can guess, does not decide which way a loop goes. */
enum { LISTED = 1024 };
typedef struct { int64_t e, count; uint32_t place[LISTED + 64]; } Listed;

INLINE void write_listed(Written *to, States of, Listed *listed, int kind) {
    for (int64_t i = 0; i < listed->count; i++)
        write_cell(to, of, listed->place[i] & 0xFFFF, listed->e + (listed->place[i] >> 16), 0, kind);
    listed->count = 0;
}

/* Adds a place for each bit of a word: i * step behind the first for bit i. Most words have no more than four. */
INLINE void list(Listed *listed, uint64_t word, uint32_t first, uint32_t step) {
    uint32_t *place = listed->place + listed->count;
    int64_t count = __builtin_popcountll(word);
    for (int64_t i = 0; i < 4 || i < count; i++, word &= word - 1)
        place[i] = first + step * (uint32_t)__builtin_ctzll(word | (uint64_t)1 << 63);
    listed->count += count;
}

/* The moves that mask has of elements from e to end, element by element; mask is used up. */
INLINE void emit(Written *to, States of, int64_t e, int64_t end, uint64_t *mask, int kind) {
    Listed listed;
    listed.e = e;
    listed.count = 0;
    for (; e < end; e += 64, mask += words_of(of.columns)) {
        int64_t count = 0, cells = 64 * of.columns;
        uint64_t moving = 0;
        for (int64_t k = 0; k < of.columns; k++) {
            moving |= mask[k];
            count += __builtin_popcountll(mask[k]);
        }
        int many = 16 * count > cells;
        if (many || listed.count > LISTED - 64) write_listed(to, of, &listed, kind);
        if (2 * count > cells) {
            write_full(to, of, e, end - e < 64 ? end : e + 64, kind);
            continue;
        }
        uint32_t behind = (uint32_t)(e - listed.e) << 16;
        if (of.columns == 1) {
            list(&listed, moving, behind, 1 << 16);
            continue;
        }
        for (int64_t w = 0; moving && w < of.columns; w += 64) transpose(mask + w, of.columns - w);
        for (; moving; moving &= moving - 1) { /* an element has a bit a column now */
            uint32_t j = __builtin_ctzll(moving);
            for (int64_t w = 0; w < of.columns; w += 64) {
                uint64_t left = mask[w + j];
                for (; many && left; left &= left - 1) write_cell(to, of, w + __builtin_ctzll(left), e + j, 1, kind);
                if (many) continue;
                if (listed.count > LISTED - 64) write_listed(to, of, &listed, kind);
                list(&listed, left, behind + (j << 16) + (uint32_t)w, 1);
            }
        }
    }
    write_listed(to, of, &listed, kind);
}

/* The moves between states of n elements: a tile of elements at a time, 2^16 at most and a multiple of 64, whose states stay in
 * the cache. mask has room for a tile, when and by for every cell; changed: zero before. sizes: bytes of when, moves, the
 * last cell (at first that before), and moves that are lost. */
INLINE void find_kind(const char *rows, int64_t stride, int64_t columns, int64_t n, int64_t tile, int64_t first, const void *base,
                      uint32_t exponent, uint64_t *mask, uint8_t *when, void *by, int64_t *changed, int64_t *sizes, int kind) {
    States of = {rows, stride, columns, first};
    Written to = {when, by, base, changed, 0, 0, sizes[2], 0, exponent};
    for (int64_t e = 0; e < n; e += tile) {
        int64_t end = n - e < tile ? n : e + tile;
        compare(of, e, end, mask, kind);
        emit(&to, of, e, end, mask, kind);
    }
    sizes[0] = to.bytes;
    sizes[1] = to.moves;
    sizes[2] = to.last;
    sizes[3] = to.lost;
}

#define FIND(name, kind) \
    WIDE void name(const char *rows, int64_t stride, int64_t columns, int64_t n, int64_t tile, int64_t first, const void *base, \
                   uint32_t exponent, uint64_t *mask, uint8_t *when, void *by, int64_t *changed, int64_t *sizes) { \
        find_kind(rows, stride, columns, n, tile, first, base, exponent, mask, when, by, changed, sizes, kind); \
    }
FIND(find16, BF16)
FIND(find32, F32)
FIND(find8, RAW)

void find(const char *rows, int64_t stride, int64_t columns, int64_t n, int64_t tile, int64_t first, const void *base,
          int64_t exponent, uint64_t *mask, uint8_t *when, void *by, int64_t *changed, int64_t *sizes, int64_t kind) {
    (kind == F32 ? find32 : kind == RAW ? find8 : find16)(rows, stride, columns, n, tile, first, base, (uint32_t)exponent, mask,
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
