//! The loop that every rule's kernel runs through.
//!
//! ```text
//! for each element:
//!     g within ±bound                     where gradients are clipped by value
//!     g = ±scale·g                        maximize and gradient scale: one exact factor
//!     g = g + λ·θ    or    θ = θ·(1 − lr·λ)
//!     θ, slots = kernel(θ, g, slots)      the rule
//!     slots below the smallest normal number become 0
//! g = 0                                   where gradients are cleared, piece by piece
//! ```
//!
//! [`sweep`] is that loop over plain slices, compiled once per kernel, compute type and instruction set.
//! Nothing in it fuses or reorders operations, so every level gives the same bits. [`pass`] feeds it:
//! arrays in C order are swept where they lie, every other layout and storage type and the rows of a
//! sparse gradient go block by block through local arrays ([`by_blocks`]), with the same arithmetic.

use std::marker::PhantomData;

use super::Job;
use super::memory::{BLOCK, clear, load, load_rows, store_rows, whole, whole_mut};
use super::plan::Piece;
use crate::drill::point;
use crate::isa::Isa;
use crate::real::{Dtype, Element, Real, StorageVisitor, with_storage};
use crate::rule::{Coefficients, Decay, Kernel, MAX_SLOTS, Row, Shared, SlotValues};
use crate::tensor::RawTensor;

/// One kernel over pieces of jobs that share a row of coefficients.
///
/// # Safety
/// The machine has the instruction set. Each piece lies within the gradient of its job, and tensors and slots (of a
/// parameter with rows, within these) are allocated, aligned and of the dtype the function was selected for; parameter
/// and slots, and a gradient that is cleared, are writable and touched by no other thread of the step.
pub(super) type Pass = unsafe fn(Isa, &Row, &[Job], &[Piece]);

/// A selected loop and the instruction set it runs with.
#[derive(Debug, Clone, Copy)]
pub struct PassFn {
    pub(super) pass: Pass,
    pub(super) isa: Isa,
}

/// The shared pre- and post-steps, cast to the compute type. Neutral values change no bit.
pub(crate) struct Frame<F> {
    pub(crate) bound: Option<F>,
    pub(crate) gradient_factor: F,
    pub(crate) l2: Option<F>,
    pub(crate) shrink: F,
    smallest: F,
}

impl<F: Real> Frame<F> {
    pub(crate) fn new(shared: &Shared) -> Self {
        let scale = F::from_f64(shared.gradient_scale);
        Self {
            bound: Some(F::from_f64(shared.gradient_bound)).filter(|bound| bound.to_f64().is_finite()),
            gradient_factor: if shared.maximize { -scale } else { scale },
            l2: if let Decay::L2(lambda) = shared.decay { Some(F::from_f64(lambda)) } else { None },
            shrink: if let Decay::Decoupled(factor) = shared.decay { F::from_f64(factor) } else { F::ONE },
            smallest: if shared.flush_subnormals { F::MIN_POSITIVE } else { F::ZERO },
        }
    }

    /// An element of the gradient within the bound, times the factor. NaN stays.
    #[inline(always)]
    pub(super) fn prepared(&self, g: F) -> F {
        let g = if let Some(bound) = self.bound {
            let g = if g > bound { bound } else { g };
            if g < -bound { -bound } else { g }
        } else {
            g
        };
        g * self.gradient_factor
    }

    /// Whether [`Frame::prepared`] changes nothing.
    pub(super) fn leaves_gradients(&self) -> bool {
        self.gradient_factor == F::ONE && self.bound.is_none()
    }
}

/// What a sweep works on; slots past the kernel's own are empty.
///
/// # Safety
/// The machine has the instruction set it was compiled for.
type Sweep<K, F> = unsafe fn(&<K as Kernel>::C<F>, &Frame<F>, &mut [F], &[F], &mut [F], &mut [F], &mut [F], &mut [F]);

#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "separate slice arguments tell the compiler that nothing overlaps")]
fn sweep<K: Kernel, F: Real>(
    c: &K::C<F>,
    frame: &Frame<F>,
    p: &mut [F],
    g: &[F],
    s0: &mut [F],
    s1: &mut [F],
    s2: &mut [F],
    s3: &mut [F],
) {
    let n = p.len();
    let count = <K::S<F> as SlotValues<F>>::COUNT;
    assert!(g.len() == n);
    for (k, slot) in [&*s0, s1, s2, s3].into_iter().enumerate() {
        assert!(k >= count || slot.len() == n);
    }
    for i in 0..n {
        let g = frame.prepared(g[i]);
        let g = if let Some(lambda) = frame.l2 { g + lambda * p[i] } else { g };
        let theta = p[i] * frame.shrink;
        let mut slots = <K::S<F> as SlotValues<F>>::from_fn(|k| match k {
            0 => s0[i],
            1 => s1[i],
            2 => s2[i],
            _ => s3[i],
        });
        p[i] = K::update(c, theta, g, &mut slots);
        for (k, &value) in slots.as_slice().iter().enumerate() {
            let value = if value.abs() < frame.smallest { F::ZERO } else { value };
            match k {
                0 => s0[i] = value,
                1 => s1[i] = value,
                2 => s2[i] = value,
                _ => s3[i] = value,
            }
        }
    }
}

macro_rules! level {
    ($name:ident $(, $features:literal)?) => {
        $(#[target_feature(enable = $features)])?
        #[allow(clippy::too_many_arguments, reason = "see sweep")]
        fn $name<K: Kernel, F: Real>(
            c: &K::C<F>,
            frame: &Frame<F>,
            p: &mut [F],
            g: &[F],
            s0: &mut [F],
            s1: &mut [F],
            s2: &mut [F],
            s3: &mut [F],
        ) {
            sweep::<K, F>(c, frame, p, g, s0, s1, s2, s3);
        }
    };
}

level!(baseline);
#[cfg(target_arch = "x86_64")]
level!(avx2, "avx2");
#[cfg(target_arch = "x86_64")]
level!(avx512, "avx512f,avx512vl");

fn at_level<K: Kernel, F: Real>(isa: Isa) -> Sweep<K, F> {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::<K, F>,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => avx512::<K, F>,
        _ => baseline::<K, F>,
    }
}

/// # Safety
/// See [`Pass`].
unsafe fn pass<K: Kernel, E: Element<F>, G: Element<F>, F: Real>(isa: Isa, row: &Row, jobs: &[Job], pieces: &[Piece]) {
    let c = <K::C<F> as Coefficients<F>>::from_row(&row.coefficients);
    let frame = Frame::new(&row.shared);
    let sweep = at_level::<K, F>(isa);
    let count = <K::S<F> as SlotValues<F>>::COUNT;
    for &Piece { tensor, start, len } in pieces {
        point();
        let job = &jobs[tensor];
        let plain = job.p.strides.is_none() && job.g.strides.is_none() && job.rows.is_none();
        let slot = |k: usize| if k < count { (job.slots[k], len) } else { (std::ptr::null_mut(), 0) };
        // SAFETY: the caller keeps start + len within tensors and slots, and other threads of the step
        // away; slots store the compute type.
        unsafe {
            if plain && E::IS_COMPUTE_TYPE && G::IS_COMPUTE_TYPE {
                // Written out: an array's `map` is a call where the compiler does not inline it.
                let own = |k: usize| whole_mut::<F>(slot(k).0, start, slot(k).1);
                let (s0, s1, s2, s3) = (own(0), own(1), own(2), own(3));
                let (p, g) = (whole_mut(job.p.ptr, start, len), whole(job.g.ptr, start, len));
                sweep(&c, &frame, p, g, s0, s1, s2, s3);
            } else {
                by_blocks::<K, E, G, F>(sweep, &c, &frame, job, start, len);
            }
            if row.shared.clears_gradients {
                // What was just read is still in the cache.
                clear(&job.g, start, len);
            }
        }
    }
}

/// One piece by way of local blocks.
///
/// # Safety
/// See [`Pass`].
unsafe fn by_blocks<K: Kernel, E: Element<F>, G: Element<F>, F: Real>(
    sweep: Sweep<K, F>,
    c: &K::C<F>,
    frame: &Frame<F>,
    Job { p, g, slots, rows, .. }: &Job,
    start: usize,
    len: usize,
) {
    let count = <K::S<F> as SlotValues<F>>::COUNT;
    let rows = rows.as_deref();
    let state = |k: usize| RawTensor { ptr: slots[k], len: p.len, dtype: F::DTYPE, strides: None };
    let (mut p_block, mut g_block) = ([F::ZERO; BLOCK], [F::ZERO; BLOCK]);
    let mut blocks = [[F::ZERO; BLOCK]; MAX_SLOTS];
    for at in (start..start + len).step_by(BLOCK) {
        let n = BLOCK.min(start + len - at);
        // SAFETY: the caller's duty; the rows lie within the parameter, whose length the slots have.
        unsafe {
            load_rows::<E, F>(p, rows, at, &mut p_block[..n]);
            load::<G, F>(g, at, &mut g_block[..n]);
            for (k, block) in blocks[..count].iter_mut().enumerate() {
                load_rows::<F, F>(&state(k), rows, at, &mut block[..n]);
            }
            let [s0, s1, s2, s3] = &mut blocks;
            let own = |k: usize| if k < count { n } else { 0 };
            let (s0, s1, s2, s3) = (&mut s0[..own(0)], &mut s1[..own(1)], &mut s2[..own(2)], &mut s3[..own(3)]);
            sweep(c, frame, &mut p_block[..n], &g_block[..n], s0, s1, s2, s3);
            store_rows::<E, F>(p, rows, at, &p_block[..n]);
            for (k, block) in blocks[..count].iter().enumerate() {
                store_rows::<F, F>(&state(k), rows, at, &block[..n]);
            }
        }
    }
}

/// The compiled loop of a kernel.
struct Select<K>(PhantomData<K>);

impl<K: Kernel> StorageVisitor for Select<K> {
    type Out = Pass;

    fn visit<E: Element<F>, G: Element<F>, F: Real>(self) -> Pass {
        pass::<K, E, G, F>
    }
}

/// The compiled loop of a kernel for a parameter and a gradient.
pub(super) fn select<K: Kernel>(parameter: Dtype, gradient: Dtype, isa: Isa) -> PassFn {
    PassFn { pass: with_storage(parameter, gradient, Select::<K>(PhantomData)), isa }
}
