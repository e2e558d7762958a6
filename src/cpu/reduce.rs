//! Norms whose bits do not depend on threads, chunks or instruction sets.
//!
//! Sums have the shape of [`crate::linear`]'s, in f64. Squares of finite f32 numbers cannot overflow there; for
//! f64 arrays whose squares do, the sum is taken again over scaled values.

use std::sync::atomic::{AtomicU64, Ordering};

use super::memory::{BLOCK, load, whole};
use super::pool::Threads;
use crate::error::Result;
use crate::isa::{Isa, Loop};
use crate::linear::{SUM_BLOCK, join_array, join_lanes, join_tree};
use crate::real::{Dtype, Element, Real, StorageVisitor, with_storage};
use crate::room;
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

/// Arrays to take a norm of, by their numbers, and whether two numbers of one are a complex one.
pub trait Summands: Sync {
    /// How many arrays.
    fn count(&self) -> usize;
    /// One of them.
    fn get(&self, i: usize) -> (&RawTensor, bool);
}

impl Summands for [Summand<'_>] {
    fn count(&self) -> usize {
        self.len()
    }

    fn get(&self, i: usize) -> (&RawTensor, bool) {
        (&self[i].tensor.raw, self[i].is_complex)
    }
}

/// The float64 arrays among others, of real numbers; the others are empty.
struct Wide<'a, S: ?Sized>(&'a S);

impl<S: Summands + ?Sized> Summands for Wide<'_, S> {
    fn count(&self) -> usize {
        self.0.count()
    }

    fn get(&self, i: usize) -> (&RawTensor, bool) {
        static EMPTY: RawTensor = RawTensor { ptr: std::ptr::null_mut(), len: 0, dtype: Dtype::F64, strides: None };
        let (x, _) = self.0.get(i);
        (if x.dtype == Dtype::F64 { x } else { &EMPTY }, false)
    }
}

/// What blocks and arrays join to, kept from call to call for its memory.
#[derive(Debug, Default)]
pub struct Joined {
    /// By array: its first block.
    first: Vec<usize>,
    /// By block, as threads find it: the bits of a float64.
    found: Vec<AtomicU64>,
    blocks: Vec<f64>,
    arrays: Vec<f64>,
}

impl Joined {
    /// Room for so many.
    fn reserve(&mut self, arrays: usize, blocks: usize) -> Result<()> {
        const WHAT: &str = "the sums of a norm";
        let Self { first, found, blocks: of_blocks, arrays: of_arrays } = self;
        first.clear();
        found.clear();
        of_blocks.clear();
        of_arrays.clear();
        room::reserve(first, arrays, WHAT)?;
        room::reserve(found, blocks, WHAT)?;
        room::reserve(of_blocks, blocks, WHAT)?;
        room::reserve(of_arrays, arrays, WHAT)
    }
}

/// Joins the terms of magnitudes, from `neutral` on. A term may depend on the type that a step computes in.
#[derive(Clone, Copy)]
struct Fold<T, J> {
    /// Whether complex numbers count as two reals, not by their magnitude.
    by_parts: bool,
    neutral: f64,
    term: T,
    join: J,
}

/// The sum of terms.
fn sum<T>(term: T) -> Fold<T, impl Fn(f64, f64) -> f64 + Sync> {
    Fold { by_parts: false, neutral: 0.0, term, join: |a, b| a + b }
}

/// The largest term, at least `neutral`; NaN where one is NaN.
fn maximum<T>(neutral: f64, term: T) -> Fold<T, impl Fn(f64, f64) -> f64 + Sync> {
    Fold { by_parts: false, neutral, term, join: f64::max_nan }
}

/// Part of an array, at most [`SUM_BLOCK`] numbers.
struct Block<'a, T, J> {
    isa: Isa,
    x: &'a RawTensor,
    pairs: bool,
    start: usize,
    len: usize,
    fold: &'a Fold<T, J>,
}

impl<T: Fn(Dtype, f64) -> f64, J: Fn(f64, f64) -> f64> StorageVisitor for Block<'_, T, J> {
    type Out = f64;

    fn visit<E: Element<F>, G: Element<F>, F: Real>(self) -> f64 {
        let Self { isa, x, pairs, start, len, fold } = self;
        if E::IS_COMPUTE_TYPE && x.strides.is_none() {
            // SAFETY: the caller keeps the range within the tensor, whose type E is.
            let x = unsafe { whole::<F>(x.ptr, start, len) };
            return isa.run(Joining { x, pairs, fold });
        }
        let mut buffer = [F::ZERO; SUM_BLOCK];
        for (i, part) in buffer[..len].chunks_mut(BLOCK).enumerate() {
            // SAFETY: as above.
            unsafe { load::<E, F>(x, start + i * BLOCK, part) };
        }
        isa.run(Joining { x: &buffer[..len], pairs, fold })
    }
}

/// The terms of a block, joined in lanes.
struct Joining<'a, F, T, J> {
    x: &'a [F],
    pairs: bool,
    fold: &'a Fold<T, J>,
}

impl<F: Real, T: Fn(Dtype, f64) -> f64, J: Fn(f64, f64) -> f64> Loop for Joining<'_, F, T, J> {
    type Out = f64;

    #[inline(always)]
    fn run(self) -> f64 {
        let Self { x, pairs, fold: Fold { neutral, term, join, .. } } = self;
        if pairs {
            let modulus = |i: usize| libm::hypot(x[2 * i].to_f64(), x[2 * i + 1].to_f64());
            join_lanes(x.len() / 2, *neutral, |i| term(F::DTYPE, modulus(i)), join)
        } else {
            join_array(x, *neutral, |x| term(F::DTYPE, x.to_f64().abs()), join)
        }
    }
}

impl<T: Fn(Dtype, f64) -> f64 + Sync, J: Fn(f64, f64) -> f64 + Sync> Fold<T, J> {
    /// What the blocks of each array join to.
    fn each<'j>(
        &self,
        of: &(impl Summands + ?Sized),
        threads: &mut Threads,
        joined: &'j mut Joined,
    ) -> Result<&'j mut [f64]> {
        const BLOCKS_PER_TASK: usize = 8;
        let isa = Isa::detect();
        let lengths = || (0..of.count()).map(|i| of.get(i).0.len);
        let (elements, total) = lengths().fold((0, 0), |(n, blocks), len| (n + len, blocks + len.div_ceil(SUM_BLOCK)));
        joined.reserve(of.count(), total)?;
        let Joined { first, found, blocks, arrays } = joined;
        first.extend(lengths().scan(0, |sum, len| Some(std::mem::replace(sum, *sum + len.div_ceil(SUM_BLOCK)))));
        found.resize_with(total, AtomicU64::default);
        let of_block = |array: usize, block: usize| {
            let (x, is_complex) = of.get(array);
            let start = (block - first[array]) * SUM_BLOCK;
            let pairs = is_complex && !self.by_parts;
            let block = Block { isa, x, pairs, start, len: SUM_BLOCK.min(x.len - start), fold: self };
            with_storage(x.dtype, x.dtype, block)
        };
        let task = |i: usize| {
            let blocks = i * BLOCKS_PER_TASK..total.min((i + 1) * BLOCKS_PER_TASK);
            let mut array = first.partition_point(|&first| first <= blocks.start) - 1;
            for block in blocks {
                while first.get(array + 1).is_some_and(|&next| next <= block) {
                    array += 1;
                }
                found[block].store(of_block(array, block).to_bits(), Ordering::Relaxed);
            }
        };
        let tasks = total.div_ceil(BLOCKS_PER_TASK);
        if elements < super::INLINE_ELEMENTS {
            (0..tasks).for_each(task)
        } else {
            threads.spread(tasks, task)
        }
        blocks.extend(found.iter_mut().map(|bits| f64::from_bits(*bits.get_mut())));
        let ends = first.iter().skip(1).copied().chain([total]);
        let ranges = first.iter().zip(ends).map(|(&start, end)| start..end);
        arrays.extend(ranges.map(|r| if r.is_empty() { self.neutral } else { join_tree(&mut blocks[r], &self.join) }));
        Ok(arrays)
    }

    fn all(&self, of: &(impl Summands + ?Sized), threads: &mut Threads, joined: &mut Joined) -> Result<f64> {
        let arrays = self.each(of, threads, joined)?;
        Ok(if arrays.is_empty() { self.neutral } else { join_tree(arrays, &self.join) })
    }
}

/// The largest magnitude of all; NaN where a number is NaN, 0 without numbers.
fn largest(of: &(impl Summands + ?Sized), threads: &mut Threads, joined: &mut Joined) -> Result<f64> {
    maximum(0.0, |_, x| x).all(of, threads, joined)
}

/// The smallest magnitude of all; NaN where a number is NaN, infinity without numbers.
fn smallest(of: &(impl Summands + ?Sized), threads: &mut Threads, joined: &mut Joined) -> Result<f64> {
    Ok(-maximum(f64::NEG_INFINITY, |_, x: f64| -x).all(of, threads, joined)?)
}

/// The first array with a number that is not finite, and the magnitude of such a number: infinity or NaN.
pub fn first_nonfinite(
    of: &(impl Summands + ?Sized),
    threads: &mut Threads,
    joined: &mut Joined,
) -> Result<Option<(usize, f64)>> {
    // The magnitude of a complex number with finite parts may be too large.
    let most = Fold { by_parts: true, ..maximum(0.0, |_, x| x) }.each(of, threads, joined)?;
    Ok(most.iter().copied().enumerate().find(|(_, most)| !most.is_finite()))
}

/// The 2-norm of all numbers, of complex ones and reals alike.
///
/// NaN where one is NaN, infinity where one is infinite. Finite numbers give a finite norm wherever it is
/// representable.
pub fn norm(of: &[Summand<'_>], threads: &mut Threads) -> Result<f64> {
    norm_within(of, f64::INFINITY, threads, &mut Joined::default())
}

/// [`norm`], of numbers that are brought into `[-bound, bound]` first; the bound is rounded to the type that a step
/// computes in.
pub fn norm_within(
    of: &(impl Summands + ?Sized),
    bound: f64,
    threads: &mut Threads,
    joined: &mut Joined,
) -> Result<f64> {
    let bound_of = |dtype: Dtype| if dtype == Dtype::F64 { bound } else { f64::from(bound as f32) };
    let total = |scale: f64, threads: &mut Threads, joined: &mut Joined| {
        let square = |dtype: Dtype, x: f64| {
            let bound = bound_of(dtype);
            let x = if x > bound { bound } else { x } * scale;
            x * x
        };
        Fold { by_parts: true, ..sum(square) }.all(of, threads, joined)
    };
    let plain = total(1.0, threads, joined)?;
    let trustworthy = (1e-280..=1e300).contains(&plain);
    if trustworthy || plain.is_nan() || (0..of.count()).all(|i| of.get(i).0.dtype != Dtype::F64) {
        return Ok(libm::sqrt(plain));
    }
    let peak = largest(&Wide(of), threads, joined)?;
    let peak = if peak > bound { bound } else { peak };
    if peak == 0.0 || peak.is_infinite() {
        return Ok(libm::sqrt(plain));
    }
    // A power of two, so that the scaling is exact; two factors where one would be infinite.
    let exponent = libm::ilogb(peak).clamp(-1000, 1000);
    Ok(libm::ldexp(libm::sqrt(total(libm::ldexp(1.0, -exponent), threads, joined)?), exponent))
}

/// The p-norm of all numbers, `(Σ|x|^p)^(1/p)`: for p = ∞ the largest magnitude, for −∞ the smallest, for 0 how many
/// are not zero.
pub fn p_norm(of: &[Summand<'_>], p: f64, threads: &mut Threads) -> Result<f64> {
    let joined = &mut Joined::default();
    let is_zero = |x: f64| x == 0.0 || x.is_nan();
    let is_empty = || of.iter().all(|x| x.tensor.raw.len == 0);
    match p {
        2.0 => norm(of, threads),
        f64::INFINITY => largest(of, threads, joined),
        f64::NEG_INFINITY if is_empty() => Ok(0.0),
        f64::NEG_INFINITY => smallest(of, threads, joined),
        0.0 => {
            let counted = |_, x: f64| if x.is_nan() { x } else { f64::from(u8::from(x != 0.0)) };
            sum(counted).all(of, threads, joined)
        }
        _ => {
            // Scaled by the term that dominates, so that powers neither overflow nor vanish.
            let scale = if p > 0.0 { largest(of, threads, joined) } else { smallest(of, threads, joined) }?;
            if is_zero(scale) || scale.is_infinite() {
                return Ok(if p < 0.0 && is_empty() { 0.0 } else { scale });
            }
            let term = |_, x: f64| libm::pow(x / scale, p);
            Ok(scale * libm::pow(sum(term).all(of, threads, joined)?, 1.0 / p))
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
        let norm = |x: &[f64]| norm(&[of(x)], &mut one()).unwrap();
        let largest = |of: &[Summand<'_>]| largest(of, &mut one(), &mut Joined::default()).unwrap();
        assert_eq!(norm(&[3.0, 4.0]), 5.0);
        assert!((norm(&[3e200, 4e200]) / 5e200 - 1.0).abs() < 1e-15);
        assert!((norm(&[3e-200, 4e-200]) / 5e-200 - 1.0).abs() < 1e-15);
        assert_eq!(norm(&[]), 0.0);
        assert_eq!(norm(&[0.0]), 0.0);
        assert!(norm(&[f64::NAN, 1.0]).is_nan());
        assert!(largest(&[of(&[1.0f64]), of(&[f64::NAN])]).is_nan());
        assert_eq!(largest(&[of(&[1.0f32, -3.0]), of(&[2.0f64])]), 3.0);
        assert_eq!(norm(&[f64::INFINITY, 1.0]), f64::INFINITY);
        assert!(super::norm(&[of(&[1e19f32; 128])], &mut one()).unwrap().is_finite());
    }

    #[test]
    fn other_norms() {
        let p_norm = |x: &[f64], p: f64| p_norm(&[of(x)], p, &mut one()).unwrap();
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
        assert_eq!(super::p_norm(std::slice::from_ref(&complex), 1.0, &mut one()).unwrap(), 6.0);
        assert_eq!(super::p_norm(&[complex], f64::INFINITY, &mut one()).unwrap(), 5.0);
    }

    #[test]
    fn bounds_and_what_is_not_finite() {
        let joined = &mut Joined::default();
        let mut norm_within =
            |of: &[Summand<'_>], bound: f64| super::norm_within(of, bound, &mut one(), joined).unwrap();
        assert_eq!(norm_within(&[of(&[30.0f64, -40.0])], 1.0), 2f64.sqrt());
        assert_eq!(norm_within(&[of(&[f64::INFINITY, 0.0])], 3.0), 3.0);
        assert!((norm_within(&[of(&[1e200f64, 1.0])], 1e199) / 1e199 - 1.0).abs() < 1e-15);
        let first_nonfinite =
            |of: &[Summand<'_>]| super::first_nonfinite(of, &mut one(), &mut Joined::default()).unwrap();
        let (fine, bad) = ([1.0f32, 2.0], [0.0f32, f32::NEG_INFINITY]);
        assert_eq!(first_nonfinite(&[of(&fine), of(&bad)]), Some((1, f64::INFINITY)));
        assert_eq!(first_nonfinite(&[of(&fine), of(&[f64::MAX; 3])]), None);
        assert_eq!((clip_factor(1.0, 0.5), clip_factor(f64::INFINITY, f64::INFINITY)), (1.0, 1.0));
        assert_eq!((clip_factor(1.0, f64::INFINITY), clip_factor(2.0, 4.0)), (0.0, 2.0 / (4.0 + 1e-6)));
        assert!(clip_factor(f64::INFINITY, f64::NAN).is_nan() && clip_factor(1.0, f64::NAN).is_nan());
    }

    #[test]
    fn same_bits_for_any_thread_count() {
        let x: Vec<f32> = (0..300_001u64).map(|i| ((i * 7919) % 1000) as f32 * 1e-3 - 0.37).collect();
        for p in [2.0, 1.0, 3.0, f64::INFINITY] {
            let bits = |n| p_norm(&[of(&x)], p, &mut Threads::new(Some(n))).unwrap().to_bits();
            let one = bits(1);
            assert!([2, 3, 7].into_iter().all(|n| bits(n) == one));
        }
    }
}
