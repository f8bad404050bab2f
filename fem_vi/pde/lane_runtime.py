"""The C around a form's own functions: vectors of samples, rows to lanes and back, the loop over blocks of samples."""

from __future__ import annotations

HEAD = r"""
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
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
  double *owned;        /* rows of num_owned; without rows: one row for all, of all num_local; with a stride, see there */
  double *ghosts;       /* rows of num_local - num_owned */
  const int64_t *rows;  /* row of each sample, or NULL */
  int64_t num_owned, num_local;
  int64_t stride;       /* or zero: num_local rows of so many samples, a whole number of blocks: lanes as they are */
  const int32_t *zeros; /* dofs whose value counts as zero */
  int64_t num_zeros;
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
  int64_t together;                  /* blocks that the loop over cells takes at once */
  int64_t checks;                    /* whether to look at what lies side by side too, at a price */
  int64_t is_finite;                 /* result: whether all that was looked at is finite */
} Job;

typedef struct {  /* where lanes are: block b of dof i at `at + stride * i + LANES * b`; NULL: all samples have the same values */
  double *at;
  int64_t stride;
} Lanes;

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
/* The same with sixteenths of n: exp(x) = 2^(n / 16) exp(r) with |r| <= ln(2) / 32, and p of degree four, relative error 2.8e-17.
   The last four bits of n choose 2^(j / 16) in a table that lies in two registers; one instruction multiplies by the power of two
   that is left, down to zero and up to infinity. In assembly: compiling the header of intrinsics takes longer than a form. */
#define INSTRUCTION(name, x, y) ({ vec out_; __asm__(#name " %2, %1, %0" : "=v"(out_) : "v"(x), "v"(y)); out_; })
INLINE vec lanes_exp(vec x)
{
  const vec low = {0x1.0p+0, 0x1.0b5586cf9890fp+0, 0x1.172b83c7d517bp+0, 0x1.2387a6e756238p+0,
                   0x1.306fe0a31b715p+0, 0x1.3dea64c123422p+0, 0x1.4bfdad5362a27p+0, 0x1.5ab07dd485429p+0};
  const vec high = {0x1.6a09e667f3bcdp+0, 0x1.7a11473eb0187p+0, 0x1.8ace5422aa0dbp+0, 0x1.9c49182a3f090p+0,
                    0x1.ae89f995ad3adp+0, 0x1.c199bdd85529cp+0, 0x1.d5818dcfba487p+0, 0x1.ea4afa2a490dap+0};
  x = INSTRUCTION(vminpd, spread(1e3), x);  /* of a number and a NaN, the second is what comes out */
  x = INSTRUCTION(vmaxpd, spread(-1e3), x);
  const vec t = x * 0x1.71547652b82fep+4 + MAGIC, n = t - MAGIC;
  const vec r = (x - n * 0x1.62e42fefa39efp-5) - n * 0x1.abc9e3b39803fp-60;
  vec p = 0x1.11120af701debp-7 + r * 0x1.6c17bb51f236dp-10;
  p = 0x1.55555555194d2p-5 + r * p;
  p = 0x1.55555554dd44dp-3 + r * p;
  p = 0x1.0p-1 + r * p;
  p = 1.0 + r * p;
  vec power = t;
  __asm__("vpermi2pd %2, %1, %0" : "+v"(power) : "v"(low), "v"(high));
  return INSTRUCTION(vscalefpd, power + power * r * p, n * 0x1.0p-4);
}
#else
INLINE vec lanes_exp(vec x)
{
  const vec t = x * 0x1.71547652b82fep0 + MAGIC, n = t - MAGIC;
  const vec r = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;  /* the first product is exact without fma too */
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

INLINE vec *lane(Lanes x, int64_t dof, int64_t block) { return (vec *)(x.at + x.stride * dof + LANES * block); }

INLINE void load(vec *w, const Field *f, Lanes x, int64_t block, int64_t cell, int nodes, int bs, int transformed)
{
  const int32_t *dofs = f->dofmap + cell * nodes;
  if (x.at)
    for (int i = 0; i < nodes; ++i)
      for (int k = 0; k < bs; ++k) w[bs * i + k] = *(const loose *)lane(x, (int64_t)dofs[i] * bs + k, block);
  else
    for (int i = 0; i < nodes; ++i)
      for (int k = 0; k < bs; ++k) w[bs * i + k] = spread(f->owned[(int64_t)dofs[i] * bs + k]);
  if (transformed) transform(w, &f->transform, cell, bs * nodes);
}

INLINE void store(vec *w, const Field *f, Lanes y, int64_t block, int64_t cell, int nodes, int bs, int transformed)
{
  const int32_t *dofs = f->dofmap + cell * nodes;
  if (transformed) transform(w, &f->transform, cell, bs * nodes);
  for (int i = 0; i < nodes; ++i)
    for (int k = 0; k < bs; ++k) *(loose *)lane(y, (int64_t)dofs[i] * bs + k, block) += w[bs * i + k];
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

/* What is not finite leaves a NaN behind: x - x is zero for all other numbers. */
INLINE vec doubt(vec x) { return x - x; }

INLINE int is_zero(vec x)
{
  int yes = 1;
  for (int k = 0; k < LANES; ++k) yes &= x[k] == 0.0;
  return yes;
}

static vec pack_part(Lanes x, const double *from, int64_t n, const int64_t *row)
{
  const double *r[LANES];
  vec doubts = {};
  for (int k = 0; k < LANES; ++k) r[k] = from + row[k] * n;
  int64_t i = 0;
#if SHUFFLES
  for (; i + LANES <= n; i += LANES) {
    vec tile[LANES];
    for (int k = 0; k < LANES; ++k) tile[k] = *(const loose *)(r[k] + i);
    for (int k = 0; k < LANES; ++k) doubts += doubt(tile[k]);
    transpose(tile);
    for (int k = 0; k < LANES; ++k) *lane(x, i + k, 0) = tile[k];
  }
#endif
  for (; i < n; ++i) {
    for (int k = 0; k < LANES; ++k) (*lane(x, i, 0))[k] = r[k][i];
    doubts += doubt(*lane(x, i, 0));
  }
  return doubts;
}

static int pack(Lanes x, const Field *f, int64_t block, int64_t num_samples)
{
  int64_t row[LANES];
  const int64_t sample = block * LANES;
  for (int k = 0; k < LANES; ++k) row[k] = f->rows[sample + k < num_samples ? sample + k : num_samples - 1];
  const vec doubts = pack_part(x, f->owned, f->num_owned, row);
  x.at += x.stride * f->num_owned;
  return is_zero(doubts + pack_part(x, f->ghosts, f->num_local - f->num_owned, row));
}

/* The same where samples lie side by side, for some blocks. */
static int pack_strip(Lanes x, Lanes from, int64_t num_local, int64_t count)
{
  vec doubts = {};
  for (int64_t i = 0; i < num_local; ++i)
    for (int64_t b = 0; b < count; ++b) {
      const vec found = *(const loose *)lane(from, i, b);
      doubts += doubt(found);
      *lane(x, i, b) = found;
    }
  return is_zero(doubts);
}

static int strip_is_finite(Lanes x, int64_t num_local, int64_t count)
{
  vec doubts = {};
  for (int64_t i = 0; i < num_local; ++i)
    for (int64_t b = 0; b < count; ++b) doubts += doubt(*(const loose *)lane(x, i, b));
  return is_zero(doubts);
}

static vec unpack_part(Lanes y, double *to, int64_t n, const int64_t *row, int valid)
{
  int64_t i = 0;
  vec doubts = {};
#if SHUFFLES
  for (; i + LANES <= n; i += LANES) {
    vec tile[LANES];
    for (int k = 0; k < LANES; ++k) tile[k] = *lane(y, i + k, 0);
    transpose(tile);
    for (int k = 0; k < valid; ++k) {
      doubts += doubt(tile[k]);
      *(loose *)(to + row[k] * n + i) = tile[k];
    }
  }
#endif
  for (; i < n; ++i)
    for (int k = 0; k < valid; ++k) {
      const double found = (*lane(y, i, 0))[k];
      doubts[k] += found - found;
      to[row[k] * n + i] = found;
    }
  return doubts;
}

static int unpack(Lanes y, const Field *f, int64_t block, int64_t num_samples)
{
  const int64_t sample = block * LANES, left = num_samples - sample;
  const int valid = left < LANES ? (int)left : LANES;
  if (f->rows) {
    const vec doubts = unpack_part(y, f->owned, f->num_owned, f->rows + sample, valid);
    y.at += y.stride * f->num_owned;
    return is_zero(doubts + unpack_part(y, f->ghosts, f->num_local - f->num_owned, f->rows + sample, valid));
  }
  double doubts = 0.0;
  for (int64_t i = 0; i < f->num_local; ++i) {
    const vec lanes = *lane(y, i, 0);
    double sum = 0.0;
    for (int k = 0; k < valid; ++k) sum += lanes[k];
    f->owned[block * f->num_local + i] = sum;
    doubts += sum - sum;
  }
  return doubts == 0.0;
}

INLINE Lanes next(Lanes x, int64_t block) { x.at += LANES * block; return x; }

/* Whether the lanes of a field are where its samples lie, side by side. */
INLINE int is_in_place(const Field *f) { return f->stride && !f->num_zeros; }

/* Where the lanes of a field are: in the field itself, in scratch memory, or nowhere. */
static Lanes place(const Field *f, double **scratch, int64_t together, int is_result)
{
  if (is_in_place(f)) return (Lanes){f->owned, f->stride};
  if (!f->rows && !f->stride && !is_result) return (Lanes){0, 0};
  const Lanes found = {*scratch, LANES * together};
  *scratch += found.stride * f->num_local;
  return found;
}

/* Bring the samples of some blocks to where their lanes are. */
static int read(Lanes x, const Field *f, int64_t block, int64_t count, const Job *job)
{
  int finite = 1;
  if (is_in_place(f)) return !job->checks || strip_is_finite(x, f->num_local, count);
  if (f->stride) finite &= pack_strip(x, next((Lanes){f->owned, f->stride}, block), f->num_local, count);
  if (f->rows)
    for (int64_t b = 0; b < count; ++b) finite &= pack(next(x, b), f, block + b, job->num_samples);
  for (int64_t k = 0; k < f->num_zeros; ++k) memset(lane(x, f->zeros[k], 0), 0, sizeof(vec) * count);
  return finite;
}

/* Make the lanes of a result ready to be added to. */
static void prepare(Lanes y, const Field *f, int64_t count)
{
  if (!f->stride) memset(y.at, 0, sizeof(double) * y.stride * f->num_local);
  else
    for (int64_t i = 0; i < f->num_local; ++i) memset(lane(y, i, 0), 0, sizeof(vec) * count);
}

/* Bring lanes to where the results of some blocks are. */
static int write(Lanes y, const Field *f, int64_t block, int64_t count, const Job *job)
{
  int finite = 1;
  if (f->stride) return !job->checks || strip_is_finite(y, f->num_local, count);
  for (int64_t b = 0; b < count; ++b) finite &= unpack(next(y, b), f, block + b, job->num_samples);
  return finite;
}

/* Of what all samples have in common, each thread looks at its part. */
static int shared_is_finite(const Field *f, int64_t first, int64_t last, int64_t num_blocks)
{
  double doubts = 0.0;
  for (int64_t i = f->num_local * first / num_blocks; i < f->num_local * last / num_blocks; ++i)
    doubts += f->owned[i] - f->owned[i];
  return doubts == 0.0;
}
"""

TAIL = r"""
static void *run(void *given)
{
  Job *job = given;
  Lanes X[NUM_IN + 1], Y[NUM_OUT], x[NUM_IN + 1], y[NUM_OUT];
  double *scratch = job->scratch;
  const int64_t num_blocks = (job->num_samples + LANES - 1) / LANES;
  int finite = 1;
  for (int k = 0; k < NUM_IN; ++k) X[k] = place(job->in + k, &scratch, job->together, 0);
  for (int k = 0; k < NUM_OUT; ++k) Y[k] = place(job->out + k, &scratch, job->together, 1);
  for (int k = 0; k < NUM_IN; ++k)
    if (!X[k].at) finite &= shared_is_finite(job->in + k, job->first, job->last, num_blocks);
  for (int64_t block = job->first; block < job->last; block += job->together) {
    const int64_t left = job->last - block, count = left < job->together ? left : job->together;
    for (int k = 0; k < NUM_IN; ++k) {
      x[k] = is_in_place(job->in + k) ? next(X[k], block) : X[k];
      finite &= read(x[k], job->in + k, block, count, job);
    }
    for (int k = 0; k < NUM_OUT; ++k) {
      y[k] = job->out[k].stride ? next(Y[k], block) : Y[k];
      prepare(y[k], job->out + k, count);
    }
    integrate(job, x, y, count);
    for (int k = 0; k < NUM_OUT; ++k) finite &= write(y[k], job->out + k, block, count, job);
  }
  job->is_finite = finite;
  return 0;
}

/* Threads that are new are put where nothing else runs; those that wait for work are woken beside who wakes them. */
void fem_vi_run(Job *jobs, int64_t num_jobs)
{
  pthread_t threads[num_jobs];
  int started[num_jobs];
  for (int64_t k = 1; k < num_jobs; ++k) started[k] = pthread_create(threads + k, 0, run, jobs + k) == 0;
  run(jobs);
  for (int64_t k = 1; k < num_jobs; ++k)
    if (started[k]) pthread_join(threads[k], 0);
    else run(jobs + k);
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
