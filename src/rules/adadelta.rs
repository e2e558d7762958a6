//! Adadelta: steps scaled by the ratio of running sizes of past steps and gradients.
//!
//! Zeiler: *ADADELTA: an adaptive learning rate method*, 2012, Algorithm 1:
//!
//! ```text
//! vₜ = ρ·vₜ₋₁ + (1 − ρ)·gₜ²
//! δₜ = √(aₜ₋₁ + ε)/√(vₜ + ε) · gₜ
//! aₜ = ρ·aₜ₋₁ + (1 − ρ)·δₜ²
//! θₜ = θₜ₋₁ − lr·δₜ
//! ```
//!
//! | symbol | argument |
//! |---|---|
//! | ρ | `rho` |
//! | ε | `eps` |
//! | v, a | state `square_avg`, `acc_delta` |
//!
//! Deviation from the paper, torch's: the step is multiplied by a learning rate, 1 by default.

use super::common::{MAXIMIZE, WEIGHT_DECAY, eps, lr};
use crate::hyper::{Hyper, Hypers, Range, Value};
use crate::real::Real;
use crate::rule::{Declaration, Kernel, MAX_COEFFICIENTS, Moment, Rule, ScalarSlots, Slot, coefficients, only_kernel};

/// The rule.
#[derive(Debug)]
pub struct Adadelta;

coefficients!(
    /// Scalars of one step.
    Scalars {
        /// ρ.
        rho,
        /// 1 − ρ.
        one_minus_rho,
        /// ε.
        eps,
        /// −lr.
        neg_lr,
    }
);

/// The only variant.
#[derive(Debug)]
pub struct Plain;

impl Kernel for Plain {
    const ENTRY: &'static str = "adadelta";
    const COEFFICIENTS: &'static [&'static str] = Scalars::NAMES;
    type C<F: Real> = Scalars<F>;
    type S<F: Real> = [F; 2];

    #[inline(always)]
    fn update<F: Real>(c: &Scalars<F>, p: F, g: F, [v, a]: &mut [F; 2]) -> F {
        *v = *v * c.rho + (c.one_minus_rho * g) * g;
        let delta = ((*a + c.eps).sqrt() / (*v + c.eps).sqrt()) * g;
        *a = *a * c.rho + (c.one_minus_rho * delta) * delta;
        p + c.neg_lr * delta
    }
}

impl Rule for Adadelta {
    const DECLARATION: Declaration = Declaration {
        stem: "adadelta",
        hypers: &[
            lr(1.0),
            Hyper {
                name: "rho",
                default: Value::Float(0.9),
                range: Range::Within(0.0, 1.0),
                doc: "decay rate ρ of both running averages",
            },
            eps(1e-6),
            WEIGHT_DECAY,
            MAXIMIZE,
        ],
        slots: &[
            Slot { name: "square_avg", doc: "running average v of squared gradients" },
            Slot { name: "acc_delta", doc: "running average a of squared steps" },
        ],
        paper: "Zeiler 2012, ADADELTA: an adaptive learning rate method",
        ..Declaration::COMMON
    };

    fn coefficients(h: &Hypers, _: Moment, _: &mut ScalarSlots) -> [f64; MAX_COEFFICIENTS] {
        let rho = h.float("rho");
        Scalars { rho, one_minus_rho: 1.0 - rho, eps: h.float("eps"), neg_lr: -h.float("lr") }.into_row()
    }

    only_kernel!(Plain);
}
