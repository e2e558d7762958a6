//! RAdam: Adam that waits until the variance of its step can be trusted, and corrects for it.
//!
//! Liu, Jiang, He, Chen, Liu, Gao, Han: *On the variance of the adaptive learning rate and beyond*, ICLR
//! 2020, Algorithm 2:
//!
//! ```text
//! mₜ, vₜ as in Adam;  m̂ₜ = mₜ/(1 − β₁ᵗ)
//! ρ∞ = 2/(1 − β₂) − 1,   ρₜ = ρ∞ − 2·t·β₂ᵗ/(1 − β₂ᵗ)
//! ρₜ > 5:  rₜ = √( (ρₜ − 4)(ρₜ − 2)ρ∞ / ((ρ∞ − 4)(ρ∞ − 2)ρₜ) )
//!          θₜ = θₜ₋₁ − lr·m̂ₜ·rₜ·√(1 − β₂ᵗ)/(√vₜ + ε)
//! else:    θₜ = θₜ₋₁ − lr·m̂ₜ
//! ```
//!
//! | symbol | argument |
//! |---|---|
//! | β₁, β₂ | `betas` |
//! | ε | `eps` |
//! | m, v | state `exp_avg`, `exp_avg_sq` |
//!
//! Deviations from the paper, torch's: the threshold is 5 where the paper has 4, and ε is added to the
//! uncorrected √v.

use super::common::{BETAS, DECOUPLED, MAXIMIZE, WEIGHT_DECAY, eps, lr, moments};
use crate::hyper::Hypers;
use crate::real::Real;
use crate::rule::{
    Declaration, Kernel, MAX_COEFFICIENTS, Moment, Rule, ScalarSlots, Slot, coefficients, one_minus_power, only_kernel,
};

/// The rule.
#[derive(Debug)]
pub struct RAdam;

coefficients!(
    /// Scalars of one step.
    Scalars {
        /// 1 − β₁.
        one_minus_beta1,
        /// β₂.
        beta2,
        /// 1 − β₂.
        one_minus_beta2,
        /// 1 − β₁ᵗ.
        correction1,
        /// lr.
        lr,
        /// ε.
        eps,
        /// √(1 − β₂ᵗ).
        sqrt_correction2,
        /// rₜ; 0 while it does not apply.
        rectification,
    }
);

/// The only variant.
#[derive(Debug)]
pub struct Plain;

impl Kernel for Plain {
    const ENTRY: &'static str = "radam";
    const COEFFICIENTS: &'static [&'static str] = Scalars::NAMES;
    type C<F: Real> = Scalars<F>;
    type S<F: Real> = [F; 2];

    #[inline(always)]
    fn update<F: Real>(c: &Scalars<F>, p: F, g: F, [m, v]: &mut [F; 2]) -> F {
        moments(c.one_minus_beta1, c.beta2, c.one_minus_beta2, g, m, v);
        let step = (*m / c.correction1) * c.lr;
        let adaptive = (F::ONE / (v.sqrt() + c.eps)) * c.sqrt_correction2;
        let rectified = (step * adaptive) * c.rectification;
        p - if c.rectification == F::ZERO { step } else { rectified }
    }
}

impl Rule for RAdam {
    const DECLARATION: Declaration = Declaration {
        stem: "radam",
        hypers: &[lr(1e-3), BETAS, eps(1e-8), WEIGHT_DECAY, MAXIMIZE, DECOUPLED],
        slots: &[Slot { name: "exp_avg", doc: "first moment m" }, Slot { name: "exp_avg_sq", doc: "second moment v" }],
        paper: "Liu, Jiang, He, Chen, Liu, Gao, Han 2020, On the variance of the adaptive learning rate and beyond",
        ..Declaration::COMMON
    };

    fn coefficients(h: &Hypers, at: Moment, _: &mut ScalarSlots) -> [f64; MAX_COEFFICIENTS] {
        let [beta1, beta2] = h.pair("betas");
        let correction2 = one_minus_power(beta2, at.step);
        let rho_inf = 2.0 / (1.0 - beta2) - 1.0;
        let rho = rho_inf - 2.0 * at.step as f64 * (1.0 - correction2) / correction2;
        let rectification = if rho > 5.0 {
            libm::sqrt((rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho))
        } else {
            0.0
        };
        Scalars {
            one_minus_beta1: 1.0 - beta1,
            beta2,
            one_minus_beta2: 1.0 - beta2,
            correction1: one_minus_power(beta1, at.step),
            lr: h.float("lr"),
            eps: h.float("eps"),
            sqrt_correction2: libm::sqrt(correction2),
            rectification,
        }
        .into_row()
    }

    only_kernel!(Plain);
}
