//! NAdam: Adam with Nesterov momentum.
//!
//! Dozat: *Incorporating Nesterov momentum into Adam*, ICLR 2016 workshop, Algorithm 2, with the momentum
//! schedule of its section 2:
//!
//! ```text
//! μₜ = β₁·(1 − ½·0.96^(t·ψ)),   Pₜ = μ₁·…·μₜ
//! mₜ, vₜ as in Adam;   aₜ = √(vₜ/(1 − β₂ᵗ)) + ε
//! θₜ = θₜ₋₁ − lr·(1 − μₜ)/(1 − Pₜ)·gₜ/aₜ − lr·μₜ₊₁/(1 − Pₜ·μₜ₊₁)·mₜ/aₜ
//! ```
//!
//! | symbol | argument |
//! |---|---|
//! | β₁, β₂ | `betas` |
//! | ψ | `momentum_decay` |
//! | ε | `eps` |
//! | m, v, P | state `exp_avg`, `exp_avg_sq`, `mu_product` |
//!
//! Deviation: P is a float64; torch keeps and multiplies it in float32, also for float64 parameters.

use super::common::{BETAS, DECOUPLED, MAXIMIZE, WEIGHT_DECAY, eps, lr, moments};
use crate::hyper::{Hyper, Hypers, Range, Value};
use crate::real::Real;
use crate::rule::{
    Declaration, Kernel, MAX_COEFFICIENTS, Moment, Rule, Scalar, ScalarSlots, Slot, coefficients, one_minus_power,
    only_kernel,
};

/// The rule.
#[derive(Debug)]
pub struct NAdam;

coefficients!(
    /// Scalars of one step.
    Scalars {
        /// 1 − β₁.
        one_minus_beta1,
        /// β₂.
        beta2,
        /// 1 − β₂.
        one_minus_beta2,
        /// 1 − β₂ᵗ.
        correction2,
        /// ε.
        eps,
        /// −lr·(1 − μₜ)/(1 − Pₜ).
        gradient_step,
        /// −lr·μₜ₊₁/(1 − Pₜ·μₜ₊₁).
        moment_step,
    }
);

/// The only variant.
#[derive(Debug)]
pub struct Plain;

impl Kernel for Plain {
    const ENTRY: &'static str = "nadam";
    const COEFFICIENTS: &'static [&'static str] = Scalars::NAMES;
    type C<F: Real> = Scalars<F>;
    type S<F: Real> = [F; 2];

    #[inline(always)]
    fn update<F: Real>(c: &Scalars<F>, p: F, g: F, [m, v]: &mut [F; 2]) -> F {
        moments(c.one_minus_beta1, c.beta2, c.one_minus_beta2, g, m, v);
        let a = (*v / c.correction2).sqrt() + c.eps;
        let p = p + (c.gradient_step * g) / a;
        p + (c.moment_step * *m) / a
    }
}

impl Rule for NAdam {
    const DECLARATION: Declaration = Declaration {
        stem: "nadam",
        hypers: &[
            lr(2e-3),
            BETAS,
            eps(1e-8),
            WEIGHT_DECAY,
            Hyper {
                name: "momentum_decay",
                default: Value::Float(4e-3),
                range: Range::AtLeast(0.0),
                doc: "how fast the momentum μ grows to β₁, ψ",
            },
            DECOUPLED,
            MAXIMIZE,
        ],
        slots: &[Slot { name: "exp_avg", doc: "first moment m" }, Slot { name: "exp_avg_sq", doc: "second moment v" }],
        scalars: &[Scalar { name: "mu_product", start: 1.0, doc: "product P of the momenta so far" }],
        paper: "Dozat 2016, Incorporating Nesterov momentum into Adam",
        ..Declaration::COMMON
    };

    fn coefficients(h: &Hypers, at: Moment, [product, _]: &mut ScalarSlots) -> [f64; MAX_COEFFICIENTS] {
        let ([beta1, beta2], lr, decay) = (h.pair("betas"), h.float("lr"), h.float("momentum_decay"));
        let t = at.step as f64;
        let momentum = |t: f64| beta1 * (1.0 - 0.5 * libm::pow(0.96, t * decay));
        let (now, next) = (momentum(t), momentum(t + 1.0));
        *product *= now;
        Scalars {
            one_minus_beta1: 1.0 - beta1,
            beta2,
            one_minus_beta2: 1.0 - beta2,
            correction2: one_minus_power(beta2, at.step),
            eps: h.float("eps"),
            gradient_step: -lr * (1.0 - now) / (1.0 - *product),
            moment_step: -lr * next / (1.0 - *product * next),
        }
        .into_row()
    }

    only_kernel!(Plain);
}
