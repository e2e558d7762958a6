//! Sums of squares over a step, taken block by block while the numbers are in the cache.
//!
//! Their shape is that of [`super::reduce`]'s sums, so that their bits depend on neither threads nor chunks.

use std::sync::atomic::{AtomicU64, Ordering};

use super::Job;
use super::memory::part;
use super::plan::Piece;
use super::reduce::{sum_of_squared_differences, sum_of_squares};
use crate::error::Result;
use crate::isa::Isa;
use crate::linear::{SUM_BLOCK, tree};
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
        let Self { isa, job: Job { p, g, .. }, part: piece, update } = self;
        let Piece { start, len, .. } = piece;
        let (mut copy, mut before) = (None, [F::ZERO; SUM_BLOCK]);
        // SAFETY: the duty of `Sums::around`'s caller; the update is over when the parameter is read again.
        unsafe {
            let gradient = sum_of_squares(isa, part::<G, F>(g, start, len, &mut copy));
            before[..len].copy_from_slice(part::<E, F>(p, start, len, &mut copy));
            update(piece);
            let [update, parameter] = of_change(isa, &before[..len], part::<E, F>(p, start, len, &mut copy));
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
    /// As for a pass over the piece, which begins at a block; the job has no rows.
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

/// A parameter as it was before a step that is not taken block by block, and its gradient's squares.
#[derive(Debug)]
pub(crate) struct Before {
    values: Vec<f64>,
    gradient: f64,
}

impl Before {
    /// Of arrays that lie on the host.
    pub(crate) fn of(parameter: &TensorRef<'_>, gradient: &TensorRef<'_>) -> Result<Self> {
        let isa = Isa::detect();
        let (mut values, mut sums) = (Vec::new(), Vec::new());
        room::reserve(&mut values, parameter.raw.len, WHAT)?;
        room::reserve(&mut sums, gradient.raw.len.div_ceil(SUM_BLOCK), WHAT)?;
        each_block(parameter, |_, block| values.extend_from_slice(block));
        each_block(gradient, |_, block| sums.push(sum_of_squares(isa, block)));
        Ok(Self { values, gradient: tree(&mut sums) })
    }

    /// The sums, of the parameter after the step.
    pub(crate) fn until(&self, parameter: &TensorRef<'_>) -> Squares {
        let (mut updates, mut parameters) = (Vec::new(), Vec::new());
        each_block(parameter, |start, now| {
            let [update, parameter] = of_change(Isa::detect(), &self.values[start..start + now.len()], now);
            updates.push(update);
            parameters.push(parameter);
        });
        Squares { gradient: self.gradient, update: tree(&mut updates), parameter: tree(&mut parameters) }
    }
}

/// Calls `visit(start, numbers)` for each block of an array.
fn each_block(x: &TensorRef<'_>, visit: impl FnMut(usize, &[f64])) {
    struct Each<'a, V>(&'a RawTensor, V);

    impl<V: FnMut(usize, &[f64])> StorageVisitor for Each<'_, V> {
        type Out = ();

        fn visit<E: Element<F>, G: Element<F>, F: Real>(mut self) {
            let (mut copy, mut wide) = (None, [0.0; SUM_BLOCK]);
            for start in (0..self.0.len).step_by(SUM_BLOCK) {
                let len = SUM_BLOCK.min(self.0.len - start);
                // SAFETY: a TensorRef describes allocated, aligned memory, which the block lies within.
                let block = unsafe { part::<E, F>(self.0, start, len, &mut copy) };
                wide.iter_mut().zip(block).for_each(|(wide, x)| *wide = x.to_f64());
                (self.1)(start, &wide[..len]);
            }
        }
    }
    with_storage(x.raw.dtype, x.raw.dtype, Each(&x.raw, visit));
}
