//! Sums and matrix products of whole tensors, on the CPU.
//!
//! Sums have a fixed shape: blocks of 4096 elements in C order, each summed in f64 in 16 fixed lanes and a
//! fixed tree, then a fixed tree over the blocks. Matrix products are cut into fixed panels of rows, of a symmetric
//! one those at and below the diagonal. So the bits depend neither on threads nor on the instruction sets of this
//! crate; those of a matrix product depend on the kernel that the `matrixmultiply` crate picks for the machine.

use rayon::prelude::*;

use crate::drill::point;
use crate::isa::{Loop, Loops};
use crate::real::{Dtype, Real};

/// Elements of a block of a sum.
pub(crate) const SUM_BLOCK: usize = 4096;
const LANES: usize = 16;
/// Elements that a thread works on at once where each is by itself.
pub(crate) const STRETCH: usize = 16 * 1024;
/// Elements that [`squares_of`] computes at once.
pub(crate) const SQUARES_BLOCK: usize = 16 * LANES;
/// Rows of a panel of a product.
const PANEL: usize = 128;
/// Rows that are transposed together: floats of a cache line.
const STRIP: usize = 16;

/// Adds by a fixed tree, neighbours first; 0 without values.
pub(crate) fn tree(values: &mut [f64]) -> f64 {
    join_tree(values, |a, b| a + b)
}

/// Joins by a fixed tree, neighbours first; 0 without values.
#[inline(always)]
pub(crate) fn join_tree(values: &mut [f64], join: impl Fn(f64, f64) -> f64) -> f64 {
    let mut n = values.len();
    while n > 1 {
        let half = n.div_ceil(2);
        for i in 0..n / 2 {
            values[i] = join(values[2 * i], values[2 * i + 1]);
        }
        if n % 2 == 1 {
            values[half - 1] = values[n - 1];
        }
        n = half;
    }
    values.first().copied().unwrap_or(0.0)
}

/// [`join_tree`] of `leaf(0), …, leaf(n − 1)`, without a list of them: `joined` has what whole subtrees come to, as the
/// digits of a binary counter of the leaves.
#[inline(always)]
fn join_leaves_in_order(n: usize, mut leaf: impl FnMut(usize) -> f64, join: impl Fn(f64, f64) -> f64) -> f64 {
    let mut joined = [0.0; usize::BITS as usize];
    let mut depth = 0;
    for i in 0..n {
        let mut value = leaf(i);
        for _ in 0..i.trailing_ones() {
            depth -= 1;
            value = join(joined[depth], value);
        }
        joined[depth] = value;
        depth += 1;
    }
    let Some(mut value) = joined[..depth].last().copied() else { return 0.0 };
    for &before in joined[..depth - 1].iter().rev() {
        value = join(before, value);
    }
    value
}

/// [`join_leaves_in_order`], side by side.
#[inline(always)]
pub(crate) fn join_leaves(
    loops: Loops,
    n: usize,
    leaf: impl Fn(usize) -> f64 + Sync + Send,
    join: impl Fn(f64, f64) -> f64 + Sync + Send,
) -> f64 {
    let leaf = |i: usize| {
        point();
        leaf(i)
    };
    if loops.parallel && n > 1 {
        join_branch([0, n], n.next_power_of_two(), &leaf, &join)
    } else {
        join_leaves_in_order(n, leaf, join)
    }
}

/// Of leaves `start..end`, at most `span`, a power of two: [`join_tree`] joins those of its halves last.
fn join_branch(
    [start, end]: [usize; 2],
    span: usize,
    leaf: &(impl Fn(usize) -> f64 + Sync + Send),
    join: &(impl Fn(f64, f64) -> f64 + Sync + Send),
) -> f64 {
    if span == 1 {
        return leaf(start);
    }
    let middle = start + span / 2;
    let first = || join_branch([start, middle.min(end)], span / 2, leaf, join);
    if middle >= end {
        return first();
    }
    let (a, b) = rayon::join(first, || join_branch([middle, end], span / 2, leaf, join));
    join(a, b)
}

/// [`tree`] of each column of a matrix in C order, which is used up.
pub(crate) fn tree_of_columns(x: &mut [f64], columns: usize) -> &[f64] {
    let mut n = x.len() / columns;
    while n > 1 {
        for i in 0..n / 2 {
            x.copy_within(2 * i * columns..(2 * i + 1) * columns, i * columns);
            let (sums, rest) = x[i * columns..].split_at_mut(columns);
            sums.iter_mut().zip(&rest[i * columns..]).for_each(|(a, b)| *a += b);
        }
        if n % 2 == 1 {
            x.copy_within((n - 1) * columns..n * columns, n / 2 * columns);
        }
        n = n.div_ceil(2);
    }
    &x[..columns]
}

/// Joins `term(i)` over `0..n` in 16 lanes, each from `neutral` on: lane k joins the terms k, k + 16, …
#[inline(always)]
pub(crate) fn join_lanes(
    n: usize,
    neutral: f64,
    mut term: impl FnMut(usize) -> f64,
    join: impl Fn(f64, f64) -> f64,
) -> f64 {
    let mut joined = [neutral; LANES];
    let whole = n - n % LANES;
    for start in (0..whole).step_by(LANES) {
        for (k, lane) in joined.iter_mut().enumerate() {
            *lane = join(*lane, term(start + k));
        }
    }
    for i in whole..n {
        joined[i - whole] = join(joined[i - whole], term(i));
    }
    join_tree(&mut joined, join)
}

/// [`join_lanes`] of `term(x)` over an array: the same bits, in whole vectors.
#[inline(always)]
pub(crate) fn join_array<F: Real>(
    x: &[F],
    neutral: f64,
    term: impl Fn(F) -> f64,
    join: impl Fn(f64, f64) -> f64,
) -> f64 {
    let mut joined = [neutral; LANES];
    join_to(&mut joined, x, term, &join);
    join_tree(&mut joined, join)
}

#[inline(always)]
fn join_to<F: Real>(joined: &mut [f64; LANES], x: &[F], term: impl Fn(F) -> f64, join: impl Fn(f64, f64) -> f64) {
    let (whole, rest) = x.as_chunks::<LANES>();
    for chunk in whole {
        for (lane, &x) in joined.iter_mut().zip(chunk) {
            *lane = join(*lane, term(x));
        }
    }
    for (lane, &x) in joined.iter_mut().zip(rest) {
        *lane = join(*lane, term(x));
    }
}

/// Sum of the squares of an array in one set of lanes.
#[inline(always)]
fn sum_in_lanes<F: Real>(x: &[F]) -> f64 {
    let mut sums = [0.0; LANES];
    add_squares(&mut sums, x);
    tree_of_lanes(&mut sums, x.len())
}

/// Sum of the squares of `f(x, y)` over two arrays in one set of lanes. `f` has a loop of its own: what it computes takes
/// longer than the sum and is worth the longest vectors.
#[inline(always)]
pub(crate) fn squares_of<F: Real>(x: &[F], y: &[F], block: &mut [F; SQUARES_BLOCK], f: impl Fn(F, F) -> F) -> f64 {
    let mut sums = [0.0; LANES];
    for (x, y) in x.chunks(block.len()).zip(y.chunks(block.len())) {
        let block = &mut block[..x.len()];
        for ((value, &x), &y) in block.iter_mut().zip(x).zip(y) {
            *value = f(x, y);
        }
        add_squares(&mut sums, block);
    }
    tree_of_lanes(&mut sums, x.len())
}

#[inline(always)]
fn add_squares<F: Real>(sums: &mut [f64; LANES], x: &[F]) {
    join_to(sums, x, |x| x.to_f64() * x.to_f64(), |a, b| a + b);
}

/// [`tree`] of lanes that so many squares were added to: the zeros behind them change nothing.
#[inline(always)]
fn tree_of_lanes(sums: &mut [f64; LANES], n: usize) -> f64 {
    if n < LANES { tree(&mut sums[..n]) } else { tree(sums) }
}

/// [`join_array`] of `term(x, y)` over two arrays of a length.
#[inline(always)]
fn join_arrays<F: Real>(
    x: &[F],
    y: &[F],
    neutral: f64,
    term: impl Fn(F, F) -> f64,
    join: impl Fn(f64, f64) -> f64,
) -> f64 {
    let mut joined = [neutral; LANES];
    let ((xs, x_rest), (ys, y_rest)) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
    for (xs, ys) in xs.iter().zip(ys) {
        for ((lane, &x), &y) in joined.iter_mut().zip(xs).zip(ys) {
            *lane = join(*lane, term(x, y));
        }
    }
    for ((lane, &x), &y) in joined.iter_mut().zip(x_rest).zip(y_rest) {
        *lane = join(*lane, term(x, y));
    }
    join_tree(&mut joined, join)
}

/// Calls `f` with each part of `len` elements, the last one shorter, and its index.
pub(crate) fn each_part<T: Send>(loops: Loops, x: &mut [T], len: usize, f: impl Fn(usize, &mut [T]) + Sync + Send) {
    let f = |(i, part): (usize, &mut [T])| {
        point();
        f(i, part);
    };
    if loops.parallel && x.len() > len {
        x.par_chunks_mut(len).enumerate().for_each(f);
    } else {
        x.chunks_mut(len).enumerate().for_each(f);
    }
}

/// Calls `f` with each part of two arrays to write and of one to read, and cuts them by these lengths into equally many.
pub(crate) fn each_parts<T: Send, U: Sync>(
    loops: Loops,
    [x, y]: [(&mut [T], usize); 2],
    (z, z_len): (&[U], usize),
    f: impl Fn([&mut [T]; 2], &[U]) + Sync + Send,
) {
    let ((x, x_len), (y, y_len)) = (x, y);
    if loops.parallel && z.len() > z_len {
        let written = x.par_chunks_mut(x_len).zip(y.par_chunks_mut(y_len));
        written.zip(z.par_chunks(z_len)).for_each(|((x, y), z)| f([x, y], z));
    } else {
        let written = x.chunks_mut(x_len).zip(y.chunks_mut(y_len));
        written.zip(z.chunks(z_len)).for_each(|((x, y), z)| f([x, y], z));
    }
}

/// `x[i] ← f(x[i], [y[i], z[i], …])` for each element of arrays of a length.
pub(crate) fn each<F: Real, const N: usize>(
    loops: Loops,
    x: &mut [F],
    from: [&[F]; N],
    f: impl Fn(F, [F; N]) -> F + Sync + Send,
) {
    each_part(loops, x, STRETCH, |i, x| {
        let from = from.map(|y| &y[i * STRETCH..][..x.len()]);
        loops.isa.run(Each { x, from, f: &f });
    });
}

struct Each<'a, F, T, const N: usize> {
    x: &'a mut [F],
    from: [&'a [F]; N],
    f: &'a T,
}

impl<F: Real, T: Fn(F, [F; N]) -> F, const N: usize> Loop for Each<'_, F, T, N> {
    type Out = ();

    #[inline(always)]
    fn run(self) {
        let Self { x, from, f } = self;
        let n = x.len();
        let from = from.map(|y| &y[..n]);
        for i in 0..n {
            x[i] = f(x[i], std::array::from_fn(|k| from[k][i]));
        }
    }
}

/// Joins `term(x[i], y[i])` over all elements, starting from 0: blocks, lanes and trees of a fixed shape.
#[inline(always)]
fn joined<F: Real>(
    loops: Loops,
    x: &[F],
    y: &[F],
    term: impl Fn(f64, f64) -> f64 + Sync + Send,
    join: impl Fn(f64, f64) -> f64 + Sync + Send,
) -> f64 {
    let n = x.len().min(y.len());
    let block = |i: usize| {
        let range = i * SUM_BLOCK..((i + 1) * SUM_BLOCK).min(n);
        loops.isa.run(Joined { x: &x[range.clone()], y: &y[range], term: &term, join: &join })
    };
    join_leaves(loops, n.div_ceil(SUM_BLOCK), block, &join)
}

/// The terms of a block of two arrays, joined in lanes.
pub(crate) struct Joined<'a, F, T, J> {
    pub(crate) x: &'a [F],
    pub(crate) y: &'a [F],
    pub(crate) term: &'a T,
    pub(crate) join: &'a J,
}

impl<F: Real, T: Fn(f64, f64) -> f64, J: Fn(f64, f64) -> f64> Loop for Joined<'_, F, T, J> {
    type Out = f64;

    #[inline(always)]
    fn run(self) -> f64 {
        let Self { x, y, term, join } = self;
        join_arrays(x, y, 0.0, |x, y| term(x.to_f64(), y.to_f64()), join)
    }
}

/// Sum of squares in f64.
pub(crate) fn sum_of_squares<F: Real>(loops: Loops, x: &[F]) -> f64 {
    dot(loops, x, x)
}

/// [`sum_of_squares`] within a [`Loop`].
#[inline(always)]
pub(crate) fn squares<F: Real>(x: &[F]) -> f64 {
    if x.len() <= SUM_BLOCK {
        return sum_in_lanes(x);
    }
    let block = |i: usize| sum_in_lanes(&x[i * SUM_BLOCK..x.len().min((i + 1) * SUM_BLOCK)]);
    join_leaves_in_order(x.len().div_ceil(SUM_BLOCK), block, |a, b| a + b)
}

/// x·y in f64.
pub(crate) fn dot<F: Real>(loops: Loops, x: &[F], y: &[F]) -> f64 {
    joined(loops, x, y, |x, y| x * y, |a, b| a + b)
}

/// Σ|xᵢ| in f64.
pub(crate) fn sum_abs<F: Real>(loops: Loops, x: &[F]) -> f64 {
    joined(loops, x, x, |x, _| x.abs(), |a, b| a + b)
}

/// max|xᵢ|, NaN where an element is NaN, 0 without elements.
pub(crate) fn largest<F: Real>(loops: Loops, x: &[F]) -> f64 {
    joined(loops, x, x, |x, _| x.abs(), f64::max_nan)
}

/// y ← y + a·x.
pub(crate) fn axpy<F: Real>(loops: Loops, y: &mut [F], a: f64, x: &[F]) {
    let a = F::from_f64(a);
    each(loops, y, [x], |y, [x]| y + a * x);
}

/// out ← x + a·y.
pub(crate) fn sum_scaled<F: Real>(loops: Loops, out: &mut [F], x: &[F], a: f64, y: &[F]) {
    let a = F::from_f64(a);
    each(loops, out, [x, y], |_, [x, y]| x + a * y);
}

/// Writes the transpose of a matrix with so many columns to `out`, in C order.
pub(crate) fn transpose<F: Real>(loops: Loops, x: &[F], columns: usize, out: &mut [F]) {
    let rows = x.len() / columns;
    assert!(out.len() == x.len(), "the transpose fits");
    each_part(loops, out, STRIP * rows, |i, out| turn(&x[i * STRIP..], columns, out, rows, 0));
}

/// Writes the first columns of `x` to the rows of `out`, from element `at` of each on; their rows have so many elements.
fn turn<F: Real>(x: &[F], x_len: usize, out: &mut [F], out_len: usize, at: usize) {
    for (j, x) in x.chunks(STRIP * x_len).enumerate() {
        for (i, out) in out.chunks_exact_mut(out_len).enumerate() {
            for (out, x) in out[at + j * STRIP..].iter_mut().zip(x.chunks(x_len)) {
                *out = x[i];
            }
        }
    }
}

/// A matrix in someone else's memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Matrix<'a, F> {
    data: &'a [F],
    rows: usize,
    columns: usize,
    strides: [usize; 2],
}

impl<'a, F> Matrix<'a, F> {
    /// In C order.
    pub(crate) fn new(data: &'a [F], rows: usize, columns: usize) -> Self {
        assert_eq!(data.len(), rows * columns, "a matrix has rows × columns elements");
        Self { data, rows, columns, strides: [columns, 1] }
    }

    pub(crate) fn transposed(self) -> Self {
        let [row, column] = self.strides;
        Self { rows: self.columns, columns: self.rows, strides: [column, row], ..self }
    }
}

/// `α·a·b + β·c`, without `c` where there is none.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Product<'a, F> {
    pub(crate) alpha: F,
    pub(crate) a: Matrix<'a, F>,
    pub(crate) b: Matrix<'a, F>,
    /// β and c, which is in C order.
    pub(crate) plus: Option<(F, &'a [F])>,
}

impl<F: Real> Product<'_, F> {
    /// Writes it to `out`, in C order.
    pub(crate) fn write(self, loops: Loops, out: &mut [F]) {
        let n = self.b.columns;
        assert!(out.len() == self.a.rows * n, "the product fits");
        each_part(loops, out, (PANEL * n).max(1), |i, out| self.panel(i * PANEL, n, out));
    }

    /// Writes it to `out`, in C order. It is symmetric: what lies above the diagonal is copied from below, and `below`
    /// is used up.
    pub(crate) fn write_symmetric(self, loops: Loops, below: &mut [F], out: &mut [F]) {
        let n = self.b.columns;
        assert!(self.a.rows == n && below.len() == n * n && out.len() == n * n, "the product fits");
        each_part(loops, below, (PANEL * n).max(1), |i, out| self.panel(i * PANEL, n.min((i + 1) * PANEL), out));
        let below = &*below;
        each_part(loops, out, (STRIP * n).max(1), |i, out| {
            let first = i * STRIP;
            turn(&below[first * (n + 1)..], n, out, n, first);
            for (k, out) in out.chunks_exact_mut(n).enumerate() {
                out[..first + k].copy_from_slice(&below[(first + k) * n..][..first + k]);
            }
        });
    }

    /// Computes the first columns of the rows from `first` on, which are `out`'s.
    fn panel(self, first: usize, columns: usize, out: &mut [F]) {
        let Self { alpha, a, b, plus } = self;
        let (m, k, width) = (out.len() / b.columns, a.columns, b.columns);
        let (beta, c) = plus.unwrap_or((F::ZERO, &[]));
        assert!(a.columns == b.rows && first + m <= a.rows && columns <= width, "the matrices fit");
        for (out, c) in out.chunks_exact_mut(width).zip(c.chunks_exact(width).skip(first)) {
            out[..columns].copy_from_slice(&c[..columns]);
        }
        let [a_row, a_column] = a.strides.map(|s| s as isize);
        let [b_row, b_column] = b.strides.map(|s| s as isize);
        // Without columns of `a` there is no first element of its rows.
        let a_first = if k == 0 { a.data } else { &a.data[first * a.strides[0]..] }.as_ptr();
        let (b_first, out) = (b.data.as_ptr(), out.as_mut_ptr());
        // SAFETY: rows first … + m of `a`, the first columns of `b` and of the rows of `out` lie within their slices, by
        // the assertions here and in `Matrix::new`; `out` overlaps neither, being borrowed mutably; the pointers are
        // cast to the type that F is.
        unsafe {
            match F::DTYPE {
                Dtype::F64 => matrixmultiply::dgemm(
                    m,
                    k,
                    columns,
                    alpha.to_f64(),
                    a_first.cast(),
                    a_row,
                    a_column,
                    b_first.cast(),
                    b_row,
                    b_column,
                    beta.to_f64(),
                    out.cast(),
                    width as isize,
                    1,
                ),
                _ => matrixmultiply::sgemm(
                    m,
                    k,
                    columns,
                    alpha.to_f64() as f32,
                    a_first.cast(),
                    a_row,
                    a_column,
                    b_first.cast(),
                    b_row,
                    b_column,
                    beta.to_f64() as f32,
                    out.cast(),
                    width as isize,
                    1,
                ),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;
    use proptest::prelude::*;

    const SERIAL: Loops = Loops { isa: Isa::Baseline, parallel: false };

    proptest! {
        #[test]
        fn products_are_those_of_the_textbook(m in 0usize..150, k in 0usize..20, n in 0usize..20, turned: bool) {
            let a: Vec<f64> = (0..m * k).map(|i| (i * 7 % 13) as f64 - 6.0).collect();
            let b: Vec<f64> = (0..k * n).map(|i| (i * 5 % 11) as f64 - 5.0).collect();
            let c: Vec<f64> = (0..m * n).map(|i| (i * 3 % 7) as f64).collect();
            let at = |i: usize, j: usize| if turned { a[j * m + i] } else { a[i * k + j] };
            let left = if turned { Matrix::new(&a, k, m).transposed() } else { Matrix::new(&a, m, k) };
            let mut out = vec![2.0; m * n];
            Product { alpha: 3.0, a: left, b: Matrix::new(&b, k, n), plus: Some((0.5, &c)) }.write(SERIAL, &mut out);
            for i in 0..m {
                for j in 0..n {
                    let want: f64 = (0..k).map(|l| at(i, l) * b[l * n + j]).sum();
                    prop_assert_eq!(out[i * n + j], 3.0 * want + 0.5 * c[i * n + j]);
                }
            }
        }

        #[test]
        fn symmetric_products_are_whole(n in 0usize..300, k in 0usize..9) {
            let x: Vec<f64> = (0..n * k).map(|i| (i * 7 % 13) as f64 - 6.0).collect();
            let x = Matrix::new(&x, n, k);
            let product = Product { alpha: 1.0, a: x, b: x.transposed(), plus: None };
            let (mut want, mut below, mut out) = (vec![1.0; n * n], vec![2.0; n * n], vec![3.0; n * n]);
            product.write(SERIAL, &mut want);
            product.write_symmetric(SERIAL, &mut below, &mut out);
            prop_assert_eq!(out, want);
        }

        #[test]
        fn transposing(rows in 1usize..70, columns in 1usize..70) {
            let x: Vec<f64> = (0..rows * columns).map(|i| i as f64).collect();
            let want: Vec<f64> = (0..rows * columns).map(|i| x[(i % rows) * columns + i / rows]).collect();
            let mut out = vec![0.5; x.len()];
            transpose(SERIAL, &x, columns, &mut out);
            prop_assert_eq!(out, want);
        }

        #[test]
        fn leaves_are_joined_as_a_list_is(n in 0usize..200) {
            let leaf = |i: usize| 1.0 / (i as f64 + 0.3);
            let want = tree(&mut (0..n).map(leaf).collect::<Vec<_>>()).to_bits();
            for parallel in [false, true] {
                let loops = Loops { parallel, ..SERIAL };
                prop_assert_eq!(join_leaves(loops, n, leaf, |a, b| a + b).to_bits(), want);
            }
        }

        #[test]
        fn trees_of_columns(rows in 1usize..40, columns in 1usize..5) {
            let mut x: Vec<f64> = (0..rows * columns).map(|i| 1.0 / (i + 1) as f64).collect();
            let column = |k: usize| x.iter().skip(k).step_by(columns).copied().collect::<Vec<_>>();
            let want: Vec<f64> = (0..columns).map(|k| tree(&mut column(k))).collect();
            prop_assert_eq!(tree_of_columns(&mut x, columns), want);
        }

        #[test]
        fn squares_have_the_bits_of_sixteen_lanes(n in 0usize..600) {
            let x: Vec<f32> = (0..n).map(|i| 1.0 / (i as f32 - 7.5)).collect();
            let want = join_lanes(n, 0.0, |i| f64::from(x[i] * 0.3) * f64::from(x[i] * 0.3), |a, b| a + b);
            prop_assert_eq!(squares_of(&x, &x, &mut [0.0; SQUARES_BLOCK], |x, _| x * 0.3).to_bits(), want.to_bits());
        }

        #[test]
        fn every_term_is_added_once(n in 0usize..10_000) {
            let ones = vec![1.0f32; n];
            prop_assert_eq!(sum_of_squares(SERIAL, &ones), n as f64);
            prop_assert_eq!(squares(&ones), n as f64);
        }
    }
}
