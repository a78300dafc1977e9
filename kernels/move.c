/* Copying segments of memory, and summing them with XXH3-64 in the same pass.
 *
 * A copy of more than the caches hold is bound by memory, and the processor has time to spare while it waits: each
 * line is loaded once, goes into the checksum, and is stored from the same register. So the sum is that of the bytes
 * that were stored, even if somebody writes to the source meanwhile.
 *
 * XXH3 (https://github.com/Cyan4973/xxHash, doc/xxhash_spec.md) for inputs of more than 240 bytes: eight 64-bit sums
 * take in stripes of 64 bytes; stripe i of a block of 16 is mixed with the secret from byte 8 i on; after a block
 * the sums are scrambled; the last stripe has a place in the secret of its own. Segments here are whole stripes, so
 * that a piece's last stripe overlaps no other.
 */

#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "XXH3 reads little-endian numbers; the caller has another way"
#endif

enum { STRIPE = 64, BLOCK = 16 /* stripes */ };

#define INLINE static inline __attribute__((always_inline))

/* `product` is low half times high half in each lane. `stream` stores past the caches, to an aligned address: a line
 * that is written whole need not be read first, and what lies in the caches stays there. */
#if defined(__AVX512F__)
#include <immintrin.h>
typedef uint64_t lanes __attribute__((vector_size(64)));
INLINE lanes product(lanes x) { return (lanes)_mm512_mul_epu32((__m512i)x, (__m512i)(x >> 32)); }
INLINE void stream(uint8_t *p, lanes x) { _mm512_stream_si512((__m512i *)p, (__m512i)x); }
INLINE void settle(void) { _mm_sfence(); }
#elif defined(__AVX2__)
#include <immintrin.h>
typedef uint64_t lanes __attribute__((vector_size(32)));
INLINE lanes product(lanes x) { return (lanes)_mm256_mul_epu32((__m256i)x, (__m256i)(x >> 32)); }
INLINE void stream(uint8_t *p, lanes x) { _mm256_stream_si256((__m256i *)p, (__m256i)x); }
INLINE void settle(void) { _mm_sfence(); }
#elif defined(__SSE2__)
#include <emmintrin.h>
typedef uint64_t lanes __attribute__((vector_size(16)));
INLINE lanes product(lanes x) { return (lanes)_mm_mul_epu32((__m128i)x, (__m128i)(x >> 32)); }
INLINE void stream(uint8_t *p, lanes x) { _mm_stream_si128((__m128i *)p, (__m128i)x); }
INLINE void settle(void) { _mm_sfence(); }
#else
typedef uint64_t lanes __attribute__((vector_size(16)));
INLINE lanes product(lanes x) { return (x & 0xffffffff) * (x >> 32); }
INLINE void stream(uint8_t *p, lanes x) { memcpy(p, &x, sizeof(x)); }
INLINE void settle(void) {}
#endif

enum { WIDTH = sizeof(lanes), VECTORS = STRIPE / WIDTH };

typedef struct {
    lanes v[VECTORS];
} sums;

INLINE lanes load(const uint8_t *p)
{
    lanes x;
    memcpy(&x, p, sizeof(x));
    return x;
}

/* The same of memory to which others may write meanwhile. Without `volatile` GCC reads the same bytes again for each
 * instruction that can have them as its operand, and then the sum is not that of what is stored. */
INLINE lanes load_once(const uint8_t *p)
{
    typedef lanes anywhere __attribute__((aligned(1), may_alias));
    return *(const volatile anywhere *)p;
}

INLINE lanes swap_neighbours(lanes x)
{
#if defined(__AVX512F__)
    return (lanes)_mm512_shuffle_epi32((__m512i)x, 0x4e);
#elif defined(__AVX2__)
    return (lanes)_mm256_shuffle_epi32((__m256i)x, 0x4e);
#else
    return (lanes){x[1], x[0]};
#endif
}

/* ---- XXH3-64 with its own secret and seed 0 ----------------------------------------------------------------------*/

static const uint64_t P32_1 = 0x9E3779B1u, P32_2 = 0x85EBCA77u, P32_3 = 0xC2B2AE3Du;
static const uint64_t P64_1 = 0x9E3779B185EBCA87u, P64_2 = 0xC2B2AE3D27D4EB4Fu, P64_3 = 0x165667B19E3779F9u;
static const uint64_t P64_4 = 0x85EBCA77C2B2AE63u, P64_5 = 0x27D4EB2F165667C5u, P_MIX = 0x165667919E3779F9u;

static const uint8_t SECRET[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

/* Where in the secret its parts for one purpose begin. */
enum { FOR_SCRAMBLE = 128, FOR_LAST = 121, FOR_RESULT = 11 };

INLINE sums begin(void)
{
    const uint64_t first[8] = {P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1};
    sums s;
    memcpy(&s, first, sizeof(s));
    return s;
}

INLINE void scramble(sums *s)
{
    for (int v = 0; v < VECTORS; v++) {
        lanes x = s->v[v] ^ s->v[v] >> 47 ^ load(SECRET + FOR_SCRAMBLE + v * WIDTH);
        s->v[v] = x * P32_1;
    }
}

static uint64_t result(const sums *s, uint64_t length)
{
    uint64_t all[8], key[8], out = length * P64_1;
    memcpy(all, s, sizeof(all));
    memcpy(key, SECRET + FOR_RESULT, sizeof(key));
    for (int i = 0; i < 8; i += 2) {
        unsigned __int128 wide = (unsigned __int128)(all[i] ^ key[i]) * (all[i + 1] ^ key[i + 1]);
        out += (uint64_t)wide ^ (uint64_t)(wide >> 64);
    }
    out = (out ^ out >> 37) * P_MIX;
    return out ^ out >> 32;
}

/* ---- one pass ----------------------------------------------------------------------------------------------------*/

enum put { NOWHERE, CACHED, STREAMED };

/* One stream of memory does not occupy a core: the hardware looks ahead within a page of each stream that it sees, and
 * awaits few lines of each. So WAYS pieces are passed through at once, TURN stripes of one after as many of another, as
 * glibc's memcpy does with pages. Tried with 1, 2, 4, 6 and 8 ways and turns of 2 to 16 stripes: these sum a quarter
 * faster than one way, and copy a fifth. */
enum { WAYS = 4, TURN = 4 };

enum { AHEAD = 1024 }; /* bytes from where a way is to where it fetches: the time that memory takes to answer */

/* What is not streamed is fetched into the second cache, not the first: of what the first one misses a core can await
 * some twenty lines at a time, which is too few for memory's time to answer. */

/* A few stripes, while others are fetched. `check`, `put` and, in whole turns, `stripes` are known to the compiler, so
 * that the sums stay in registers and the loop has no branches. */
INLINE void run(sums *s, const uint8_t *from, uint8_t *to, const uint8_t *fetch, long stripes, const uint8_t *key,
                int check, enum put put)
{
    for (long i = 0; i < stripes; i++) {
        __builtin_prefetch(fetch + i * STRIPE, 0, put == STREAMED ? 0 : 2); /* past the caches or into the second */
        for (int v = 0; v < VECTORS; v++) {
            long at = i * STRIPE + v * WIDTH;
            lanes x = load_once(from + at);
            if (check) s->v[v] += product(x ^ load(key + i * 8 + v * WIDTH)) + swap_neighbours(x);
            if (put == CACHED) memcpy(to + at, &x, WIDTH);
            if (put == STREAMED) stream(to + at, x);
        }
    }
}

INLINE long least(long a, long b) { return a < b ? a : b; }

/* Where segments lie: the same `count` blocks in each layer, layers `layer` bytes apart. Segment s of a piece begins
 * `stride` times the number of the piece's block, plus `step` times s, behind where its layer does, and the first of them
 * at `base`. Numbers are below `limit`. */
typedef struct {
    uint8_t *base;
    const int64_t *blocks;
    int64_t count, layer, stride, step, limit;
} places;

INLINE uint8_t *place(const places *at, long piece, long segment)
{
    return at->base + piece / at->count * at->layer + at->blocks[piece % at->count] * at->stride + segment * at->step;
}

/* How the pieces are cut: alike, so that those that are passed through together share all that is counted. */
typedef struct {
    long segments, size;
} cut;

/* `ways` pieces from number `first` on, before `end`; `out` is for their sums. */
INLINE void together(const places *source, const places *target, cut cut, uint64_t *out, int check, enum put put,
                     long first, long end, int ways)
{
    const long segments = cut.segments, size = cut.size;
    sums s[WAYS];
    const uint8_t *from[WAYS], *coming[WAYS]; /* segments that are passed through, and those that are next */
    uint8_t *to[WAYS];
    long done = 0; /* stripes of the running block */
    for (int w = 0; w < ways; w++) s[w] = begin();
    for (long i = 0; i < segments; i++) {
        long stop = i + 1 == segments ? size - STRIPE : size; /* the pieces' last stripe, or none */
        for (int w = 0; w < ways; w++) {
            long next = least(first + ways + w, end - 1);
            from[w] = place(source, first + w, i);
            coming[w] = i + 1 < segments ? place(source, first + w, i + 1) : place(source, next, 0);
            to[w] = put == NOWHERE ? 0 : place(target, first + w, i);
        }
        for (long at = 0, stripes; at < size; at += stripes * STRIPE) {
            stripes = at == stop ? 1 : least(least(BLOCK - done, TURN), (stop - at) / STRIPE);
            for (int w = 0; w < ways; w++) {
                const uint8_t *fetch = at + AHEAD < size ? from[w] + at + AHEAD : coming[w] + at + AHEAD - size;
                if (at == stop)
                    run(&s[w], from[w] + at, to[w] + at, fetch, 1, SECRET + FOR_LAST, check, put);
                else if (stripes == TURN)
                    run(&s[w], from[w] + at, to[w] + at, fetch, TURN, SECRET + done * 8, check, put);
                else
                    run(&s[w], from[w] + at, to[w] + at, fetch, stripes, SECRET + done * 8, check, put);
            }
            if (at != stop && (done += stripes) == BLOCK) {
                for (int w = 0; w < ways; w++) scramble(&s[w]);
                done = 0;
            }
        }
    }
    for (int w = 0; check && w < ways; w++) out[w] = result(&s[w], segments * size);
}

/* Pieces from number `piece` on, before `end`. */
INLINE void pass(const places *source, const places *target, cut cut, uint64_t *out, int check, enum put put,
                 long piece, long end)
{
    long begin = piece;
    for (; piece + WAYS <= end; piece += WAYS)
        together(source, target, cut, out + (piece - begin), check, put, piece, end, WAYS);
    for (; piece < end; piece++) together(source, target, cut, out + (piece - begin), check, put, piece, end, 1);
}

static int within(const places *at)
{
    int outside = 0;
    for (long i = 0; i < at->count; i++) outside |= (uint64_t)at->blocks[i] >= (uint64_t)at->limit;
    return !outside;
}

static int aligned(const places *at)
{
    return ((uintptr_t)at->base | at->layer | at->stride | at->step) % WIDTH == 0;
}

/* Copy `pieces` of `segments` each to target and put their sums into out. No target: sums only. No out: copy only.
 * Where sums are wanted, size must be a multiple of STRIPE and a piece more than 240 bytes. `streamed` asks for stores
 * past the caches, which are made if all places in the target allow it; size must be a multiple of STRIPE then, too.
 * Returns 0, and has done nothing, where a block's number is not below its limit. */
int move(const places *source, const places *target, long pieces, long segments, long size, int streamed, uint64_t *out)
{
    const cut cut = {segments, size};
    if (!within(source) || (target && !within(target))) return 0;
    if (!target) {
        pass(source, 0, cut, out, 1, NOWHERE, 0, pieces);
    } else if (!streamed || !aligned(target)) {
        if (out) {
            pass(source, target, cut, out, 1, CACHED, 0, pieces);
            return 1;
        }
        for (long piece = 0; piece < pieces; piece++)
            for (long i = 0; i < segments; i++) memcpy(place(target, piece, i), place(source, piece, i), size);
    } else {
        if (out)
            pass(source, target, cut, out, 1, STREAMED, 0, pieces);
        else
            pass(source, target, cut, 0, 0, STREAMED, 0, pieces);
        settle();
    }
    return 1;
}

/* ---- in step -----------------------------------------------------------------------------------------------------*/

/* What the two ends of a copy share that are two processes: one sums the source, the other copies it and finds it in
 * the cache that both have, if the first is not far ahead. Either only counts up its own counter, and believes nothing
 * of the other's but how far it may go. The sum of piece n, counted from the beginning of time, is at n % ring. */
typedef struct {
    uint64_t *summed, *taken, *sums;
    uint64_t ring, ahead; /* pieces: of the ring, and that the first may be ahead of the second */
} ledger;

enum { MOST_AT_ONCE = 256 }; /* pieces */
enum { SHORT = 256, LONG = 300000 }; /* waiting for the other end: looks in a row, nanoseconds before one gives up */

INLINE void breathe(void)
{
#if defined(__SSE2__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

/* How many of the pieces from number `from` on `counter` leaves to us, once that is any; 0: none for now. */
static long open_to(const uint64_t *counter, uint64_t from)
{
    struct timespec begun, now;
    for (int i = 0;; i++) {
        int64_t open = (int64_t)(__atomic_load_n(counter, __ATOMIC_ACQUIRE) - from);
        if (open > 0) return open;
        if (i < SHORT) {
            breathe();
            continue;
        }
        sched_yield(); /* the other end, or who else has work, may need this very core */
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (i == SHORT) begun = now;
        if ((now.tv_sec - begun.tv_sec) * 1000000000L + now.tv_nsec - begun.tv_nsec > LONG) return 0;
    }
}

/* Sum the pieces from number `done` on, of which number 0 is `first` in the ledger, `turn` at a time. Returns how many
 * are done: not all, if the other end did not follow in time; -1 where a block's number is not below its limit. */
long lead(const places *source, long done, long pieces, long segments, long size, const ledger *with, uint64_t first,
          long turn)
{
    const cut cut = {segments, size};
    if (!within(source)) return -1;
    while (done < pieces) {
        long open = open_to(with->taken, first + done - with->ahead);
        if (!open) break;
        uint64_t sums[MOST_AT_ONCE];
        long count = least(least(open, pieces - done), least(turn, MOST_AT_ONCE));
        pass(source, 0, cut, sums, 1, NOWHERE, done, done + count);
        for (long i = 0; i < count; i++) with->sums[(first + done + i) % with->ring] = sums[i];
        done += count;
        __atomic_store_n(with->summed, first + done, __ATOMIC_RELEASE);
    }
    return done;
}

/* Copy them, for as long as `over` is 0: the pieces' sums as they were stored go into `ours`, what the other end says
 * into `theirs`. */
long follow(const places *source, const places *target, long done, long pieces, long segments, long size,
            const ledger *with, uint64_t first, long turn, uint64_t *ours, uint64_t *theirs, const int32_t *over)
{
    const cut cut = {segments, size};
    const int streamed = aligned(target);
    if (!within(source) || !within(target)) return -1;
    while (done < pieces && !__atomic_load_n(over, __ATOMIC_RELAXED)) {
        long open = open_to(with->summed, first + done);
        if (!open) break;
        long end = done + least(least(open, pieces - done), turn);
        if (streamed)
            pass(source, target, cut, ours + done, 1, STREAMED, done, end);
        else
            pass(source, target, cut, ours + done, 1, CACHED, done, end);
        for (; done < end; done++) theirs[done] = with->sums[(first + done) % with->ring];
        __atomic_store_n(with->taken, first + done, __ATOMIC_RELEASE);
    }
    settle();
    return done;
}
