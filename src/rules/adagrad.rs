//! Adagrad: steps scaled by the root of the sum of all squared gradients.
//!
//! Duchi, Hazan, Singer: *Adaptive subgradient methods for online learning and stochastic optimization*,
//! JMLR 12, 2011, the diagonal form:
//!
//! ```text
//! s₀ = τ,   sₜ = sₜ₋₁ + gₜ²
//! θₜ = θₜ₋₁ − lr/(1 + (t − 1)·η) · gₜ/(√sₜ + ε)
//! ```
//!
//! | symbol | argument |
//! |---|---|
//! | η | `lr_decay` |
//! | τ | `initial_accumulator_value` |
//! | ε | `eps` |
//! | s | state `sum` |
//!
//! Deviations: the decaying rate is torch's. Each group's own τ counts, and the state begins with the
//! first update; torch makes it in the constructor and takes the constructor's τ for every group.

use super::common::{MAXIMIZE, WEIGHT_DECAY, eps, lr};
use crate::hyper::{Hyper, Hypers, Range, Value};
use crate::real::Real;
use crate::rule::{
    Declaration, Kernel, MAX_COEFFICIENTS, Moment, Rule, ScalarSlots, Slot, Sparse, coefficients, only_kernel,
};

/// The rule.
#[derive(Debug)]
pub struct Adagrad;

coefficients!(
    /// Scalars of one step.
    Scalars {
        /// 1 where the sum does not exist yet.
        first,
        /// τ.
        start,
        /// ε.
        eps,
        /// −lr/(1 + (t − 1)·η).
        neg_lr,
    }
);

/// The only variant.
#[derive(Debug)]
pub struct Plain;

impl Kernel for Plain {
    const ENTRY: &'static str = "adagrad";
    const COEFFICIENTS: &'static [&'static str] = Scalars::NAMES;
    type C<F: Real> = Scalars<F>;
    type S<F: Real> = [F; 1];
    const RESTS: bool = true;

    #[inline(always)]
    fn update<F: Real>(c: &Scalars<F>, p: F, g: F, [s]: &mut [F; 1]) -> F {
        let before = if c.first == F::ONE { c.start } else { *s };
        *s = before + g * g;
        p + (c.neg_lr * g) / (s.sqrt() + c.eps)
    }
}

impl Rule for Adagrad {
    const DECLARATION: Declaration = Declaration {
        stem: "adagrad",
        hypers: &[
            lr(1e-2),
            Hyper {
                name: "lr_decay",
                default: Value::Float(0.0),
                range: Range::AtLeast(0.0),
                doc: "decay η of the learning rate",
            },
            eps(1e-10),
            WEIGHT_DECAY,
            Hyper {
                name: "initial_accumulator_value",
                default: Value::Float(0.0),
                range: Range::AtLeast(0.0),
                doc: "what the sum begins with, τ",
            },
            MAXIMIZE,
        ],
        slots: &[Slot { name: "sum", doc: "sum s of squared gradients" }],
        sparse: Sparse::Accepted,
        eager: true,
        paper: "Duchi, Hazan, Singer 2011, Adaptive subgradient methods for online learning and stochastic optimization",
        ..Declaration::COMMON
    };

    fn coefficients(h: &Hypers, at: Moment, _: &mut ScalarSlots) -> [f64; MAX_COEFFICIENTS] {
        Scalars {
            first: f64::from(u8::from(at.fresh.has(0))),
            start: h.float("initial_accumulator_value"),
            eps: h.float("eps"),
            neg_lr: -(h.float("lr") / (1.0 + (at.step - 1) as f64 * h.float("lr_decay"))),
        }
        .into_row()
    }

    only_kernel!(Plain);
}
