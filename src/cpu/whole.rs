//! One tensor of a tensor rule: in C order and the compute type, wherever it lies.

use super::SlotPointers;
use super::memory::{load, store_rows, whole, whole_mut};
use super::run::Frame;
use crate::hyper::Hypers;
use crate::isa::Loops;
use crate::linear::{STRETCH, each, each_part};
use crate::real::{Dtype, Element, Real, StorageVisitor, with_storage};
use crate::rule::{MAX_SLOTS, Moment, Shared, Work};
use crate::rules::TensorRuleId;
use crate::tensor::RawTensor;

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
}

// SAFETY: the pointers are addresses; `Executor::execute_tensors` lists the caller's duties for the memory.
unsafe impl Send for TensorJob<'_> {}

struct Run<'a, 'j> {
    rule: TensorRuleId,
    job: &'a mut TensorJob<'j>,
    loops: Loops,
}

impl StorageVisitor for Run<'_, '_> {
    type Out = ();

    fn visit<E: Element<F>, G: Element<F>, F: Real>(self) {
        let Self { rule, job, loops } = self;
        let TensorJob { hypers, at, shared, shape, dtype, p, g, slots: pointers, lengths } = job;
        let n = p.len;
        let frame = Frame::<F>::new(shared);
        let (mut p_copy, mut g_copy) = (Vec::new(), Vec::new());
        // SAFETY: tensors and slots are what the caller of `execute_tensors` promised; each is borrowed once.
        unsafe {
            let p_lies = p.strides.is_none() && E::IS_COMPUTE_TYPE;
            if !p_lies {
                p_copy.resize(n, F::ZERO);
                each_part(loops, &mut p_copy, STRETCH, |i, part| load::<E, F>(p, i * STRETCH, part));
            }
            if g.strides.is_some() || !G::IS_COMPUTE_TYPE || !frame.leaves_gradients() {
                g_copy.resize(n, F::ZERO);
                each_part(loops, &mut g_copy, STRETCH, |i, part| load::<G, F>(g, i * STRETCH, part));
                each(loops, &mut g_copy, [], |g, []| frame.prepared(g));
            }
            let slot = |k: usize| whole_mut::<F>(pointers[k], 0, lengths[k]);
            let work = Work {
                shape,
                dtype: *dtype,
                p: if p_lies { whole_mut(p.ptr, 0, n) } else { &mut p_copy },
                g: if g_copy.is_empty() { whole(g.ptr, 0, n) } else { &g_copy },
                slots: std::array::from_fn(slot),
                loops,
            };
            rule.update(hypers, *at, work);
            if !p_lies {
                each_part(loops, &mut p_copy, STRETCH, |i, part| store_rows::<E, F>(p, None, i * STRETCH, part));
            }
            if shared.flush_subnormals {
                for slot in (0..MAX_SLOTS).map(slot) {
                    each(loops, slot, [], |x, []| if x.abs() < F::MIN_POSITIVE { F::ZERO } else { x });
                }
            }
        }
    }
}

/// One update of one tensor; spread inside a pool.
///
/// # Safety
/// As for [`super::Executor::execute_tensors`].
pub(super) unsafe fn run(rule: TensorRuleId, job: &mut TensorJob<'_>, loops: Loops) {
    if job.p.len > 0 {
        let (parameter, gradient) = (job.p.dtype, job.g.dtype);
        with_storage(parameter, gradient, Run { rule, job, loops });
    }
}
