//! The CPU executor: one fused pass over all tensors of all groups.
//!
//! [`plan`] cuts the tensors into pieces and packs small ones together, `run` is the shared loop that
//! any rule's kernel goes through, `memory` is its only access to arrays, [`pool`] the private
//! threads, [`reduce`] the sums whose bits do not depend on threads or chunks. Tensor rules go through
//! `whole`, one tensor at a time.

mod measure;
pub(crate) mod memory;
pub mod plan;
pub mod pool;
pub mod reduce;
mod run;
mod whole;

use std::sync::Arc;

use rayon::prelude::*;

use crate::error::Result;
use crate::isa::Loops;
pub use crate::isa::{Isa, StandardFloats};
use crate::linear::SUM_BLOCK;
use crate::real::Dtype;
use crate::room;
use crate::rule::{Kernel, KernelVisitor, MAX_SLOTS, Row};
use crate::rules::TensorRuleId;
use crate::tensor::{RawTensor, Rows, TensorMut, TensorRef};
pub use measure::Squares;
use measure::Sums;
pub(crate) use measure::{Before, squares_of};
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
    /// Which parameter.
    pub index: usize,
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

/// What is done besides the jobs, piece by piece, while the numbers are in the cache.
#[derive(Debug, Default)]
pub struct Besides<'a> {
    /// Jobs on the same elements, one for each of the executor's, that come after it; and their rows.
    pub followers: Option<(&'a [Job], &'a [Row])>,
    /// Where the sums of squares of each job go.
    pub squares: Option<&'a mut Vec<Squares>>,
}

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
    /// Elements of a task, where a test wants to say.
    chunk: Option<usize>,
    plan: Plan,
    jobs: Vec<Job>,
    /// Empty between steps.
    tensor_jobs: Vec<TensorJob<'static>>,
    spaces: whole::Spaces,
}

impl Executor {
    /// With the machine's best instruction set and the default chunk.
    pub fn new(threads: Threads) -> Self {
        Self {
            threads,
            isa: Isa::detect(),
            chunk: None,
            plan: Plan::default(),
            jobs: Vec::new(),
            tensor_jobs: Vec::new(),
            spaces: whole::Spaces::default(),
        }
    }

    /// For tests: a weaker instruction set, another chunk. The bits do not change.
    pub fn force(&mut self, isa: Isa, chunk: usize) {
        self.isa = isa.min(Isa::detect());
        self.chunk = Some(chunk.max(1));
        self.plan = Plan::default();
        self.jobs.clear();
    }

    /// The jobs.
    pub fn jobs(&self) -> &[Job] {
        &self.jobs
    }

    /// The jobs, whose rows may be changed.
    pub fn jobs_mut(&mut self) -> &mut [Job] {
        &mut self.jobs
    }

    /// Brings the jobs of the step before to other arrays, of the same parameters; whether it is possible: not where an
    /// array is not in C order, or of another dtype, or sparse.
    pub fn renew(&mut self, params: &[TensorMut<'_>], gradients: &[Option<TensorRef<'_>>]) -> bool {
        let is_plain = |raw: &RawTensor| raw.strides.is_none();
        let mut count = 0;
        for (job, gradient) in
            self.jobs.iter_mut().zip(gradients.iter().enumerate().filter_map(|(i, g)| Some((i, g.as_ref()?))))
        {
            let (index, g) = gradient;
            let p = &params[index].raw;
            let was_plain = is_plain(&job.p) && is_plain(&job.g) && job.rows.is_none();
            let fits = job.index == index && is_plain(p) && is_plain(&g.raw) && g.rows.is_none();
            if !(was_plain && fits && g.raw.dtype == job.g.dtype) {
                return false;
            }
            (job.p.ptr, job.g.ptr) = (p.ptr, g.raw.ptr);
            count += 1;
        }
        count == self.jobs.len() && count == gradients.iter().flatten().count()
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

    /// Makes room for the plan of the jobs pushed since [`Executor::clear`], whatever the number of threads.
    pub fn reserve(&mut self) -> Result<()> {
        let elements = self.jobs.iter().map(|job| job.g.len).sum();
        self.plan.reserve(self.chunk.unwrap_or(plan::LEAST_CHUNK), self.jobs.len(), elements)
    }

    /// Runs the jobs pushed since [`Executor::clear`]. On an error nothing has changed.
    ///
    /// # Safety
    /// Each job's tensors must be allocated and aligned for the dtypes its loop was picked for, of equal
    /// length or the gradient as long as the rows, which lie within the parameter; parameter and slots
    /// must be writable, and so must gradients whose row clears them; nothing written by one job may overlap anything of
    /// another, but for what a follower reads of its own job.
    pub unsafe fn execute(&mut self, rows: &[Row], Besides { followers, squares }: Besides<'_>) -> Result<()> {
        let elements: usize = self.jobs.iter().map(|job| job.g.len).sum();
        let chunk = self.chunk.unwrap_or_else(|| plan::chunk(elements, self.threads.count()));
        let lengths = self.jobs.iter().map(|job| job.g.len);
        let sums = squares.is_some().then(|| Sums::of(lengths.clone())).transpose()?;
        self.plan.update(chunk, if sums.is_some() { SUM_BLOCK } else { 1 }, lengths);
        let (plan, jobs) = (&self.plan, &self.jobs[..]);
        let run = |pieces: &[Piece]| {
            // SAFETY: the caller's duty; pieces of one tensor are disjoint and within its length, and where sums are
            // taken they begin at a block.
            unsafe {
                match followers {
                    None => run_pieces(jobs, rows, pieces, sums.as_ref()),
                    Some(followers) => {
                        for piece in pieces.iter().flat_map(Piece::blocks) {
                            run_pieces(jobs, rows, &[piece], sums.as_ref());
                            run_pieces(followers.0, followers.1, &[piece], None);
                        }
                    }
                }
            }
        };
        if elements < INLINE_ELEMENTS {
            run(plan.all());
        } else {
            self.threads.spread(plan.tasks().len(), |i| run(plan.pieces(&plan.tasks()[i])));
        }
        if let (Some(squares), Some(sums)) = (squares, sums) {
            squares.extend(sums.each());
        }
        Ok(())
    }

    /// An empty list for the jobs of a tensor rule.
    pub fn tensor_jobs<'a>(&mut self) -> Vec<TensorJob<'a>> {
        std::mem::take(&mut self.tensor_jobs)
    }

    /// Runs a tensor rule, several tensors at a time. On an error, one of memory, nothing was written.
    ///
    /// # Safety
    /// As for [`Executor::execute`]; a job's slots have the lengths it says.
    pub unsafe fn execute_tensors(&mut self, rule: TensorRuleId, mut jobs: Vec<TensorJob<'_>>) -> Result<()> {
        let (elements, isa) = (jobs.iter().map(|job| job.p.len).sum::<usize>(), self.isa);
        self.spaces.reserve(jobs.iter().map(|job| job.words(rule)).max().unwrap_or(0), jobs.len())?;
        let spaces = &self.spaces;
        let run = |parallel: bool, job: &mut TensorJob<'_>| {
            if job.is_done {
                return;
            }
            let Some(space) = spaces.take() else { return };
            // SAFETY: the caller's duty; the space has the words of the largest job, and whoever took it has it alone.
            unsafe { whole::run(rule, job, Loops { isa, parallel }, &space) };
            spaces.put(space);
        };
        match self.threads.pool(elements >= INLINE_ELEMENTS) {
            Some(pool) => pool.install(|| {
                jobs.par_iter_mut().for_each(|job| run(true, job));
                // There was no memory to work on these beside others: now the one that is certain is free.
                jobs.iter_mut().for_each(|job| run(true, job));
            }),
            None => jobs.iter_mut().for_each(|job| run(false, job)),
        }
        self.spaces.shrink();
        self.tensor_jobs = room::recycled(jobs);
        Ok(())
    }
}

/// Runs jobs on pieces of them.
///
/// # Safety
/// As for [`run::PassFn`]'s function; with sums, each piece begins at a block.
unsafe fn run_pieces(jobs: &[Job], rows: &[Row], pieces: &[Piece], sums: Option<&Sums>) {
    let key = |piece: &Piece| {
        let Job { pass: PassFn { pass, isa }, row, .. } = jobs[piece.tensor];
        (pass as usize, isa, row)
    };
    for alike in pieces.chunk_by(|a, b| key(a) == key(b)) {
        let Job { pass: PassFn { pass, isa }, row, .. } = jobs[alike[0].tensor];
        // SAFETY: the caller's duty.
        let update = |pieces: &[Piece]| unsafe { pass(isa, &rows[row], jobs, pieces) };
        match sums {
            None => update(alike),
            Some(sums) => {
                for &piece in alike {
                    // SAFETY: the caller's duty.
                    unsafe { sums.around(isa, &jobs[piece.tensor], piece, |part| update(&[part])) };
                }
            }
        }
    }
}
