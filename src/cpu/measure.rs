//! Sums of squares over a step, taken block by block while the numbers are in the cache.
//!
//! Their shape is that of [`super::reduce`]'s sums, so that their bits depend on neither threads nor chunks.

use std::sync::atomic::{AtomicU64, Ordering};

use super::memory::{gather, part};
use super::plan::Piece;
use super::pool::Threads;
use super::reduce::{sum_of_squared_differences, sum_of_squares};
use super::{INLINE_ELEMENTS, Job};
use crate::error::Result;
use crate::isa::{Isa, Loops};
use crate::linear::{SUM_BLOCK, join_leaves, tree};
use crate::real::{Element, Real, StorageVisitor, with_storage};
use crate::room;
use crate::tensor::{RawTensor, TensorRef};

/// What memory is for.
const WHAT: &str = "the norms of a step";

/// Sums of squares of one parameter in a step.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Squares {
    /// Of its gradient, as it was given.
    pub gradient: f64,
    /// Of what the step added to it.
    pub update: f64,
    /// Of the parameter after the step.
    pub parameter: f64,
}

/// Squares of now − before, and of now.
fn of_change<F: Real>(isa: Isa, before: &[F], now: &[F]) -> [f64; 2] {
    [sum_of_squared_differences(isa, now, before), sum_of_squares(isa, now)]
}

/// A block of a job: its sums of gradient, update and parameter around the update.
struct Around<'a, U> {
    isa: Isa,
    job: &'a Job,
    part: Piece,
    update: U,
}

impl<U: FnOnce(Piece)> StorageVisitor for Around<'_, U> {
    type Out = [f64; 3];

    fn visit<E: Element<F>, G: Element<F>, F: Real>(self) -> [f64; 3] {
        let Self { isa, job: Job { p, g, rows, .. }, part: piece, update } = self;
        let rows = rows.as_deref();
        let Piece { start, len, .. } = piece;
        let (mut copy, mut before) = (None, [F::ZERO; SUM_BLOCK]);
        // SAFETY: the duty of `Sums::around`'s caller; the update is over when the parameter is read again.
        unsafe {
            let gradient = sum_of_squares(isa, part::<G, F>(g, None, start, len, &mut copy));
            before[..len].copy_from_slice(part::<E, F>(p, rows, start, len, &mut copy));
            update(piece);
            let [update, parameter] = of_change(isa, &before[..len], part::<E, F>(p, rows, start, len, &mut copy));
            [gradient, update, parameter]
        }
    }
}

/// The sums of each block of each job.
pub(super) struct Sums {
    /// By job: its first block; and one past the last.
    first: Vec<usize>,
    blocks: Vec<[AtomicU64; 3]>,
}

impl Sums {
    /// For jobs of so many elements.
    pub(super) fn of(lengths: impl ExactSizeIterator<Item = usize>) -> Result<Self> {
        let mut total = 0;
        let ends = lengths.map(|length| {
            total += length.div_ceil(SUM_BLOCK);
            total
        });
        let mut first = Vec::new();
        room::reserve(&mut first, ends.len() + 1, WHAT)?;
        first.push(0);
        first.extend(ends);
        let mut blocks = Vec::new();
        room::reserve(&mut blocks, total, WHAT)?;
        blocks.resize_with(total, Default::default);
        Ok(Self { first, blocks })
    }

    /// Updates a piece block by block, and takes the sums around each.
    ///
    /// # Safety
    /// As for a pass over the piece, which begins at a block.
    pub(super) unsafe fn around(&self, isa: Isa, job: &Job, piece: Piece, mut update: impl FnMut(Piece)) {
        for part in piece.blocks() {
            let around = Around { isa, job, part, update: &mut update };
            let sums = with_storage(job.p.dtype, job.g.dtype, around);
            let block = &self.blocks[self.first[part.tensor] + part.start / SUM_BLOCK];
            for (cell, sum) in block.iter().zip(sums) {
                cell.store(sum.to_bits(), Ordering::Relaxed);
            }
        }
    }

    /// By job.
    pub(super) fn each(&self) -> impl Iterator<Item = Squares> {
        self.first.windows(2).map(|ends| {
            let blocks = &self.blocks[ends[0]..ends[1]];
            let [gradient, update, parameter] = std::array::from_fn(|k| {
                tree(&mut blocks.iter().map(|b| f64::from_bits(b[k].load(Ordering::Relaxed))).collect::<Vec<_>>())
            });
            Squares { gradient, update, parameter }
        })
    }
}

/// The squares of all numbers of an array, added; of a sparse one, of those that it has.
pub(crate) fn squares_of(x: &TensorRef<'_>, threads: &mut Threads) -> f64 {
    each_block(x, threads, |isa, _, block| sum_of_squares(isa, block))
}

/// A parameter as it was before a step that takes no sums in its pass, and its gradient's squares.
#[derive(Debug)]
pub(crate) struct Before {
    values: Vec<f64>,
    gradient: f64,
}

impl Before {
    /// Of arrays that lie on the host.
    pub(crate) fn of(parameter: &TensorRef<'_>, gradient: &TensorRef<'_>, threads: &mut Threads) -> Result<Self> {
        let mut values = room::filled(parameter.raw.len, 0.0, WHAT)?;
        gather(parameter, &mut values);
        Ok(Self { values, gradient: squares_of(gradient, threads) })
    }

    /// The sums, of the parameter after the step.
    pub(crate) fn until(&self, parameter: &TensorRef<'_>, threads: &mut Threads) -> Squares {
        let update = each_block(parameter, threads, |isa, start, now| {
            sum_of_squared_differences(isa, now, &self.values[start..start + now.len()])
        });
        Squares { gradient: self.gradient, update, parameter: squares_of(parameter, threads) }
    }
}

/// The sum of what `term(isa, start, numbers)` is for each block of an array.
fn each_block(x: &TensorRef<'_>, threads: &mut Threads, term: impl Fn(Isa, usize, &[f64]) -> f64 + Sync + Send) -> f64 {
    struct Each<'a, T>(&'a RawTensor, usize, T);

    impl<T: Fn(usize, &[f64]) -> f64> StorageVisitor for Each<'_, T> {
        type Out = f64;

        fn visit<E: Element<F>, G: Element<F>, F: Real>(self) -> f64 {
            let Self(x, start, term) = self;
            let (mut copy, mut wide) = (None, [0.0; SUM_BLOCK]);
            let len = SUM_BLOCK.min(x.len - start);
            // SAFETY: a TensorRef describes allocated, aligned memory, which the block lies within.
            let block = unsafe { part::<E, F>(x, None, start, len, &mut copy) };
            wide.iter_mut().zip(block).for_each(|(wide, x)| *wide = x.to_f64());
            term(start, &wide[..len])
        }
    }
    let (x, isa) = (&x.raw, Isa::detect());
    let block = |i: usize| {
        let each = Each(x, i * SUM_BLOCK, |start: usize, numbers: &[f64]| term(isa, start, numbers));
        with_storage(x.dtype, x.dtype, each)
    };
    let sum = |parallel: bool| join_leaves(Loops { isa, parallel }, x.len.div_ceil(SUM_BLOCK), block, |a, b| a + b);
    match threads.pool(x.len >= INLINE_ELEMENTS) {
        Some(pool) => pool.install(|| sum(true)),
        None => sum(false),
    }
}
