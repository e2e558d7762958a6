//! Norms whose bits do not depend on threads, chunks or instruction sets.
//!
//! Sums have the shape of [`crate::linear`]'s, in f64. Squares of finite f32 numbers cannot overflow there; for
//! f64 arrays whose squares do, the sum is taken again over scaled values.

use super::memory::{BLOCK, load};
use super::pool::Threads;
use crate::linear::{SUM_BLOCK, join_lanes, join_tree, map, tree};
use crate::real::{Dtype, Element, Real, StorageVisitor, with_storage};
use crate::tensor::{RawTensor, TensorRef};

/// An array to take a norm of.
#[derive(Debug, Clone)]
pub struct Summand<'a> {
    /// The numbers.
    pub tensor: TensorRef<'a>,
    /// Whether two of them are a complex one, whose magnitude counts.
    pub is_complex: bool,
}

impl<'a> From<TensorRef<'a>> for Summand<'a> {
    fn from(tensor: TensorRef<'a>) -> Self {
        Self { tensor, is_complex: false }
    }
}

/// Joins the terms of magnitudes, from `neutral` on.
#[derive(Clone, Copy)]
struct Fold<T, J> {
    neutral: f64,
    term: T,
    join: J,
}

struct Block<'a, T, J> {
    x: &'a RawTensor,
    pairs: bool,
    start: usize,
    len: usize,
    fold: &'a Fold<T, J>,
}

impl<T: Fn(f64) -> f64, J: Fn(f64, f64) -> f64> StorageVisitor for Block<'_, T, J> {
    type Out = f64;

    fn visit<E: Element<F>, G: Element<F>, F: Real>(self) -> f64 {
        let mut buffer = [F::ZERO; SUM_BLOCK];
        for (i, part) in buffer[..self.len].chunks_mut(BLOCK).enumerate() {
            // SAFETY: the caller keeps the range within the tensor, whose type E is.
            unsafe { load::<E, F>(self.x, self.start + i * BLOCK, part) };
        }
        let Fold { neutral, term, join } = self.fold;
        if self.pairs {
            let modulus = |i: usize| libm::hypot(buffer[2 * i].to_f64(), buffer[2 * i + 1].to_f64());
            join_lanes(self.len / 2, *neutral, |i| term(modulus(i)), join)
        } else {
            join_lanes(self.len, *neutral, |i| term(buffer[i].to_f64().abs()), join)
        }
    }
}

impl<T: Fn(f64) -> f64 + Sync, J: Fn(f64, f64) -> f64 + Sync> Fold<T, J> {
    fn one(&self, x: &RawTensor, pairs: bool, threads: &mut Threads) -> f64 {
        let blocks = x.len.div_ceil(SUM_BLOCK);
        let of_block = |i: usize| {
            let (start, len) = (i * SUM_BLOCK, SUM_BLOCK.min(x.len - i * SUM_BLOCK));
            with_storage(x.dtype, x.dtype, Block { x, pairs, start, len, fold: self })
        };
        let mut joined: Vec<f64> = match threads.pool(x.len >= super::INLINE_ELEMENTS) {
            Some(pool) => pool.install(|| map(true, blocks, of_block)),
            None => map(false, blocks, of_block),
        };
        if joined.is_empty() { self.neutral } else { join_tree(&mut joined, &self.join) }
    }

    fn all(&self, of: &[Summand<'_>], threads: &mut Threads) -> f64 {
        let mut joined: Vec<f64> = of.iter().map(|x| self.one(&x.tensor.raw, x.is_complex, threads)).collect();
        if joined.is_empty() { self.neutral } else { join_tree(&mut joined, &self.join) }
    }
}

/// The largest magnitude of all; NaN where a number is NaN, 0 without numbers.
pub fn largest(of: &[Summand<'_>], threads: &mut Threads) -> f64 {
    Fold { neutral: 0.0, term: |x| x, join: f64::max_nan }.all(of, threads)
}

/// The smallest magnitude of all; NaN where a number is NaN, infinity without numbers.
fn smallest(of: &[Summand<'_>], threads: &mut Threads) -> f64 {
    -Fold { neutral: f64::NEG_INFINITY, term: |x: f64| -x, join: f64::max_nan }.all(of, threads)
}

/// The first array with a number that is not finite, and the magnitude of such a number: infinity or NaN.
pub fn first_nonfinite(of: &[Summand<'_>], threads: &mut Threads) -> Option<(usize, f64)> {
    // Parts of complex numbers by themselves: the magnitude of finite ones may be too large.
    let most = |x: &Summand<'_>, threads: &mut Threads| {
        Fold { neutral: 0.0, term: |x| x, join: f64::max_nan }.one(&x.tensor.raw, false, threads)
    };
    let magnitudes = of.iter().map(|x| most(x, threads)).enumerate();
    magnitudes.into_iter().find(|(_, most)| !most.is_finite())
}

/// The 2-norm of all numbers, of complex ones and reals alike.
///
/// NaN where one is NaN, infinity where one is infinite. Finite numbers give a finite norm wherever it is
/// representable.
pub fn norm(of: &[Summand<'_>], threads: &mut Threads) -> f64 {
    norm_within(of, f64::INFINITY, threads)
}

/// [`norm`], of numbers that are brought into `[-bound, bound]` first; the bound is rounded to the type that a step
/// computes in.
pub fn norm_within(of: &[Summand<'_>], bound: f64, threads: &mut Threads) -> f64 {
    let bound_of = |dtype: Dtype| if dtype == Dtype::F64 { bound } else { f64::from(bound as f32) };
    let total = |scale: f64, threads: &mut Threads| {
        let one = |x: &Summand<'_>| {
            let bound = bound_of(x.tensor.raw.dtype);
            let square = move |x: f64| {
                let x = if x > bound { bound } else { x } * scale;
                x * x
            };
            // The parts of complex numbers are summed as reals.
            Fold { neutral: 0.0, term: square, join: |a, b| a + b }.one(&x.tensor.raw, false, threads)
        };
        tree(&mut of.iter().map(one).collect::<Vec<f64>>())
    };
    let plain = total(1.0, threads);
    let trustworthy = (1e-280..=1e300).contains(&plain);
    let is_wide = |x: &&Summand<'_>| x.tensor.raw.dtype == Dtype::F64;
    if trustworthy || plain.is_nan() || !of.iter().any(|x| is_wide(&x)) {
        return libm::sqrt(plain);
    }
    let reals: Vec<_> = of.iter().filter(is_wide).map(|x| Summand::from(x.tensor.clone())).collect();
    let peak = largest(&reals, threads);
    let peak = if peak > bound { bound } else { peak };
    if peak == 0.0 || peak.is_infinite() {
        return libm::sqrt(plain);
    }
    // A power of two, so that the scaling is exact; two factors where one would be infinite.
    let exponent = libm::ilogb(peak).clamp(-1000, 1000);
    libm::ldexp(libm::sqrt(total(libm::ldexp(1.0, -exponent), threads)), exponent)
}

/// The p-norm of all numbers, `(Σ|x|^p)^(1/p)`: for p = ∞ the largest magnitude, for −∞ the smallest, for 0 how many
/// are not zero.
pub fn p_norm(of: &[Summand<'_>], p: f64, threads: &mut Threads) -> f64 {
    let is_zero = |x: f64| x == 0.0 || x.is_nan();
    match p {
        2.0 => norm(of, threads),
        f64::INFINITY => largest(of, threads),
        f64::NEG_INFINITY if of.iter().all(|x| x.tensor.raw.len == 0) => 0.0,
        f64::NEG_INFINITY => smallest(of, threads),
        0.0 => {
            let counted = |x: f64| if x.is_nan() { x } else { f64::from(u8::from(x != 0.0)) };
            Fold { neutral: 0.0, term: counted, join: |a, b| a + b }.all(of, threads)
        }
        _ => {
            // Scaled by the term that dominates, so that powers neither overflow nor vanish.
            let scale = if p > 0.0 { largest(of, threads) } else { smallest(of, threads) };
            if is_zero(scale) || scale.is_infinite() {
                return if p < 0.0 && of.iter().all(|x| x.tensor.raw.len == 0) { 0.0 } else { scale };
            }
            let term = move |x: f64| libm::pow(x / scale, p);
            scale * libm::pow(Fold { neutral: 0.0, term, join: |a, b| a + b }.all(of, threads), 1.0 / p)
        }
    }
}

/// What gradients of this norm are multiplied by so that it is at most `max_norm`, as torch has it; NaN where the
/// norm is NaN. An infinite bound clips nothing.
pub fn clip_factor(max_norm: f64, norm: f64) -> f64 {
    if max_norm == f64::INFINITY && !norm.is_nan() {
        return 1.0;
    }
    let factor = max_norm / (norm + 1e-6);
    if factor > 1.0 { 1.0 } else { factor }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one() -> Threads {
        Threads::new(Some(1))
    }

    fn of<F: Real>(x: &[F]) -> Summand<'_> {
        TensorRef::from(x).into()
    }

    #[test]
    fn extremes() {
        let norm = |x: &[f64]| norm(&[of(x)], &mut one());
        assert_eq!(norm(&[3.0, 4.0]), 5.0);
        assert!((norm(&[3e200, 4e200]) / 5e200 - 1.0).abs() < 1e-15);
        assert!((norm(&[3e-200, 4e-200]) / 5e-200 - 1.0).abs() < 1e-15);
        assert_eq!(norm(&[]), 0.0);
        assert_eq!(norm(&[0.0]), 0.0);
        assert!(norm(&[f64::NAN, 1.0]).is_nan());
        assert!(largest(&[of(&[1.0f64]), of(&[f64::NAN])], &mut one()).is_nan());
        assert_eq!(largest(&[of(&[1.0f32, -3.0]), of(&[2.0f64])], &mut one()), 3.0);
        assert_eq!(norm(&[f64::INFINITY, 1.0]), f64::INFINITY);
        assert!(super::norm(&[of(&[1e19f32; 128])], &mut one()).is_finite());
    }

    #[test]
    fn other_norms() {
        let p_norm = |x: &[f64], p: f64| p_norm(&[of(x)], p, &mut one());
        let x = [3.0, 0.0, -4.0, 1.0];
        assert_eq!(p_norm(&x, 1.0), 8.0);
        assert_eq!(p_norm(&x, 0.0), 3.0);
        assert!((p_norm(&x, 3.0) - 92f64.cbrt()).abs() < 1e-14);
        assert!((p_norm(&x, 0.5) - (3f64.sqrt() + 3.0).powi(2)).abs() < 1e-13);
        assert_eq!((p_norm(&x, f64::INFINITY), p_norm(&x, f64::NEG_INFINITY), p_norm(&x, -1.0)), (4.0, 0.0, 0.0));
        assert!((p_norm(&[2.0, -4.0], -1.0) - 4.0 / 3.0).abs() < 1e-15);
        assert!((p_norm(&[1e300, 1e300], 3.0) / 2f64.cbrt() / 1e300 - 1.0).abs() < 1e-14);
        for p in [0.0, 1.0, 3.0, -1.0, f64::INFINITY, f64::NEG_INFINITY] {
            assert_eq!(p_norm(&[], p), 0.0, "{p}");
            assert!(p_norm(&[1.0, f64::NAN, 2.0], p).is_nan(), "{p}");
        }
        assert_eq!(p_norm(&[1.0, f64::INFINITY], 3.0), f64::INFINITY);
        assert_eq!(p_norm(&[1.0, f64::INFINITY], -1.0), 1.0);
        let complex = Summand { is_complex: true, ..of(&[3.0, 4.0, 0.0, 1.0]) };
        assert_eq!(super::p_norm(std::slice::from_ref(&complex), 1.0, &mut one()), 6.0);
        assert_eq!(super::p_norm(&[complex], f64::INFINITY, &mut one()), 5.0);
    }

    #[test]
    fn bounds_and_what_is_not_finite() {
        assert_eq!(norm_within(&[of(&[30.0f64, -40.0])], 1.0, &mut one()), 2f64.sqrt());
        assert_eq!(norm_within(&[of(&[f64::INFINITY, 0.0])], 3.0, &mut one()), 3.0);
        assert!((norm_within(&[of(&[1e200f64, 1.0])], 1e199, &mut one()) / 1e199 - 1.0).abs() < 1e-15);
        let (fine, bad) = ([1.0f32, 2.0], [0.0f32, f32::NEG_INFINITY]);
        assert_eq!(first_nonfinite(&[of(&fine), of(&bad)], &mut one()), Some((1, f64::INFINITY)));
        assert_eq!(first_nonfinite(&[of(&fine), of(&[f64::MAX; 3])], &mut one()), None);
        assert_eq!((clip_factor(1.0, 0.5), clip_factor(f64::INFINITY, f64::INFINITY)), (1.0, 1.0));
        assert_eq!((clip_factor(1.0, f64::INFINITY), clip_factor(2.0, 4.0)), (0.0, 2.0 / (4.0 + 1e-6)));
        assert!(clip_factor(f64::INFINITY, f64::NAN).is_nan() && clip_factor(1.0, f64::NAN).is_nan());
    }

    #[test]
    fn same_bits_for_any_thread_count() {
        let x: Vec<f32> = (0..300_001u64).map(|i| ((i * 7919) % 1000) as f32 * 1e-3 - 0.37).collect();
        for p in [2.0, 1.0, 3.0, f64::INFINITY] {
            let bits = |n| p_norm(&[of(&x)], p, &mut Threads::new(Some(n))).to_bits();
            let one = bits(1);
            assert!([2, 3, 7].into_iter().all(|n| bits(n) == one));
        }
    }
}
