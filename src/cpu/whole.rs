//! One tensor of a tensor rule: in C order and the compute type, wherever it lies.

use std::sync::{Mutex, PoisonError};

use super::SlotPointers;
use super::memory::{load, store_rows, whole, whole_mut};
use super::run::Frame;
use crate::error::Result;
use crate::hyper::Hypers;
use crate::isa::Loops;
use crate::linear::{STRETCH, each, each_part};
use crate::real::{Dtype, Element, Real, StorageVisitor, with_storage};
use crate::room;
use crate::rule::{MAX_SLOTS, Moment, Shared, Work};
use crate::rules::TensorRuleId;
use crate::tensor::{Buffer, RawTensor};

/// One parameter's part in a step of a tensor rule.
#[derive(Debug)]
pub struct TensorJob<'a> {
    /// Its group's hyperparameters.
    pub hypers: &'a Hypers,
    /// Where it is in its life.
    pub at: Moment,
    /// The executor's own scalars.
    pub shared: Shared,
    /// The parameter's shape.
    pub shape: &'a [usize],
    /// The parameter's dtype.
    pub dtype: Dtype,
    /// The parameter.
    pub p: RawTensor,
    /// The gradient.
    pub g: RawTensor,
    /// Slots by position in the declaration, and their lengths; 0 where there is none.
    pub slots: SlotPointers,
    /// Elements of each slot.
    pub lengths: [usize; MAX_SLOTS],
    /// Whether it was stepped.
    pub is_done: bool,
}

// SAFETY: the pointers are addresses; `Executor::execute_tensors` lists the caller's duties for the memory.
unsafe impl Send for TensorJob<'_> {}

impl TensorJob<'_> {
    /// Which of parameter and gradient are worked on as copies.
    fn copies(&self) -> [bool; 2] {
        let lies = |x: &RawTensor| x.strides.is_none() && matches!(x.dtype, Dtype::F32 | Dtype::F64);
        // What leaves gradients as they are in float64 does so in every type.
        [!lies(&self.p), !lies(&self.g) || !Frame::<f64>::new(&self.shared).leaves_gradients()]
    }

    /// Float64 numbers of the working memory: the rule's sums, its other numbers, the copies, each from a whole one on.
    fn parts(&self, rule: TensorRuleId) -> [usize; 4] {
        let room = rule.room(self.shape);
        let per_word = size_of::<f64>() / self.dtype.of_state().part().size();
        let [p, g] = self.copies().map(|copied| if copied { self.p.len.div_ceil(per_word) } else { 0 });
        [room.sums, room.elements.div_ceil(per_word), p, g]
    }

    /// Float64 numbers of all of it.
    pub(super) fn words(&self, rule: TensorRuleId) -> usize {
        if self.p.len > 0 { self.parts(rule).iter().sum() } else { 0 }
    }
}

struct Run<'a, 'j> {
    rule: TensorRuleId,
    job: &'a mut TensorJob<'j>,
    loops: Loops,
    /// Working memory of as many words.
    memory: *mut u8,
}

impl StorageVisitor for Run<'_, '_> {
    type Out = ();

    fn visit<E: Element<F>, G: Element<F>, F: Real>(self) {
        let Self { rule, job, loops, memory } = self;
        let (room, [copies_p, copies_g], parts) = (rule.room(job.shape), job.copies(), job.parts(rule));
        let TensorJob { hypers, at, shared, shape, dtype, p, g, slots: pointers, lengths, .. } = job;
        let n = p.len;
        let frame = Frame::<F>::new(shared);
        let copied = |copies: bool| if copies { n } else { 0 };
        let mut words = 0;
        let [sums, elements, p_copy, g_copy] = parts.map(|part| {
            words += part;
            memory.wrapping_add((words - part) * size_of::<f64>())
        });
        // SAFETY: tensors, slots and working memory are what the caller of `run` promised; each is borrowed once.
        unsafe {
            let (p_copy, g_copy) = (whole_mut(p_copy, 0, copied(copies_p)), whole_mut(g_copy, 0, copied(copies_g)));
            if copies_p {
                copy::<E, F>(loops, p, p_copy);
            }
            if copies_g {
                copy::<G, F>(loops, g, g_copy);
                each(loops, g_copy, [], |g, []| frame.prepared(g));
            }
            let slot = |k: usize| whole_mut::<F>(pointers[k], 0, lengths[k]);
            let work = Work {
                shape,
                dtype: *dtype,
                p: if copies_p { &mut *p_copy } else { whole_mut(p.ptr, 0, n) },
                g: if copies_g { g_copy } else { whole(g.ptr, 0, n) },
                slots: std::array::from_fn(slot),
                loops,
                elements: whole_mut(elements, 0, room.elements),
                sums: whole_mut(sums, 0, room.sums),
            };
            rule.update(hypers, *at, work);
            if copies_p {
                each_part(loops, p_copy, STRETCH, |i, part| store_rows::<E, F>(p, None, i * STRETCH, part));
            }
            if shared.flush_subnormals {
                for slot in (0..MAX_SLOTS).map(slot) {
                    each(loops, slot, [], |x, []| if x.abs() < F::MIN_POSITIVE { F::ZERO } else { x });
                }
            }
        }
    }
}

/// # Safety
/// The tensor stores `E`.
unsafe fn copy<E: Element<F>, F: Real>(loops: Loops, from: &RawTensor, to: &mut [F]) {
    // SAFETY: the caller's duty.
    each_part(loops, to, STRETCH, |i, part| unsafe { load::<E, F>(from, i * STRETCH, part) });
}

/// One update of one tensor; spread inside a pool.
///
/// # Safety
/// As for [`super::Executor::execute_tensors`]; `memory` has the job's words of float64, which nobody else uses.
pub(super) unsafe fn run(rule: TensorRuleId, job: &mut TensorJob<'_>, loops: Loops, memory: &Buffer) {
    if job.p.len > 0 {
        let (parameter, gradient) = (job.p.dtype, job.g.dtype);
        with_storage(parameter, gradient, Run { rule, job, loops, memory: memory.raw().ptr });
    }
    job.is_done = true;
}

/// Working memory of updates that run side by side, kept from step to step where it is small.
#[derive(Debug, Default)]
pub(super) struct Spaces {
    /// Float64 numbers that each has.
    words: usize,
    free: Mutex<Vec<Buffer>>,
}

impl Spaces {
    /// What is larger is given back after a step.
    const KEPT_WORDS: usize = 1 << 17;

    /// Makes one of so many words at least, and room for those of so many updates.
    pub(super) fn reserve(&mut self, words: usize, updates: usize) -> Result<()> {
        const WHAT: &str = "the working memory of a step";
        let free = self.free.get_mut().unwrap_or_else(PoisonError::into_inner);
        if words > self.words {
            free.clear();
            self.words = words;
        }
        room::reserve(free, updates, WHAT)?;
        if free.is_empty() {
            free.push(Buffer::zeroed(self.words, Dtype::F64).map_err(|_| room::refusal(8 * self.words, WHAT))?);
        }
        Ok(())
    }

    /// One for an update, unless others have what there is and there is no memory for more.
    pub(super) fn take(&self) -> Option<Buffer> {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        free.or_else(|| Buffer::zeroed(self.words, Dtype::F64).ok())
    }

    /// Takes it back.
    pub(super) fn put(&self, space: Buffer) {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).push(space);
    }

    /// Lets go of what is not worth keeping.
    pub(super) fn shrink(&mut self) {
        if self.words > Self::KEPT_WORDS {
            *self = Self::default();
        }
    }
}
