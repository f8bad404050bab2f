"""The C around a form's own functions: vectors of samples, rows to lanes and back, the loop over blocks of samples."""

from __future__ import annotations

HEAD = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 8
#elif defined(__AVX__)
#define LANES 4
#else
#define LANES 2
#endif
#define INLINE static inline __attribute__((always_inline, unused))

typedef double vec __attribute__((vector_size(8 * LANES)));
typedef double loose __attribute__((vector_size(8 * LANES), aligned(8)));  /* a vec at any address of a double */
typedef int64_t mask __attribute__((vector_size(8 * LANES)));

typedef struct {  /* a sparse matrix for each class of cells */
  const int32_t *class_of, *ptr, *col;
  const double *val;
} Transform;

typedef struct {  /* a coefficient that is read, or a block of the result */
  double *owned;        /* rows of num_owned; without rows: one row for all, of all num_local */
  double *ghosts;       /* rows of num_local - num_owned */
  const int64_t *rows;  /* row of each sample, or NULL */
  int64_t num_owned, num_local;
  const int32_t *dofmap;
  Transform transform;
} Field;

typedef struct {
  const int32_t *list;
  int64_t num;
} Entities;

typedef struct {
  const Field *in, *out;
  const Entities *entities;
  const double *x;
  const int32_t *geometry;
  const uint8_t *permutations;
  double *scratch;
  int64_t num_samples, first, last;  /* blocks from first to last */
} Job;

const int64_t fem_vi_lanes = LANES;

INLINE vec spread(double x) { return x - (vec){}; }
INLINE mask spread_mask(int64_t x) { return (mask){} - (int64_t)(x != 0); }
INLINE vec choose(mask m, vec a, vec b) { return (vec)(((mask)a & m) | ((mask)b & ~m)); }

INLINE vec lanes_fabs(vec x) { return (vec)((mask)x & INT64_MAX); }
INLINE vec lanes_fmin(vec x, vec y) { return choose((x < y) | (y != y), x, y); }
INLINE vec lanes_fmax(vec x, vec y) { return choose((x > y) | (y != y), x, y); }
INLINE vec lanes_sqrt(vec x)
{
  vec y;
  double *p = (double *)&x, *q = (double *)&y;
  for (int i = 0; i < LANES; ++i) q[i] = __builtin_sqrt(p[i]);
  return y;
}
INLINE vec power_1(vec x) { return x; }
INLINE vec power_2(vec x) { return x * x; }
INLINE vec power_3(vec x) { return x * x * x; }
INLINE vec power_4(vec x) { return power_2(x * x); }
INLINE vec power_5(vec x) { return power_4(x) * x; }
INLINE vec power_6(vec x) { return power_3(x * x); }
INLINE vec power_7(vec x) { return power_6(x) * x; }
INLINE vec power_8(vec x) { return power_4(x * x); }

/* exp(x) = 2^n exp(r) with |r| <= ln(2) / 2 and exp(r) = 1 + r + r^2 p(r), where p interpolates at Chebyshev points: relative
   error 1.6e-17 before rounding. Adding MAGIC rounds to an integer n, which then stands in the last bits; adding it to the
   exponent multiplies by 2^n. Below -708 the result is zero in place of a number that is smaller than the smallest normal one. */
#define MAGIC 0x1.8p52
#if defined(__AVX512F__)
/* The same with sixteenths of n: exp(x) = 2^(n / 16) exp(r) with |r| <= ln(2) / 32, and a p of degree four, relative error 2.8e-17.
   Of n, the last four bits choose 2^(j / 16) in a table that lies in two registers; one instruction multiplies by the power of
   two that is left, down to zero and up to infinity. */
INLINE vec lanes_exp(vec x)
{
  const vec low = {0x1.0p+0, 0x1.0b5586cf9890fp+0, 0x1.172b83c7d517bp+0, 0x1.2387a6e756238p+0,
                   0x1.306fe0a31b715p+0, 0x1.3dea64c123422p+0, 0x1.4bfdad5362a27p+0, 0x1.5ab07dd485429p+0};
  const vec high = {0x1.6a09e667f3bcdp+0, 0x1.7a11473eb0187p+0, 0x1.8ace5422aa0dbp+0, 0x1.9c49182a3f090p+0,
                    0x1.ae89f995ad3adp+0, 0x1.c199bdd85529cp+0, 0x1.d5818dcfba487p+0, 0x1.ea4afa2a490dap+0};
  x = _mm512_max_pd(spread(-1e3), _mm512_min_pd(spread(1e3), x));  /* a NaN as second argument is what comes out */
  const vec t = x * 0x1.71547652b82fep+4 + MAGIC, n = t - MAGIC;
  const vec r = (x - n * 0x1.62e42fefa39efp-5) - n * 0x1.abc9e3b39803fp-60;
  vec p = 0x1.11120af701debp-7 + r * 0x1.6c17bb51f236dp-10;
  p = 0x1.55555555194d2p-5 + r * p;
  p = 0x1.55555554dd44dp-3 + r * p;
  p = 0x1.0p-1 + r * p;
  p = 1.0 + r * p;
  const vec power = _mm512_permutex2var_pd(low, (__m512i)t, high);
  return _mm512_scalef_pd(power + power * r * p, n * 0x1.0p-4);
}
#else
INLINE vec lanes_exp(vec x)
{
  const vec t = x * 0x1.71547652b82fep0 + MAGIC, n = t - MAGIC;
  const vec r = (x - n * 0x1.62e42fefa39efp-1) - n * 0x1.abc9e3b39803fp-56;
  vec p = 0x1.289185613a3d6p-22 + r * 0x1.af38a9b0ec855p-26;
  p = 0x1.71de0dae63bb3p-19 + r * p;
  p = 0x1.a019b90d2ae7ap-16 + r * p;
  p = 0x1.a01a01a7c41d5p-13 + r * p;
  p = 0x1.6c16c1788bd90p-10 + r * p;
  p = 0x1.11111111109b3p-7 + r * p;
  p = 0x1.5555555553d63p-5 + r * p;
  p = 0x1.5555555555556p-3 + r * p;
  p = 0x1.0p-1 + r * p;
  p = 1.0 + r * p;
  p = 1.0 + r * p;
  vec y = (vec)((mask)p + ((mask)t << 52));
  y = choose(x > 0x1.62e42fefa39efp9, spread(INFINITY), y);
  return choose(x < -708.0, (vec){}, y);
}
#endif

INLINE void load_geometry(double *cell_x, const Job *job, int64_t cell, int nodes)
{
  for (int i = 0; i < nodes; ++i)
    for (int d = 0; d < 3; ++d) cell_x[3 * i + d] = job->x[3 * job->geometry[cell * nodes + i] + d];
}

INLINE void transform(vec *w, const Transform *t, int64_t cell, int n)
{
  vec y[n];
  const int32_t *ptr = t->ptr + (int64_t)t->class_of[cell] * (n + 1);
  for (int i = 0; i < n; ++i) {
    y[i] = (vec){};
    for (int32_t k = ptr[i]; k < ptr[i + 1]; ++k) y[i] += t->val[k] * w[t->col[k]];
  }
  for (int i = 0; i < n; ++i) w[i] = y[i];
}

INLINE void load(vec *w, const Field *f, const vec *X, int64_t cell, int nodes, int bs, int transformed)
{
  const int32_t *dofs = f->dofmap + cell * nodes;
  if (f->rows)
    for (int i = 0; i < nodes; ++i)
      for (int k = 0; k < bs; ++k) w[bs * i + k] = X[(int64_t)dofs[i] * bs + k];
  else
    for (int i = 0; i < nodes; ++i)
      for (int k = 0; k < bs; ++k) w[bs * i + k] = spread(f->owned[(int64_t)dofs[i] * bs + k]);
  if (transformed) transform(w, &f->transform, cell, bs * nodes);
}

INLINE void store(vec *w, const Field *f, vec *Y, int64_t cell, int nodes, int bs, int transformed)
{
  const int32_t *dofs = f->dofmap + cell * nodes;
  if (transformed) transform(w, &f->transform, cell, bs * nodes);
  for (int i = 0; i < nodes; ++i)
    for (int k = 0; k < bs; ++k) Y[(int64_t)dofs[i] * bs + k] += w[bs * i + k];
}

#if defined(__clang__)
#define SHUFFLES 0
#else
#define SHUFFLES 1
/* Row k of a square of numbers becomes column k, by exchanging ever larger blocks. */
INLINE void transpose(vec *r)
{
  for (int s = 1; s < LANES; s *= 2) {
    mask low, high;
    for (int j = 0; j < LANES; ++j) {
      low[j] = j & s ? LANES + j - s : j;
      high[j] = j & s ? LANES + j : j + s;
    }
    for (int i = 0; i < LANES; ++i)
      if (!(i & s)) {
        const vec a = r[i], b = r[i + s];
        r[i] = __builtin_shuffle(a, b, low);
        r[i + s] = __builtin_shuffle(a, b, high);
      }
  }
}
#endif

static void pack_part(vec *X, const double *from, int64_t n, const int64_t *row)
{
  const double *r[LANES];
  for (int k = 0; k < LANES; ++k) r[k] = from + row[k] * n;
  int64_t i = 0;
#if SHUFFLES
  for (; i + LANES <= n; i += LANES) {
    vec tile[LANES];
    for (int k = 0; k < LANES; ++k) tile[k] = *(const loose *)(r[k] + i);
    transpose(tile);
    for (int k = 0; k < LANES; ++k) X[i + k] = tile[k];
  }
#endif
  for (; i < n; ++i)
    for (int k = 0; k < LANES; ++k) X[i][k] = r[k][i];
}

static void pack(vec *X, const Field *f, int64_t sample, int64_t num_samples)
{
  int64_t row[LANES];
  for (int k = 0; k < LANES; ++k) row[k] = f->rows[sample + k < num_samples ? sample + k : num_samples - 1];
  pack_part(X, f->owned, f->num_owned, row);
  pack_part(X + f->num_owned, f->ghosts, f->num_local - f->num_owned, row);
}

static void unpack_part(const vec *Y, double *to, int64_t n, const int64_t *row, int valid)
{
  int64_t i = 0;
#if SHUFFLES
  for (; i + LANES <= n; i += LANES) {
    vec tile[LANES];
    for (int k = 0; k < LANES; ++k) tile[k] = Y[i + k];
    transpose(tile);
    for (int k = 0; k < valid; ++k) *(loose *)(to + row[k] * n + i) += tile[k];
  }
#endif
  for (; i < n; ++i)
    for (int k = 0; k < valid; ++k) to[row[k] * n + i] += Y[i][k];
}

static void unpack(const vec *Y, const Field *f, int64_t block, int64_t num_samples)
{
  const int64_t sample = block * LANES, left = num_samples - sample;
  const int valid = left < LANES ? (int)left : LANES;
  if (f->rows) {
    unpack_part(Y, f->owned, f->num_owned, f->rows + sample, valid);
    unpack_part(Y + f->num_owned, f->ghosts, f->num_local - f->num_owned, f->rows + sample, valid);
    return;
  }
  for (int64_t i = 0; i < f->num_local; ++i) {
    double sum = 0.0;
    for (int k = 0; k < valid; ++k) sum += Y[i][k];
    f->owned[block * f->num_local + i] = sum;
  }
}
"""

TAIL = r"""
void fem_vi_run(const Job *job)
{
  vec *X[NUM_IN + 1], *Y[NUM_OUT], *at = (vec *)job->scratch;
  for (int k = 0; k < NUM_IN; ++k) {
    X[k] = at;
    at += job->in[k].rows ? job->in[k].num_local : 0;
  }
  for (int k = 0; k < NUM_OUT; ++k) {
    Y[k] = at;
    at += job->out[k].num_local;
  }
  for (int64_t block = job->first; block < job->last; ++block) {
    for (int k = 0; k < NUM_IN; ++k)
      if (job->in[k].rows) pack(X[k], job->in + k, block * LANES, job->num_samples);
    for (int k = 0; k < NUM_OUT; ++k) memset(Y[k], 0, sizeof(vec) * job->out[k].num_local);
    integrate(job, X, Y);
    for (int k = 0; k < NUM_OUT; ++k) unpack(Y[k], job->out + k, block, job->num_samples);
  }
}
"""


def scalar_function(name: str) -> str:
    """A function on lanes that calls the one of the C library lane by lane."""
    arguments = {"pow": 2, "atan2": 2, "jn": 2, "yn": 2}.get(name, 1)
    if arguments == 1:
        return _loop(name, "vec x", "x[i]")
    return _loop(name, "int n, vec x", "n, x[i]") if name in ("jn", "yn") else _loop(name, "vec x, vec e", "x[i], e[i]")


def _loop(name: str, parameters: str, arguments: str) -> str:
    return (
        f"static vec lanes_{name}({parameters})\n"
        f"{{\n  vec y;\n  for (int i = 0; i < LANES; ++i) y[i] = {name}({arguments});\n  return y;\n}}\n"
    )


def vector_function(name: str, symbol: str) -> str:
    """A function on lanes that the vector library has."""
    arguments = "vec, vec" if name in ("pow", "atan2") else "vec"
    return f"vec {symbol}({arguments});\n#define lanes_{name} {symbol}\n"
