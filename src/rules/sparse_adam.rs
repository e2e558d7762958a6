//! Adam on the rows that a sparse gradient touches; the moments of the others rest.
//!
//! Kingma, Ba: *Adam: a method for stochastic optimization*, ICLR 2015, Algorithm 1, in the lazy form that
//! torch runs:
//!
//! ```text
//! of the touched rows, t counting every update of the parameter:
//! mₜ = mₜ₋₁ + (1 − β₁)·(gₜ − mₜ₋₁),   vₜ = vₜ₋₁ + (1 − β₂)·(gₜ² − vₜ₋₁)
//! θₜ = θₜ₋₁ − lr·√(1 − β₂ᵗ)/(1 − β₁ᵗ) · mₜ/(√vₜ + ε)
//! ```
//!
//! | symbol | argument |
//! |---|---|
//! | β₁, β₂ | `betas` |
//! | ε | `eps` |
//! | m, v | state `exp_avg`, `exp_avg_sq` |
//!
//! Deviation from the paper's Algorithm 1, torch's: ε is added to the uncorrected √v.

use super::common::{BETAS, MAXIMIZE, lr};
use crate::hyper::{Hyper, Hypers, Range, Value};
use crate::real::Real;
use crate::rule::{
    Declaration, Kernel, MAX_COEFFICIENTS, Moment, Rule, ScalarSlots, Slot, Sparse, coefficients, one_minus_power,
    only_kernel,
};

/// The rule.
#[derive(Debug)]
pub struct SparseAdam;

coefficients!(
    /// Scalars of one step.
    Scalars {
        /// 1 − β₁.
        one_minus_beta1,
        /// 1 − β₂.
        one_minus_beta2,
        /// ε.
        eps,
        /// −lr·√(1 − β₂ᵗ)/(1 − β₁ᵗ).
        neg_step_size,
    }
);

/// The only variant.
#[derive(Debug)]
pub struct Plain;

impl Kernel for Plain {
    const ENTRY: &'static str = "sparse_adam";
    const COEFFICIENTS: &'static [&'static str] = Scalars::NAMES;
    type C<F: Real> = Scalars<F>;
    type S<F: Real> = [F; 2];
    const RESTS: bool = true;

    #[inline(always)]
    fn update<F: Real>(c: &Scalars<F>, p: F, g: F, [m, v]: &mut [F; 2]) -> F {
        *m = *m + (g - *m) * c.one_minus_beta1;
        *v = *v + (g * g - *v) * c.one_minus_beta2;
        p + c.neg_step_size * (*m / (v.sqrt() + c.eps))
    }
}

impl Rule for SparseAdam {
    const DECLARATION: Declaration = Declaration {
        stem: "sparse_adam",
        hypers: &[
            lr(1e-3),
            BETAS,
            Hyper {
                name: "eps",
                default: Value::Float(1e-8),
                range: Range::Above(0.0),
                doc: "term ε that keeps the denominator from being zero",
            },
            MAXIMIZE,
        ],
        slots: &[Slot { name: "exp_avg", doc: "first moment m" }, Slot { name: "exp_avg_sq", doc: "second moment v" }],
        sparse: Sparse::Required,
        paper: "Kingma, Ba 2015, Adam: a method for stochastic optimization",
        ..Declaration::COMMON
    };

    fn coefficients(h: &Hypers, at: Moment, _: &mut ScalarSlots) -> [f64; MAX_COEFFICIENTS] {
        let [beta1, beta2] = h.pair("betas");
        let corrections = libm::sqrt(one_minus_power(beta2, at.step)) / one_minus_power(beta1, at.step);
        Scalars {
            one_minus_beta1: 1.0 - beta1,
            one_minus_beta2: 1.0 - beta2,
            eps: h.float("eps"),
            neg_step_size: -(h.float("lr") * corrections),
        }
        .into_row()
    }

    only_kernel!(Plain);
}
