//! Sums whose bits do not depend on threads, chunks or instruction sets.
//!
//! They have the shape of [`crate::linear`]'s. Squares of finite f32 numbers cannot overflow in f64; for f64
//! arrays whose squares do, the sum is taken again over scaled values.

use super::memory::{BLOCK, load};
use super::pool::Threads;
use crate::linear::{SUM_BLOCK, lanes, map, tree};
use crate::real::{Dtype, Element, Real, StorageVisitor, with_storage};
use crate::tensor::{RawTensor, TensorRef};

/// Sum of the squares of elements `start..start + len`, each scaled first.
struct Squares<'a> {
    x: &'a RawTensor,
    start: usize,
    len: usize,
    scale: f64,
}

impl StorageVisitor for Squares<'_> {
    type Out = f64;

    fn visit<E: Element<F>, G: Element<F>, F: Real>(self) -> f64 {
        let mut buffer = [F::ZERO; SUM_BLOCK];
        for (i, part) in buffer[..self.len].chunks_mut(BLOCK).enumerate() {
            // SAFETY: the caller keeps the range within the tensor, whose type E is.
            unsafe { load::<E, F>(self.x, self.start + i * BLOCK, part) };
        }
        lanes(self.len, |i| {
            let value = buffer[i].to_f64() * self.scale;
            value * value
        })
    }
}

/// The largest magnitude of a tensor, NaN where an element is NaN.
struct Largest<'a>(&'a RawTensor);

impl StorageVisitor for Largest<'_> {
    type Out = f64;

    fn visit<E: Element<F>, G: Element<F>, F: Real>(self) -> f64 {
        let mut block = [F::ZERO; BLOCK];
        let mut found = F::ZERO;
        for start in (0..self.0.len).step_by(BLOCK) {
            let block = &mut block[..BLOCK.min(self.0.len - start)];
            // SAFETY: the range lies within the tensor, whose type E is.
            unsafe { load::<E, F>(self.0, start, block) };
            found = block.iter().fold(found, |a, b| a.max_nan(b.abs()));
        }
        found.to_f64()
    }
}

fn largest_of(x: &RawTensor) -> f64 {
    with_storage(x.dtype, x.dtype, Largest(x))
}

/// The largest magnitude of all elements of all tensors; NaN where an element is NaN, 0 without elements.
pub fn largest(tensors: &[TensorRef<'_>]) -> f64 {
    tensors.iter().map(|t| largest_of(&t.raw)).fold(0.0, f64::max_nan)
}

fn sum_of_squares(x: &RawTensor, scale: f64, threads: &mut Threads) -> f64 {
    let blocks = x.len.div_ceil(SUM_BLOCK);
    let of_block = |i: usize| {
        let (start, len) = (i * SUM_BLOCK, SUM_BLOCK.min(x.len - i * SUM_BLOCK));
        with_storage(x.dtype, x.dtype, Squares { x, start, len, scale })
    };
    let mut sums: Vec<f64> = match threads.pool(x.len >= super::INLINE_ELEMENTS) {
        Some(pool) => pool.install(|| map(true, blocks, of_block)),
        None => map(false, blocks, of_block),
    };
    tree(&mut sums)
}

/// The 2-norm of all elements of all tensors, in f64.
///
/// NaN where an element is NaN, infinity where one is infinite. Finite numbers give a finite norm
/// wherever it is representable.
pub fn norm(tensors: &[TensorRef<'_>], threads: &mut Threads) -> f64 {
    let total = |scale: f64, threads: &mut Threads| {
        let mut sums: Vec<f64> = tensors.iter().map(|t| sum_of_squares(&t.raw, scale, threads)).collect();
        tree(&mut sums)
    };
    let plain = total(1.0, threads);
    let trustworthy = (1e-280..=1e300).contains(&plain);
    if trustworthy || plain.is_nan() || tensors.iter().all(|t| t.raw.dtype != Dtype::F64) {
        return libm::sqrt(plain);
    }
    let peak = tensors.iter().filter(|t| t.raw.dtype == Dtype::F64).map(|t| largest_of(&t.raw)).fold(0.0, f64::max);
    if peak == 0.0 || peak.is_infinite() {
        return libm::sqrt(plain);
    }
    // A power of two, so that the scaling is exact; two factors where one would be infinite.
    let exponent = libm::ilogb(peak).clamp(-1000, 1000);
    libm::ldexp(libm::sqrt(total(libm::ldexp(1.0, -exponent), threads)), exponent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extremes() {
        let norm = |x: &[f64]| norm(&[x.into()], &mut Threads::new(Some(1)));
        assert_eq!(norm(&[3.0, 4.0]), 5.0);
        assert!((norm(&[3e200, 4e200]) / 5e200 - 1.0).abs() < 1e-15);
        assert!((norm(&[3e-200, 4e-200]) / 5e-200 - 1.0).abs() < 1e-15);
        assert_eq!(norm(&[]), 0.0);
        assert_eq!(norm(&[0.0]), 0.0);
        assert!(norm(&[f64::NAN, 1.0]).is_nan());
        assert!(largest(&[[1.0f64].as_slice().into(), [f64::NAN].as_slice().into()]).is_nan());
        assert_eq!(largest(&[[1.0f32, -3.0].as_slice().into(), [2.0f64].as_slice().into()]), 3.0);
        assert_eq!(norm(&[f64::INFINITY, 1.0]), f64::INFINITY);
        let f32s = vec![1e19f32; 128];
        assert!(super::norm(&[f32s.as_slice().into()], &mut Threads::new(Some(1))).is_finite());
    }

    #[test]
    fn same_bits_for_any_thread_count() {
        let x: Vec<f32> = (0..300_001u64).map(|i| ((i * 7919) % 1000) as f32 * 1e-3 - 0.37).collect();
        let bits = |n| super::norm(&[x.as_slice().into()], &mut Threads::new(Some(n))).to_bits();
        let one = bits(1);
        assert!([2, 3, 7].into_iter().all(|n| bits(n) == one));
    }
}
