//! The CPU executor: one fused pass over all tensors of all groups.
//!
//! [`plan`] cuts the tensors into pieces and packs small ones together, `run` is the shared loop that
//! any rule's kernel goes through, `memory` is its only access to arrays, [`pool`] the private
//! threads, [`reduce`] the sums whose bits do not depend on threads or chunks. Tensor rules go through
//! `whole`, one tensor at a time.

pub mod isa;
pub(crate) mod memory;
pub mod plan;
pub mod pool;
pub mod reduce;
mod run;
mod whole;

use std::sync::Arc;

use rayon::prelude::*;

use crate::real::Dtype;
use crate::rule::{Kernel, KernelVisitor, MAX_SLOTS, Row};
use crate::rules::TensorRuleId;
use crate::tensor::{RawTensor, Rows};
pub use isa::Isa;
pub use memory::fingerprint;
use plan::{Piece, Plan};
pub use pool::Threads;
#[cfg(feature = "gpu")]
pub(crate) use run::Frame;
pub use run::PassFn;
pub use whole::TensorJob;

/// Fewer elements than this run on the calling thread: waking the pool costs more than it saves.
pub const INLINE_ELEMENTS: usize = 32 * 1024;

/// First byte of each slot; null past the kernel's own.
pub type SlotPointers = [*mut u8; MAX_SLOTS];

/// One parameter's part in a step.
#[derive(Debug, Clone)]
pub struct Job {
    /// The kernel's loop.
    pub pass: PassFn,
    /// Which coefficient row.
    pub row: usize,
    /// The parameter.
    pub p: RawTensor,
    /// The gradient; with `rows`, theirs alone.
    pub g: RawTensor,
    /// The kernel's slots, in its order.
    pub slots: SlotPointers,
    /// Rows of the parameter that the step is confined to.
    pub rows: Option<Arc<Rows>>,
}

// SAFETY: the pointers are addresses; `Executor::execute` lists the caller's duties for the memory.
unsafe impl Send for Job {}
// SAFETY: as above.
unsafe impl Sync for Job {}

/// Picks the compiled loop of a kernel for dtypes and instruction set.
struct Select {
    parameter: Dtype,
    gradient: Dtype,
    isa: Isa,
}

impl KernelVisitor for Select {
    type Out = PassFn;

    fn visit<K: Kernel>(self) -> PassFn {
        run::select::<K>(self.parameter, self.gradient, self.isa)
    }
}

/// Runs steps on the CPU. Holds only scratch memory that is reused from step to step.
#[derive(Debug)]
pub struct Executor {
    /// Where and with how many threads.
    pub threads: Threads,
    isa: Isa,
    chunk: usize,
    plan: Plan,
    jobs: Vec<Job>,
}

impl Executor {
    /// With the machine's best instruction set and the default chunk.
    pub fn new(threads: Threads) -> Self {
        Self { threads, isa: Isa::detect(), chunk: plan::CHUNK, plan: Plan::default(), jobs: Vec::new() }
    }

    /// For tests: a weaker instruction set, another chunk. The bits do not change.
    pub fn force(&mut self, isa: Isa, chunk: usize) {
        self.isa = isa.min(Isa::detect());
        self.chunk = chunk.max(1);
        self.plan = Plan::default();
    }

    /// Forgets the last step's jobs.
    pub fn clear(&mut self) {
        self.jobs.clear();
    }

    /// Picks the loop of the kernel it is shown.
    pub fn select(&self, parameter: Dtype, gradient: Dtype) -> impl KernelVisitor<Out = PassFn> + use<> {
        Select { parameter, gradient, isa: self.isa }
    }

    /// Adds one parameter to the coming step.
    pub fn push(&mut self, job: Job) {
        self.jobs.push(job);
    }

    /// Runs the jobs pushed since [`Executor::clear`].
    ///
    /// # Safety
    /// Each job's tensors must be allocated and aligned for the dtypes its loop was picked for, of equal
    /// length or the gradient as long as the rows, which lie within the parameter; parameter and slots
    /// must be writable, and nothing written by one job may overlap anything of another.
    pub unsafe fn execute(&mut self, rows: &[Row]) {
        self.plan.update(self.chunk, self.jobs.iter().map(|j| j.g.len));
        let jobs = &self.jobs;
        let run = |piece: &Piece| {
            let job = &jobs[piece.tensor];
            // SAFETY: the caller's duty; pieces of one tensor are disjoint and within its length.
            unsafe { (job.pass.pass)(job.pass.isa, &rows[job.row], job, piece.start, piece.len) }
        };
        let plan = &self.plan;
        match self.threads.pool(plan.elements() >= INLINE_ELEMENTS) {
            Some(pool) => pool.install(|| {
                plan.tasks().par_iter().for_each(|task| plan.pieces(task).iter().for_each(run));
            }),
            None => plan.all().iter().for_each(run),
        }
    }

    /// Runs a tensor rule, several tensors at a time.
    ///
    /// # Safety
    /// As for [`Executor::execute`]; a job's slots have the lengths it says.
    pub unsafe fn execute_tensors(&mut self, rule: TensorRuleId, jobs: &mut [TensorJob<'_>]) {
        let elements = jobs.iter().map(|job| job.p.len).sum::<usize>();
        // SAFETY: the caller's duty.
        let run = |parallel: bool, job: &mut TensorJob<'_>| unsafe { whole::run(rule, job, parallel) };
        match self.threads.pool(elements >= INLINE_ELEMENTS) {
            Some(pool) => pool.install(|| jobs.par_iter_mut().for_each(|job| run(true, job))),
            None => jobs.iter_mut().for_each(|job| run(false, job)),
        }
    }
}
