//! Sums whose bits do not depend on threads, chunks or instruction sets.
//!
//! A tensor is cut into blocks of 4096 elements in C order; a block is summed in f64 in 16 fixed lanes
//! and a fixed tree over them; the blocks are added by a fixed tree (neighbours first). Squares of
//! finite f32 numbers cannot overflow in f64; for f64 arrays whose squares do, the sum is taken again
//! over scaled values.

use rayon::prelude::*;

use super::memory::{BLOCK, load};
use super::pool::Threads;
use crate::real::{Dtype, Element, Real};
use crate::tensor::{RawTensor, TensorRef};

const SUM_BLOCK: usize = 4096;
const LANES: usize = 16;

/// # Safety
/// The range lies within the tensor, which stores `E`.
unsafe fn sum_block<E: Element<F>, F: Real>(x: &RawTensor, start: usize, len: usize, scale: f64) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let mut block = [F::ZERO; BLOCK];
    let mut done = 0;
    while done < len {
        let n = BLOCK.min(len - done);
        // SAFETY: the caller's duty.
        unsafe { load::<E, F>(x, start + done, n, &mut block) };
        block[n..].fill(F::ZERO);
        for group in block.chunks_exact(LANES) {
            for (sum, &value) in lanes.iter_mut().zip(group) {
                let value = value.to_f64() * scale;
                *sum += value * value;
            }
        }
        done += n;
    }
    tree(&mut lanes)
}

fn tree(values: &mut [f64]) -> f64 {
    let mut n = values.len();
    while n > 1 {
        let half = n.div_ceil(2);
        for i in 0..n / 2 {
            values[i] = values[2 * i] + values[2 * i + 1];
        }
        if n % 2 == 1 {
            values[half - 1] = values[n - 1];
        }
        n = half;
    }
    values.first().copied().unwrap_or(0.0)
}

/// The largest magnitude of a tensor, NaN where an element is NaN.
fn largest_of(x: &RawTensor) -> f64 {
    /// # Safety
    /// The tensor stores `E`.
    unsafe fn of<E: Element<F>, F: Real>(x: &RawTensor) -> f64 {
        let mut block = [F::ZERO; BLOCK];
        let mut found = F::ZERO;
        for start in (0..x.len).step_by(BLOCK) {
            let n = BLOCK.min(x.len - start);
            // SAFETY: the range lies within the tensor; the caller knows its type.
            unsafe { load::<E, F>(x, start, n, &mut block) };
            found = block[..n].iter().fold(found, |a, b| a.max_nan(b.abs()));
        }
        found.to_f64()
    }
    // SAFETY: the type is the tensor's own.
    unsafe {
        match x.dtype {
            Dtype::F32 => of::<f32, f32>(x),
            Dtype::F64 => of::<f64, f64>(x),
        }
    }
}

/// The largest magnitude of all elements of all tensors; NaN where an element is NaN, 0 without elements.
pub fn largest(tensors: &[TensorRef<'_>]) -> f64 {
    tensors.iter().map(|t| largest_of(&t.raw)).fold(0.0, f64::max_nan)
}

fn sum_of_squares(x: &RawTensor, scale: f64, threads: &mut Threads) -> f64 {
    let blocks = x.len.div_ceil(SUM_BLOCK);
    let of_block = |i: usize| {
        let (start, len) = (i * SUM_BLOCK, SUM_BLOCK.min(x.len - i * SUM_BLOCK));
        // SAFETY: the range lies within the tensor; the dtype matches.
        unsafe {
            match x.dtype {
                Dtype::F32 => sum_block::<f32, f32>(x, start, len, scale),
                Dtype::F64 => sum_block::<f64, f64>(x, start, len, scale),
            }
        }
    };
    let mut sums: Vec<f64> = match threads.pool(x.len >= super::INLINE_ELEMENTS) {
        Some(pool) => pool.install(|| (0..blocks).into_par_iter().map(of_block).collect()),
        None => (0..blocks).map(of_block).collect(),
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
    if trustworthy || plain.is_nan() || tensors.iter().all(|t| t.raw.dtype == Dtype::F32) {
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
