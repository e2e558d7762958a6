//! Adamax: Adam with the infinity norm in place of the second moment.
//!
//! Kingma, Ba: *Adam: a method for stochastic optimization*, ICLR 2015, Algorithm 2:
//!
//! ```text
//! mₜ = β₁·mₜ₋₁ + (1 − β₁)·gₜ
//! uₜ = max(β₂·uₜ₋₁, |gₜ| + ε)
//! θₜ = θₜ₋₁ − lr/(1 − β₁ᵗ) · mₜ/uₜ
//! ```
//!
//! | symbol | argument |
//! |---|---|
//! | β₁, β₂ | `betas` |
//! | ε | `eps` |
//! | m, u | state `exp_avg`, `exp_inf` |
//!
//! Deviation from the paper, torch's: ε inside the maximum keeps u from being zero. With `eps=0` a zero
//! gradient at the start gives 0/0.

use super::common::{BETAS, MAXIMIZE, WEIGHT_DECAY, eps, lr};
use crate::hyper::Hypers;
use crate::real::Real;
use crate::rule::{
    Declaration, Kernel, MAX_COEFFICIENTS, Moment, Rule, ScalarSlots, Slot, coefficients, one_minus_power, only_kernel,
};

/// The rule.
#[derive(Debug)]
pub struct Adamax;

coefficients!(
    /// Scalars of one step.
    Scalars {
        /// 1 − β₁.
        one_minus_beta1,
        /// β₂.
        beta2,
        /// ε.
        eps,
        /// −lr/(1 − β₁ᵗ).
        neg_step_size,
    }
);

/// The only variant.
#[derive(Debug)]
pub struct Plain;

impl Kernel for Plain {
    const ENTRY: &'static str = "adamax";
    const COEFFICIENTS: &'static [&'static str] = Scalars::NAMES;
    type C<F: Real> = Scalars<F>;
    type S<F: Real> = [F; 2];

    #[inline(always)]
    fn update<F: Real>(c: &Scalars<F>, p: F, g: F, [m, u]: &mut [F; 2]) -> F {
        *m = F::lerp(*m, g, c.one_minus_beta1);
        *u = (*u * c.beta2).max_nan(g.abs() + c.eps);
        p + (c.neg_step_size * *m) / *u
    }
}

impl Rule for Adamax {
    const DECLARATION: Declaration = Declaration {
        stem: "adamax",
        hypers: &[lr(2e-3), BETAS, eps(1e-8), WEIGHT_DECAY, MAXIMIZE],
        slots: &[
            Slot { name: "exp_avg", doc: "first moment m" },
            Slot { name: "exp_inf", doc: "decayed infinity norm u" },
        ],
        paper: "Kingma, Ba 2015, Adam: a method for stochastic optimization",
        ..Declaration::COMMON
    };

    fn coefficients(h: &Hypers, at: Moment, _: &mut ScalarSlots) -> [f64; MAX_COEFFICIENTS] {
        let [beta1, beta2] = h.pair("betas");
        Scalars {
            one_minus_beta1: 1.0 - beta1,
            beta2,
            eps: h.float("eps"),
            neg_step_size: -(h.float("lr") / one_minus_power(beta1, at.step)),
        }
        .into_row()
    }

    only_kernel!(Plain);
}
