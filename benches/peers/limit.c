/* What an optimizer's step moves through memory, and nothing else: each gradient is read, each parameter and each of
 * `slots` state arrays is read and written, with one multiply-add, in one pass. The factors come at run time as 1 and
 * 0, so that the compiler cannot drop the work and the values stay what they are.
 *
 * Work lies in chunks: chunk k has length[k] elements at p[k], g[k] and s[j * chunks + k] for j < slots. */

#define LIMIT(NAME, T) \
    static void NAME##_chunk(long long n, long long slots, T *restrict p, const T *restrict g, T *restrict s0, T *restrict s1, \
                             T *restrict s2, T keep, T add) \
    { \
        switch (slots) { \
        case 0: \
            for (long long i = 0; i < n; i++) \
                p[i] = keep * p[i] + add * g[i]; \
            break; \
        case 1: \
            for (long long i = 0; i < n; i++) { \
                s0[i] = keep * s0[i] + add * g[i]; \
                p[i] = p[i] + add * s0[i]; \
            } \
            break; \
        case 2: \
            for (long long i = 0; i < n; i++) { \
                s0[i] = keep * s0[i] + add * g[i]; \
                s1[i] = keep * s1[i] + add * g[i]; \
                p[i] = p[i] + s0[i] * s1[i] * add; \
            } \
            break; \
        default: \
            for (long long i = 0; i < n; i++) { \
                s0[i] = keep * s0[i] + add * g[i]; \
                s1[i] = keep * s1[i] + add * g[i]; \
                s2[i] = keep * s2[i] + add * g[i]; \
                p[i] = p[i] + s0[i] * s1[i] * s2[i] * add; \
            } \
        } \
    } \
 \
    void NAME(long long chunks, long long slots, const long long *length, T *const *p, T *const *g, T *const *s, int threads, \
              double keep, double add) \
    { \
        _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)") \
        for (long long k = 0; k < chunks; k++) \
            NAME##_chunk(length[k], slots, p[k], g[k], slots > 0 ? s[k] : 0, slots > 1 ? s[chunks + k] : 0, \
                         slots > 2 ? s[2 * chunks + k] : 0, (T)keep, (T)add); \
    }

LIMIT(limit_float32, float)
LIMIT(limit_float64, double)
