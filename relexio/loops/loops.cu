/* The loops over the moves of a block for a GPU: cuda.py compiles this file once for each KIND, and plain.py has the same loops.
 *
 * It is C too, in which a kernel is one loop over all elements; so the tests run it without a GPU. Only integers and double
 * precision are used: CuPy has kernels take subnormal numbers of single precision for zero. Products are rounded before
 * they are added (-fmad=false), so that all bits are those of the loops for a CPU.
 */
#define BF16 0
#define F16 1
#define F32 2

#ifdef __CUDACC__
#define KERNEL extern "C" __global__ void
#define INLINE static __device__ inline
#define EACH(i, n) \
    for (i64 i = blockIdx.x * (i64)blockDim.x + threadIdx.x; i < (n); i += gridDim.x * (i64)blockDim.x)
#define ADD_ONE(counter) atomicAdd(counter, 1ull)
#else
#define KERNEL void
#define INLINE static inline
#define EACH(i, n) for (i64 i = 0; i < (n); i++)
#define ADD_ONE(counter) (++*(counter))
#endif

typedef long long i64;
typedef unsigned int u32;
typedef unsigned long long u64;
#if KIND == F32
typedef u32 element;
#else
typedef unsigned short element;
#endif

/* Mantissa bits; those of the exponent; the exponent of the smallest normal number. */
#define MANTISSA (KIND == F32 ? 23 : KIND == F16 ? 10 : 7)
#define EXPONENT (KIND == F32 ? 0x7F800000u : KIND == F16 ? 0x7C00u : 0x7F80u)
#define SMALLEST (KIND == F16 ? -14 : -126)
#define TOP (KIND == F32 ? 0x80000000u : 0x8000u)
#define ALL (KIND == F32 ? 0xFFFFFFFFu : 0xFFFFu)

typedef union {
    u64 bits;
    double value;
} number;

/* ---- elements ---- */

INLINE u32 order(u32 bits) { return bits & TOP ? ~bits & ALL : bits | TOP; }

INLINE u32 unorder(u32 place) { return place & TOP ? place ^ TOP : ~place & ALL; }

INLINE u32 moved_by(u32 place, u32 by) { return (place + ((by >> 1) ^ (0u - (by & 1)))) & ALL; }

INLINE int is_finite(u32 bits) { return (bits & EXPONENT) != EXPONENT; }

/* Exact, for subnormal numbers too. */
INLINE double value(u32 bits) {
    u64 rest = (u64)(bits & (TOP - 1)) << (52 - MANTISSA);
    number x, scale;
    x.bits = (u64)(bits & TOP ? 1 : 0) << 63 | rest;
    scale.bits = (u64)(1023 + 1022 + SMALLEST) << 52; /* 2 to the 1022 + SMALLEST */
    if (!is_finite(bits)) {
        x.bits |= (u64)0x7FF << 52;
        return x.value;
    }
    return x.value * scale.value;
}

/* To nearest, ties to even, once. Every NaN becomes the same one. */
INLINE u32 rounded(double wide) {
    number x;
    x.value = wide;
    if (wide != wide) return EXPONENT | 1u << (MANTISSA - 1);
    u32 sign = x.bits >> 63 ? TOP : 0;
    u64 rest = x.bits & (((u64)1 << 52) - 1);
    int exponent = (int)(x.bits >> 52 & 0x7FF) - 1023, above = exponent - SMALLEST;
    int drop = 52 - MANTISSA + (above < 0 ? -above : 0);
    if (drop > 53) return sign; /* less than half of the smallest number */
    u64 whole = rest | (u64)1 << 52, kept = whole >> drop, lost = whole & (((u64)1 << drop) - 1), half = (u64)1 << (drop - 1);
    kept += lost > half || (lost == half && kept & 1);
    kept += (u64)(above < 0 ? 0 : above) << MANTISSA;
    return sign | (kept < EXPONENT ? (u32)kept : EXPONENT);
}

/* ---- bytes to moves ---- */

/* For each byte of when [n], what a running sum of turns into cells and numbers of moves: the cells that it is on, and in
 * the upper half whether a move is there. */
KERNEL addends(const unsigned char *when, i64 n, u64 *out) {
    EACH(i, n) out[i] = when[i] < 255 ? (u64)1 << 32 | (when[i] + 1u) : 255u;
}

/* Put the moves at elements from `first` on, `width` of them, into table [rows, width], which is zero before. sums [n] are those
 * of addends; `before` is the last cell before these bytes; `row` that of the first column. Rows beyond are left out. */
KERNEL scatter(const unsigned char *when, const u64 *sums, const element *by, i64 n, i64 before, i64 columns, i64 row, i64 first,
               i64 width, i64 rows, element *table) {
    EACH(i, n) {
        if (when[i] == 255) continue;
        i64 cell = before + (i64)(sums[i] & 0xFFFFFFFFu), at = cell / columns;
        i64 r = row + cell - at * columns, e = at - first;
        if (e >= 0 && e < width && r < rows) table[r * width + e] = by[(sums[i] >> 32) - 1];
    }
}

/* ---- arithmetic ---- */

/* F^T [rows, n]: the value after each move less the one before, zero where there is none. */
KERNEL increments(const element *table, const element *base, i64 n, i64 rows, double *out) {
    EACH(e, n) {
        u32 place = order(base[e]);
        double before = value(base[e]);
        for (i64 r = 0; r < rows; r++) {
            u32 by = table[r * n + e];
            double added = 0.0;
            if (by) {
                place = moved_by(place, by);
                double after = value(unorder(place));
                added = after - before;
                before = after;
            }
            out[r * n + e] = added;
        }
    }
}

/* base + F w for weights [rows, targets], rounded: out [targets, n]; elements without moves keep their bits. lost: one more for
 * each that is not finite where the base is. */
KERNEL predict(const element *table, const element *base, const double *weights, i64 n, i64 rows, i64 targets, element *out,
               u64 *lost) {
    EACH(i, n * targets) {
        i64 target = i / n, e = i - target * n;
        u32 place = order(base[e]), moves = 0;
        double start = value(base[e]), before = start, sum = 0.0;
        for (i64 r = 0; r < rows; r++) {
            u32 by = table[r * n + e];
            if (!by) continue;
            place = moved_by(place, by);
            double after = value(unorder(place));
            sum += (after - before) * weights[r * targets + target];
            before = after;
            moves = 1;
        }
        u32 result = moves ? rounded(start + sum) : base[e];
        if (!is_finite(result) && is_finite(base[e])) ADD_ONE(lost);
        out[i] = (element)result;
    }
}
