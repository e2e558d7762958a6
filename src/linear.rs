//! Sums and matrix products of whole tensors, on the CPU.
//!
//! Sums have a fixed shape: blocks of 4096 elements in C order, each summed in f64 in 16 fixed lanes and a
//! fixed tree, then a fixed tree over the blocks. Matrix products are cut into fixed panels of rows. So
//! the bits depend neither on threads nor on the instruction sets of this crate; those of a matrix product
//! depend on the kernel that the `matrixmultiply` crate picks for the machine.

use rayon::prelude::*;

use crate::real::{Dtype, Real};

/// Elements of a block of a sum.
pub(crate) const SUM_BLOCK: usize = 4096;
const LANES: usize = 16;
/// Rows of a panel of a product.
const PANEL: usize = 64;

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

/// Sum of `term(i)` over `0..n` in f64: lane k adds the terms k, k + 16, …
#[inline(always)]
pub(crate) fn lanes(n: usize, term: impl FnMut(usize) -> f64) -> f64 {
    join_lanes(n, 0.0, term, |a, b| a + b)
}

/// Joins `term(i)` over `0..n` in the lanes of [`lanes`], each from `neutral` on.
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
    let (whole, rest) = x.as_chunks::<LANES>();
    for chunk in whole {
        for (lane, &x) in joined.iter_mut().zip(chunk) {
            *lane = join(*lane, term(x));
        }
    }
    for (lane, &x) in joined.iter_mut().zip(rest) {
        *lane = join(*lane, term(x));
    }
    join_tree(&mut joined, join)
}

/// `f(0), f(1), …, f(n − 1)`, on the current pool if `parallel`.
pub(crate) fn map<T: Send>(parallel: bool, n: usize, f: impl Fn(usize) -> T + Sync + Send) -> Vec<T> {
    if parallel { (0..n).into_par_iter().map(f).collect() } else { (0..n).map(f).collect() }
}

/// Calls `f` with each row of `columns` elements and its index, on the current pool if `parallel`.
pub(crate) fn each_row<F: Real>(
    parallel: bool,
    x: &mut [F],
    columns: usize,
    f: impl Fn(usize, &mut [F]) + Sync + Send,
) {
    if parallel {
        x.par_chunks_mut(columns).enumerate().for_each(|(i, row)| f(i, row));
    } else {
        x.chunks_mut(columns).enumerate().for_each(|(i, row)| f(i, row));
    }
}

/// Joins `term(x[i], y[i])` over all elements, starting from 0: blocks, lanes and trees of a fixed shape.
#[inline(always)]
fn joined<F: Real>(
    parallel: bool,
    x: &[F],
    y: &[F],
    term: impl Fn(f64, f64) -> f64 + Sync + Send,
    join: impl Fn(f64, f64) -> f64 + Sync + Send,
) -> f64 {
    let n = x.len().min(y.len());
    let block = |i: usize| {
        let range = i * SUM_BLOCK..((i + 1) * SUM_BLOCK).min(n);
        let (x, y) = (&x[range.clone()], &y[range]);
        join_lanes(x.len(), 0.0, |k| term(x[k].to_f64(), y[k].to_f64()), &join)
    };
    join_tree(&mut map(parallel, n.div_ceil(SUM_BLOCK), block), &join)
}

/// Sum of squares in f64.
pub(crate) fn sum_of_squares<F: Real>(parallel: bool, x: &[F]) -> f64 {
    dot(parallel, x, x)
}

/// x·y in f64.
pub(crate) fn dot<F: Real>(parallel: bool, x: &[F], y: &[F]) -> f64 {
    joined(parallel, x, y, |x, y| x * y, |a, b| a + b)
}

/// Σ|xᵢ| in f64.
pub(crate) fn sum_abs<F: Real>(parallel: bool, x: &[F]) -> f64 {
    joined(parallel, x, x, |x, _| x.abs(), |a, b| a + b)
}

/// max|xᵢ|, NaN where an element is NaN, 0 without elements.
pub(crate) fn largest<F: Real>(parallel: bool, x: &[F]) -> f64 {
    joined(parallel, x, x, |x, _| x.abs(), f64::max_nan)
}

/// y ← y + a·x.
pub(crate) fn axpy<F: Real>(parallel: bool, y: &mut [F], a: f64, x: &[F]) {
    let a = F::from_f64(a);
    each_row(parallel, y, SUM_BLOCK, |i, y| {
        for (y, &x) in y.iter_mut().zip(&x[i * SUM_BLOCK..]) {
            *y = *y + a * x;
        }
    });
}

/// out ← x + a·y.
pub(crate) fn sum_scaled<F: Real>(parallel: bool, out: &mut [F], x: &[F], a: f64, y: &[F]) {
    let a = F::from_f64(a);
    each_row(parallel, out, SUM_BLOCK, |i, out| {
        let start = i * SUM_BLOCK;
        for ((out, &x), &y) in out.iter_mut().zip(&x[start..]).zip(&y[start..]) {
            *out = x + a * y;
        }
    });
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

/// `out ← α·a·b + β·out`, `out` in C order.
pub(crate) fn product<F: Real>(parallel: bool, alpha: F, a: Matrix<'_, F>, b: Matrix<'_, F>, beta: F, out: &mut [F]) {
    assert!(a.columns == b.rows && out.len() == a.rows * b.columns, "the matrices fit");
    if out.is_empty() {
        return;
    }
    each_row(parallel, out, PANEL * b.columns, |panel, out| {
        let rows = out.len() / b.columns;
        let (m, k, n) = (rows, a.columns, b.columns);
        let [a_row, a_column] = a.strides.map(|s| s as isize);
        let [b_row, b_column] = b.strides.map(|s| s as isize);
        // Without columns of `a` there is no first element of the panel's rows.
        let a_first = if k == 0 { a.data } else { &a.data[panel * PANEL * a.strides[0]..] }.as_ptr();
        let (b_first, out) = (b.data.as_ptr(), out.as_mut_ptr());
        // SAFETY: rows panel·PANEL … + m of `a`, all of `b` and of the panel lie within their slices, by the
        // assertions here and in `Matrix::new`; the panel overlaps neither, being borrowed mutably; the
        // pointers are cast to the type that F is.
        unsafe {
            match F::DTYPE {
                Dtype::F64 => matrixmultiply::dgemm(
                    m,
                    k,
                    n,
                    alpha.to_f64(),
                    a_first.cast(),
                    a_row,
                    a_column,
                    b_first.cast(),
                    b_row,
                    b_column,
                    beta.to_f64(),
                    out.cast(),
                    n as isize,
                    1,
                ),
                _ => matrixmultiply::sgemm(
                    m,
                    k,
                    n,
                    alpha.to_f64() as f32,
                    a_first.cast(),
                    a_row,
                    a_column,
                    b_first.cast(),
                    b_row,
                    b_column,
                    beta.to_f64() as f32,
                    out.cast(),
                    n as isize,
                    1,
                ),
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn products_are_those_of_the_textbook(m in 0usize..150, k in 0usize..20, n in 0usize..20, turned: bool) {
            let a: Vec<f64> = (0..m * k).map(|i| (i * 7 % 13) as f64 - 6.0).collect();
            let b: Vec<f64> = (0..k * n).map(|i| (i * 5 % 11) as f64 - 5.0).collect();
            let at = |i: usize, j: usize| if turned { a[j * m + i] } else { a[i * k + j] };
            let left = if turned { Matrix::new(&a, k, m).transposed() } else { Matrix::new(&a, m, k) };
            let mut out = vec![2.0; m * n];
            product(false, 3.0, left, Matrix::new(&b, k, n), 0.5, &mut out);
            for i in 0..m {
                for j in 0..n {
                    let want: f64 = (0..k).map(|l| at(i, l) * b[l * n + j]).sum();
                    prop_assert_eq!(out[i * n + j], 3.0 * want + 1.0);
                }
            }
        }

        #[test]
        fn every_term_is_added_once(n in 0usize..10_000) {
            let ones = vec![1.0f32; n];
            prop_assert_eq!(sum_of_squares(false, &ones), n as f64);
        }
    }
}
